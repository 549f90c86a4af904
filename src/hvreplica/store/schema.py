"""The tables of catalog.db, version 1; docs/formats/store.md explains each column.

Times are Unix seconds, GUIDs are text in the usual lower-case form, sizes are bytes.
"""

from __future__ import annotations

APPLICATION_ID = 0x48565243  # "HVRC": tells our database from anybody else's
SCHEMA_VERSION = 1

TABLES = """
CREATE TABLE vm (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    folder TEXT NOT NULL UNIQUE,
    folder_key TEXT NOT NULL UNIQUE,
    relationship_id TEXT NOT NULL,
    generation INTEGER NOT NULL CHECK (generation >= 0),
    certificate TEXT NOT NULL,
    claimed_s REAL NOT NULL
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
    PRIMARY KEY (vm_id, disk_index)
);
CREATE TABLE transfer (
    vm_id INTEGER PRIMARY KEY REFERENCES vm (id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'logs')),
    state TEXT NOT NULL CHECK (state IN ('receiving', 'renaming')),
    point_id TEXT NOT NULL,
    previous_point_id TEXT,
    instant_s REAL NOT NULL,
    started_s REAL NOT NULL
);
CREATE TABLE position (
    vm_id INTEGER NOT NULL REFERENCES transfer (vm_id) ON DELETE CASCADE,
    target INTEGER NOT NULL,
    durable_bytes INTEGER NOT NULL CHECK (durable_bytes >= 0),
    PRIMARY KEY (vm_id, target)
);
CREATE TABLE log (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    place INTEGER NOT NULL,
    disk_index INTEGER NOT NULL,
    log_id TEXT NOT NULL,
    previous_log_id TEXT NOT NULL,
    log_bytes INTEGER NOT NULL,
    PRIMARY KEY (vm_id, point_id, place),
    UNIQUE (vm_id, log_id)
);
CREATE TABLE point (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    id TEXT NOT NULL,
    instant_s REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('initial', 'delta')),
    consistency TEXT NOT NULL CHECK (consistency IN ('crash')),
    state TEXT NOT NULL CHECK (state IN ('spooled', 'applying', 'complete', 'superseded')),
    previous_id TEXT,
    bytes INTEGER NOT NULL,
    received_s REAL NOT NULL,
    applied_s REAL,
    PRIMARY KEY (vm_id, sequence),
    UNIQUE (vm_id, id)
);
"""
