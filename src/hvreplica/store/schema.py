"""The tables of catalog.db, version 3; see docs/formats/store.md, and migrations.py for older ones.

Times are Unix seconds, GUIDs are text in the usual lower-case form, sizes are bytes.
"""

from __future__ import annotations

APPLICATION_ID = 0x48565243  # "HVRC": tells our database from anybody else's
SCHEMA_VERSION = 3

TABLES = """
CREATE TABLE vm (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    folder TEXT NOT NULL UNIQUE,
    folder_key TEXT NOT NULL UNIQUE,
    relationship_id TEXT NOT NULL,
    generation INTEGER NOT NULL CHECK (generation >= 0),
    certificate TEXT NOT NULL,
    claimed_s REAL NOT NULL,
    policy TEXT,
    failover TEXT
);
CREATE TABLE owner (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    relationship_id TEXT NOT NULL,
    certificate TEXT NOT NULL,
    first_generation INTEGER NOT NULL,
    last_generation INTEGER NOT NULL,
    first_s REAL NOT NULL,
    last_s REAL NOT NULL,
    PRIMARY KEY (vm_id, relationship_id, certificate)
);
CREATE TABLE disk (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    disk_index INTEGER NOT NULL CHECK (disk_index BETWEEN 0 AND 63),
    virtual_bytes INTEGER NOT NULL CHECK (virtual_bytes > 0),
    logical_sector_bytes INTEGER NOT NULL,
    physical_sector_bytes INTEGER NOT NULL,
    block_bytes INTEGER NOT NULL,
    label TEXT NOT NULL,
    file_bytes INTEGER,
    data_write_guid TEXT,
    last_log_id TEXT,
    virtual_disk_id TEXT,
    base_id TEXT,
    removed_s REAL,
    digest TEXT,
    PRIMARY KEY (vm_id, disk_index)
);
CREATE TABLE transfer (
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
);
CREATE TABLE position (
    vm_id INTEGER NOT NULL,
    kind TEXT NOT NULL,
    target INTEGER NOT NULL,
    durable_bytes INTEGER NOT NULL CHECK (durable_bytes >= 0),
    PRIMARY KEY (vm_id, kind, target),
    FOREIGN KEY (vm_id, kind) REFERENCES transfer (vm_id, kind) ON DELETE CASCADE
);
CREATE TABLE member (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    disk_index INTEGER NOT NULL,
    virtual_bytes INTEGER NOT NULL CHECK (virtual_bytes > 0),
    PRIMARY KEY (vm_id, point_id, disk_index)
);
CREATE TABLE log (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    place INTEGER NOT NULL,
    disk_index INTEGER NOT NULL,
    log_id TEXT NOT NULL,
    previous_log_id TEXT NOT NULL,
    log_bytes INTEGER NOT NULL,
    is_ordered INTEGER NOT NULL DEFAULT 0 CHECK (is_ordered IN (0, 1)),
    PRIMARY KEY (vm_id, point_id, place),
    UNIQUE (vm_id, log_id)
);
CREATE TABLE point (
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
);
CREATE TABLE undo (
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
);
CREATE TABLE kept_log (
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
);
CREATE TABLE scan (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    disk_index INTEGER NOT NULL,
    position INTEGER NOT NULL CHECK (position >= 0),
    digest TEXT NOT NULL,
    started_s REAL,
    ended_s REAL,
    drift TEXT,
    damage TEXT,
    PRIMARY KEY (vm_id, disk_index)
);
"""
