"""How the tables of older catalogs become those of schema.py, one version at a time.

The tables that a step makes are frozen here, as they were in the version that it leads to. Foreign keys are
off meanwhile, so that a table that is replaced does not take the rows along that refer to it.
"""

from __future__ import annotations

_TRANSFER_2 = """CREATE TABLE transfer (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'join', 'logs')),
    state TEXT NOT NULL CHECK (state IN ('receiving', 'renaming')),
    point_id TEXT NOT NULL,
    previous_point_id TEXT,
    instant_s REAL NOT NULL,
    started_s REAL NOT NULL,
    consistent INTEGER NOT NULL CHECK (consistent IN (0, 1)),
    PRIMARY KEY (vm_id, kind)
)"""
_POSITION_2 = """CREATE TABLE position (
    vm_id INTEGER NOT NULL,
    kind TEXT NOT NULL,
    target INTEGER NOT NULL,
    durable_bytes INTEGER NOT NULL CHECK (durable_bytes >= 0),
    PRIMARY KEY (vm_id, kind, target),
    FOREIGN KEY (vm_id, kind) REFERENCES transfer (vm_id, kind) ON DELETE CASCADE
)"""
_MEMBER_2 = """CREATE TABLE member (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    disk_index INTEGER NOT NULL,
    virtual_bytes INTEGER NOT NULL CHECK (virtual_bytes > 0),
    PRIMARY KEY (vm_id, point_id, disk_index)
)"""
_POINT_2 = """CREATE TABLE point (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    id TEXT NOT NULL,
    instant_s REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'delta')),
    consistency TEXT NOT NULL CHECK (consistency IN ('none', 'crash')),
    state TEXT NOT NULL CHECK (state IN ('spooled', 'applying', 'base', 'complete', 'superseded')),
    previous_id TEXT,
    bytes INTEGER NOT NULL,
    received_s REAL NOT NULL,
    applied_s REAL,
    PRIMARY KEY (vm_id, sequence),
    UNIQUE (vm_id, id)
)"""
_TRANSFER_3 = """CREATE TABLE transfer (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'join', 'logs')),
    state TEXT NOT NULL CHECK (state IN ('receiving', 'renaming')),
    point_id TEXT NOT NULL,
    previous_point_id TEXT,
    instant_s REAL NOT NULL,
    started_s REAL NOT NULL,
    consistent INTEGER NOT NULL CHECK (consistent IN (0, 1)),
    point_kind TEXT NOT NULL,
    consistency TEXT NOT NULL,
    PRIMARY KEY (vm_id, kind)
)"""
_POSITION_3 = """CREATE TABLE position (
    vm_id INTEGER NOT NULL,
    kind TEXT NOT NULL,
    target INTEGER NOT NULL,
    durable_bytes INTEGER NOT NULL CHECK (durable_bytes >= 0),
    PRIMARY KEY (vm_id, kind, target),
    FOREIGN KEY (vm_id, kind) REFERENCES transfer (vm_id, kind) ON DELETE CASCADE
)"""
_POINT_3 = """CREATE TABLE point (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    id TEXT NOT NULL,
    instant_s REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'standard', 'planned', 'manual')),
    consistency TEXT NOT NULL CHECK (consistency IN ('none', 'crash', 'app')),
    state TEXT NOT NULL
        CHECK (state IN ('spooled', 'applying', 'base', 'complete', 'damaged', 'superseded')),
    previous_id TEXT,
    bytes INTEGER NOT NULL,
    received_s REAL NOT NULL,
    applied_s REAL,
    damage TEXT,
    PRIMARY KEY (vm_id, sequence),
    UNIQUE (vm_id, id)
)"""
_UNDO_3 = """CREATE TABLE undo (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    place INTEGER NOT NULL,
    disk_index INTEGER NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('undo', 'whole')),
    file_bytes INTEGER NOT NULL,
    covered_bytes INTEGER NOT NULL,
    log_id TEXT,
    digest_change TEXT,
    PRIMARY KEY (vm_id, disk_index, point_id, place),
    UNIQUE (vm_id, id)
)"""
_KEPT_LOG_3 = """CREATE TABLE kept_log (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    log_id TEXT NOT NULL,
    disk_index INTEGER NOT NULL,
    previous_log_id TEXT NOT NULL,
    log_bytes INTEGER NOT NULL,
    point_id TEXT NOT NULL,
    before_point_id TEXT,
    instant_s REAL NOT NULL,
    is_ordered INTEGER NOT NULL CHECK (is_ordered IN (0, 1)),
    kept_until_s REAL NOT NULL,
    PRIMARY KEY (vm_id, log_id)
)"""
_SCAN_3 = """CREATE TABLE scan (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    disk_index INTEGER NOT NULL,
    position INTEGER NOT NULL CHECK (position >= 0),
    digest TEXT NOT NULL,
    started_s REAL,
    ended_s REAL,
    drift TEXT,
    damage TEXT,
    PRIMARY KEY (vm_id, disk_index)
)"""

# From the version that is the key to the next one.
MIGRATIONS = {
    1: (
        "ALTER TABLE disk ADD COLUMN virtual_disk_id TEXT",
        "ALTER TABLE disk ADD COLUMN base_id TEXT",
        "ALTER TABLE disk ADD COLUMN removed_s REAL",
        "ALTER TABLE point RENAME TO point_1",
        _POINT_2,
        "INSERT INTO point SELECT * FROM point_1",
        "DROP TABLE point_1",
        "ALTER TABLE position RENAME TO position_1",
        "ALTER TABLE transfer RENAME TO transfer_1",
        _TRANSFER_2,
        "INSERT INTO transfer SELECT *, 1 FROM transfer_1",
        _POSITION_2,
        """INSERT INTO position SELECT vm_id, kind, target, durable_bytes
           FROM position_1 JOIN transfer_1 USING (vm_id)""",
        "DROP TABLE position_1",
        "DROP TABLE transfer_1",
        _MEMBER_2,
        """INSERT INTO member SELECT vm_id, id, disk_index, virtual_bytes
           FROM point JOIN disk USING (vm_id) WHERE state <> 'superseded'""",
        """INSERT INTO member SELECT vm_id, point_id, disk_index, virtual_bytes
           FROM transfer JOIN disk USING (vm_id)""",
    ),
    2: (
        "ALTER TABLE vm ADD COLUMN policy TEXT",
        "ALTER TABLE vm ADD COLUMN failover TEXT",
        "ALTER TABLE disk ADD COLUMN digest TEXT",
        "ALTER TABLE point RENAME TO point_2",
        _POINT_3,
        """INSERT INTO point SELECT vm_id, sequence, id, instant_s, replace(kind, 'delta', 'standard'),
           consistency, state, previous_id, bytes, received_s, applied_s, NULL FROM point_2""",
        "DROP TABLE point_2",
        "ALTER TABLE position RENAME TO position_2",
        "ALTER TABLE transfer RENAME TO transfer_2",
        _TRANSFER_3,
        """INSERT INTO transfer SELECT *, iif(kind = 'logs', 'standard', 'initial'),
           iif(consistent, 'crash', 'none') FROM transfer_2""",
        _POSITION_3,
        "INSERT INTO position SELECT * FROM position_2",
        "DROP TABLE position_2",
        "DROP TABLE transfer_2",
        "ALTER TABLE log ADD COLUMN is_ordered INTEGER NOT NULL DEFAULT 0 CHECK (is_ordered IN (0, 1))",
        _UNDO_3,
        _KEPT_LOG_3,
        _SCAN_3,
    ),
}
