BEGIN TRANSACTION;
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
    last_log_id TEXT, virtual_disk_id TEXT, base_id TEXT, removed_s REAL,
    PRIMARY KEY (vm_id, disk_index)
);
INSERT INTO "disk" VALUES(1,0,2097152,512,4096,1048576,'disk0.vhdx',5242880,'396cab3b-80d2-4f58-9f11-1a3b3df245ad','73a9bef4-99bb-44dc-bbd2-a4f2c8af5bd9',NULL,NULL,NULL);
INSERT INTO "disk" VALUES(1,1,2097152,512,4096,1048576,'disk1.vhdx',6291456,'aa202f4a-d989-4fed-b559-8005bac48a6a','9f267a0e-d319-4217-9d2b-ba1537436e5c',NULL,NULL,NULL);
INSERT INTO "disk" VALUES(2,0,2097152,512,4096,1048576,'disk0.vhdx',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "disk" VALUES(2,1,3145728,512,4096,1048576,'disk1.vhdx',NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "disk" VALUES(3,0,2097152,512,4096,1048576,'disk0.vhdx',NULL,NULL,NULL,NULL,NULL,NULL);
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
INSERT INTO "log" VALUES(1,'da5117b9-19f5-48dc-b77e-acfe863e5282',0,0,'2e281f9b-ddf8-4336-915b-579b74e42509','73a9bef4-99bb-44dc-bbd2-a4f2c8af5bd9',18432);
INSERT INTO "log" VALUES(1,'da5117b9-19f5-48dc-b77e-acfe863e5282',1,1,'50c9c994-7526-46ae-81c7-8b283592edff','9f267a0e-d319-4217-9d2b-ba1537436e5c',13312);
INSERT INTO "log" VALUES(1,'a0480377-e97e-4dee-b2ee-8651ab4f62e8',0,0,'fa940bf3-eb57-4f5f-812f-4f8b12cd8aef','2e281f9b-ddf8-4336-915b-579b74e42509',20480);
INSERT INTO "log" VALUES(1,'a0480377-e97e-4dee-b2ee-8651ab4f62e8',1,1,'d2f6e171-6f7b-4780-8e6c-ab44e78db5e6','50c9c994-7526-46ae-81c7-8b283592edff',22016);
CREATE TABLE member (
    vm_id INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE,
    point_id TEXT NOT NULL,
    disk_index INTEGER NOT NULL,
    virtual_bytes INTEGER NOT NULL CHECK (virtual_bytes > 0),
    PRIMARY KEY (vm_id, point_id, disk_index)
);
INSERT INTO "member" VALUES(1,'8f7373ab-e8e3-44da-b807-e24e58c36740',0,2097152);
INSERT INTO "member" VALUES(1,'8f7373ab-e8e3-44da-b807-e24e58c36740',1,2097152);
INSERT INTO "member" VALUES(1,'da5117b9-19f5-48dc-b77e-acfe863e5282',0,2097152);
INSERT INTO "member" VALUES(1,'da5117b9-19f5-48dc-b77e-acfe863e5282',1,2097152);
INSERT INTO "member" VALUES(1,'a0480377-e97e-4dee-b2ee-8651ab4f62e8',0,2097152);
INSERT INTO "member" VALUES(1,'a0480377-e97e-4dee-b2ee-8651ab4f62e8',1,2097152);
INSERT INTO "member" VALUES(2,'00000000-0000-0abc-0000-00000000012c',0,2097152);
INSERT INTO "member" VALUES(2,'00000000-0000-0abc-0000-00000000012c',1,3145728);
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
INSERT INTO "owner" VALUES(1,'00000000-0000-0abc-0000-000000000001','sha256:01',1,1,1735689600.0,1735689600.0);
INSERT INTO "owner" VALUES(2,'00000000-0000-0abc-0000-000000000002','sha256:01',1,1,1735689600.0,1735689600.0);
INSERT INTO "owner" VALUES(3,'00000000-0000-0abc-0000-000000000003','sha256:01',1,1,1735689600.0,1735689600.0);
CREATE TABLE point (
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
);
INSERT INTO "point" VALUES(1,1,'00000000-0000-0abc-0000-000000000064',1700000000.0,'initial','crash','superseded',NULL,10485760,1735689600.0,1735689600.0);
INSERT INTO "point" VALUES(1,2,'8f7373ab-e8e3-44da-b807-e24e58c36740',1700000060.0,'delta','crash','complete','00000000-0000-0abc-0000-000000000064',45568,1735689600.0,1735689600.0);
INSERT INTO "point" VALUES(1,3,'da5117b9-19f5-48dc-b77e-acfe863e5282',1700000060.0,'delta','crash','spooled','8f7373ab-e8e3-44da-b807-e24e58c36740',31744,1735689600.0,NULL);
CREATE TABLE position (
    vm_id INTEGER NOT NULL,
    kind TEXT NOT NULL,
    target INTEGER NOT NULL,
    durable_bytes INTEGER NOT NULL CHECK (durable_bytes >= 0),
    PRIMARY KEY (vm_id, kind, target),
    FOREIGN KEY (vm_id, kind) REFERENCES transfer (vm_id, kind) ON DELETE CASCADE
);
INSERT INTO "position" VALUES(1,'logs',0,4096);
INSERT INTO "position" VALUES(2,'initial',0,1048576);
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
    PRIMARY KEY (vm_id, kind)
);
INSERT INTO "transfer" VALUES(1,'26563209-4a04-4cde-85a0-0607b90c305d','logs','receiving','a0480377-e97e-4dee-b2ee-8651ab4f62e8','da5117b9-19f5-48dc-b77e-acfe863e5282',1700000060.0,1735689600.0,1);
INSERT INTO "transfer" VALUES(2,'00000000-0000-0abc-0000-00000000012c','initial','receiving','00000000-0000-0abc-0000-00000000012c',NULL,1700000000.0,1735689600.0,1);
INSERT INTO "transfer" VALUES(1,'00000000-0000-0abc-0000-0000000001f4','join','receiving','00000000-0000-0abc-0000-0000000001f4',NULL,1700000070.0,1735689600.0,0);
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
INSERT INTO "vm" VALUES(1,'web01','web01','web01','00000000-0000-0abc-0000-000000000001',1,'sha256:01',1735689600.0);
INSERT INTO "vm" VALUES(2,'db01','db01','db01','00000000-0000-0abc-0000-000000000002',1,'sha256:01',1735689600.0);
INSERT INTO "vm" VALUES(3,'new01','new01','new01','00000000-0000-0abc-0000-000000000003',1,'sha256:01',1735689600.0);
COMMIT;
