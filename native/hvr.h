/* The kernels of hvreplica: the C header, and without its preprocessor lines cffi's declarations.
 *
 * Rules for every function here:
 *
 * - The caller owns all memory. A function reads and writes only the ranges that its lengths name, keeps no
 *   pointer and no state, and may run in many threads at once. A pointer whose length or count is 0 is not
 *   followed.
 * - No alignment is needed of uint8_t buffers; arrays of wider types are aligned as C demands. Buffers that
 *   are written overlap no other argument.
 * - `variant` is an enum hvr_variant for which hvr_variant_available() is 1; any other number runs the scalar
 *   kernels. All variants give the same bits: those of src/hvreplica/native/reference.py.
 * - Extents are rows of two 64-bit numbers, (offset, length) in bytes; row i stands at [2 * i].
 * - A function that can fail returns an enum hvr_status, or -errno where the operating system refused.
 */
#ifndef HVR_H
#define HVR_H

#include <stddef.h>
#include <stdint.h>

enum hvr_variant { HVR_SCALAR = 0, HVR_AVX2 = 1, HVR_AVX512 = 2, HVR_NEON = 3, HVR_VARIANT_COUNT = 4 };

enum hvr_status {
    HVR_OK = 0,
    HVR_TRUNCATED = 1,    /* a file ends inside of what was to be read */
    HVR_ABSENT = 2,       /* a block to be written has no place in the file */
    HVR_OUT_OF_RANGE = 3, /* an extent, block or bit lies outside of its table, or ends beyond 63 bits */
    HVR_LENGTH = 4,       /* lengths that must agree do not */
    HVR_CHECKSUM = 5,     /* a metadata entry does not have its checksum */
    HVR_OPERATION = 6,    /* a metadata entry is not a write */
    HVR_STALE = 7,        /* what was read may have changed meanwhile */
    HVR_ELSEWHERE = 8     /* bytes that only the caller can read */
};

/* Return 1 where `variant` runs on this machine, 0 where the processor lacks something, -1 where this library
 * was built for another architecture, -2 where there is no such variant. */
int hvr_variant_available(int variant);

/* ---- checksums and digests ---- */

/* Return the CRC-32C (RFC 3720, 12.1) of buf[0 .. length), continuing from `value`: 0 to begin, or an earlier
 * result. */
uint32_t hvr_crc32c(int variant, const uint8_t *buf, size_t length, uint32_t value);

/* Return the sum of buf[0 .. length) modulo 2^32: [MS-HRL] 2.6 before the complement. */
uint32_t hvr_byte_sum(int variant, const uint8_t *buf, size_t length);

/* sums[i] = hvr_byte_sum of the i-th of `count` consecutive pieces of buf. sums: count written.
 * HVR_LENGTH unless lengths[0 .. count) add up to `length`; sums is then undefined. */
int hvr_byte_sums(int variant, const uint8_t *buf, size_t length, const uint64_t *lengths, size_t count,
                  uint32_t *sums);

/* digests[16 * i ..] = 16 zero bytes where block i of buf is all zero, else its XXH3-128
 * (seed 0, default secret), high half first, big-endian. The last block may be short. HVR_LENGTH unless
 * block_bytes > 0 and count == ceil(length / block_bytes). */
int hvr_fingerprints(int variant, const uint8_t *buf, size_t length, size_t block_bytes, uint8_t *digests,
                     size_t count);

/* Add to sums[0] and sums[1] what each page of buf counts, modulo 2^64. A page has HVR_PAGE_BYTES; the first one
 * is page `first_page` of its disk, the last may be short and is taken as if zeros followed. A page of zeros
 * counts nothing, any other mix(low + page * P1) and mix(high + page * P2), modulo 2^64, where (low, high) are
 * the halves of its XXH3-128 (seed 0, default secret), P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, and
 * mix(x) is the last step of XXH64: x ^= x >> 33; x *= P2; x ^= x >> 29; x *= 0x165667B19E3779F9; x ^ x >> 32.
 * Kept in catalogs: set in stone. */
enum { HVR_PAGE_BYTES = 4096 };
void hvr_page_digest(int variant, const uint8_t *buf, size_t length, uint64_t first_page, uint64_t *sums);

/* Add to the sums what the pages of the extents count, whose bytes stand in buf one after another. A short last
 * page of an extent is taken as if zeros followed. HVR_LENGTH unless the extents add up to `length`;
 * HVR_OUT_OF_RANGE where one does not begin with a page. The sums are then undefined. */
int hvr_extents_digest(int variant, const uint8_t *buf, size_t length, const uint64_t *extents, size_t count,
                       uint64_t *sums);

/* ---- content ---- */

/* Return how many bytes at the start of buf are 0; `length` where all are. */
size_t hvr_zero_prefix(int variant, const uint8_t *buf, size_t length);

/* Return how many bytes at the start of a and b are equal; `length` where all are. a and b may be the same.
 */
size_t hvr_equal_prefix(int variant, const uint8_t *a, const uint8_t *b, size_t length);

/* Write the runs of grains that hold any non-zero byte as extents, in order, and return how many.
 * grain_bytes > 0; the last grain may be short. runs: room for `capacity` rows; ceil(length / grain_bytes) /
 * 2 + 1 always suffice, and where they do not the rest is left out. */
size_t hvr_data_runs(int variant, const uint8_t *buf, size_t length, size_t grain_bytes, int64_t *runs,
                     size_t capacity);

/* As hvr_data_runs, for grains in which a and b differ. */
size_t hvr_changed_runs(int variant, const uint8_t *a, const uint8_t *b, size_t length, size_t grain_bytes,
                        int64_t *runs, size_t capacity);

/* ---- bitmaps: bit i is bit i % 8, least significant first, of byte i / 8 ---- */

/* Set (value != 0) or clear bits [first, first + count). HVR_OUT_OF_RANGE, and nothing changed, unless all
 * are inside. */
int hvr_bitmap_change(uint8_t *bitmap, size_t length, uint64_t first, uint64_t count, int value);

/* Return how many bits of bitmap[0 .. length) are set. */
uint64_t hvr_bitmap_count(int variant, const uint8_t *bitmap, size_t length);

/* target[i] |= other[i] for i in [0, length). */
void hvr_bitmap_merge(int variant, uint8_t *target, const uint8_t *other, size_t length);

/* Write the runs of set bits of [*position, end) as rows (first, count), in order, and return how many.
 * Stops with `capacity` rows: call again with the *position it left, which is `end` once all is done. A run
 * is never split. Bits outside of the bitmap are never read: end > 8 * length gives 0 rows and *position
 * unchanged. */
size_t hvr_bitmap_runs(int variant, const uint8_t *bitmap, size_t length, uint64_t *position, uint64_t end,
                       int64_t *runs, size_t capacity);

/* ---- log metadata, [MS-HRL] 2.4 ---- */

struct hvr_hrl_entry {
    uint64_t byte_offset; /* on the guest's disk */
    uint64_t log_offset;  /* of the data in the log */
    uint32_t data_length;
    uint32_t time_stamp;
    uint32_t data_checksum;
    uint8_t meta_operation;
    uint8_t padding[3]; /* 0 */
};

struct hvr_bad_entry {
    uint64_t index;
    uint64_t expected;
    uint64_t actual;
};

/* Parse the `count` entries of 32 bytes that stand after the 32-byte header of a metadata block into
 * entries[0 .. count). log_offset: where the data of entry 0 stands; each entry's data follows the one
 * before. HVR_LENGTH unless block has room for them; HVR_OUT_OF_RANGE if the data ends beyond 64 bits;
 * HVR_CHECKSUM or HVR_OPERATION with *bad for the first entry that is damaged. */
int hvr_hrl_parse(const uint8_t *block, size_t length, size_t count, uint64_t log_offset,
                  struct hvr_hrl_entry *entries, struct hvr_bad_entry *bad);

/* Pack `count` write entries with their checksums into packed[0 .. 32 * count).
 * HVR_OUT_OF_RANGE if a length or data checksum has more than 32 bits. */
int hvr_hrl_pack(const uint64_t *extents, const uint64_t *data_checksums, size_t count, uint32_t time_stamp,
                 uint8_t *packed);

/* ---- extents ---- */

struct hvr_source_extents {
    const uint64_t *disk_offsets;
    const uint64_t *lengths;
    const uint64_t *log_offsets;
    size_t count;
};

struct hvr_target_extents {
    uint64_t *disk_offsets;
    uint64_t *lengths;
    uint64_t *log_offsets;
    size_t capacity; /* at least 2 * source count */
    size_t count;    /* written */
};

/* For each byte that any source extent covers, keep the last extent in the source that covers it; write the
 * result sorted by disk offset, disjoint, with neighbours joined where disk and log offsets both continue.
 * O(n log n); O(n) where the source is sorted and disjoint already. Extents of length 0 cover nothing.
 * scratch: 4 * source count words. HVR_OUT_OF_RANGE if an extent ends beyond 64 bits or the source has 2^32
 * or more. */
int hvr_coalesce(const struct hvr_source_extents *source, struct hvr_target_extents *target,
                 uint64_t *scratch, size_t scratch_words);

/* ---- the block allocation table of a VHDX, [MS-VHDX] 2.5, a window of it at a time ---- */

enum hvr_bat_fault {
    HVR_BAT_STATE = 0,          /* a state that this kind of entry cannot have */
    HVR_BAT_RESERVED = 1,       /* reserved bits beside a place in the file */
    HVR_BAT_OUTSIDE = 2,        /* a block that does not end inside the file */
    HVR_BAT_SHARED = 3,         /* a block in units that are claimed already */
    HVR_BAT_NO_BITMAP = 4,      /* the first block of a chunk that is PARTIALLY_PRESENT where no bitmap is */
    HVR_BAT_STALE = 5,          /* bits beside NOT_PRESENT or ZERO, and reserved ones beside the loose states */
    HVR_BAT_ANCHOR_OUTSIDE = 6, /* a loose state whose place does not end inside the file */
    HVR_BAT_UNUSED = 7,         /* bits in an entry that no block has */
    HVR_BAT_FAULT_COUNT = 8
};

/* A unit is 1 MiB of the file. Entry i belongs to chunk i / (chunk_ratio + 1); the last of each chunk is its
 * sector bitmap's, of 1 unit, the others are payload blocks, of block_units. chunk_ratio, block_units > 0. */
struct hvr_bat_rules {
    uint64_t chunk_ratio;
    uint64_t block_count; /* payload blocks of the disk */
    uint64_t block_units;
    uint64_t file_units; /* whole units in the file */
    uint64_t list_max;   /* findings to list for each fault */
    int has_parent;
};

struct hvr_bat_finding {
    uint64_t index;
    uint64_t entry;
    uint64_t fault;
};

/* The state of a walk. Before its first window the caller zeroes `states`, `faults`, `bitmap_blocks` and
 * finding_count, sets partial_index to 2^64 - 1, and sets the bits of units that no block may have.
 * claims: bit per unit, of blocks; anchors: of UNDEFINED and UNMAPPED entries that keep a place. Both have
 * bitmap_bytes. findings: room for `capacity` rows; HVR_BAT_FAULT_COUNT * list_max always suffice, and where
 * they do not the rest is left out. */
struct hvr_bat_walk {
    uint8_t *claims;
    uint8_t *anchors;
    size_t bitmap_bytes;
    struct hvr_bat_finding *findings;
    size_t capacity;
    size_t finding_count;
    uint64_t states[8]; /* payload blocks by state */
    uint64_t faults[8]; /* found, by fault, listed or not */
    uint64_t bitmap_blocks;
    uint64_t partial_index; /* a block that waits for its chunk's bitmap entry */
};

/* Judge entries[0 .. count), which are those from `first` of the table on. Windows come in order; entries
 * between them are 0. A last call with count 0 and first behind the table ends the walk. HVR_LENGTH, and
 * nothing done, unless the bitmaps have a bit for each unit. */
int hvr_bat_check(const uint64_t *entries, size_t count, uint64_t first, const struct hvr_bat_rules *rules,
                  struct hvr_bat_walk *walk);

/* ---- payload: the bytes of a disk through its block map ---- */

/* Guest block b is entries[b + b / chunk_ratio], or entries[b] where chunk_ratio is 0. Its state is entry & 7
 * ([MS-VHDX] 2.5.1.1): in state 6 it is present, and stands at file offset entry & offset_mask; in state 7 it
 * has that place too, which is written, and is read as absent, because only a sector bitmap knows what of it
 * counts. block_bytes > 0. A NULL map stands for a raw file: file offset = disk offset. */
struct hvr_block_map {
    const uint64_t *entries;
    size_t entry_count;
    uint64_t block_bytes;
    uint64_t chunk_ratio;
    uint64_t offset_mask;
};

/* Where a payload function stopped. offset: in the file whose descriptor is named by `file` (0 target, 1
 * source) for -errno and HVR_TRUNCATED (the first byte that is not there); else unused. index: the block for
 * HVR_ABSENT and HVR_OUT_OF_RANGE. */
struct hvr_place {
    uint64_t offset;
    uint64_t index;
    int file;
};

/* Fill out[0 .. length) with the bytes of the extents, one after another; absent blocks read as zeros. Ranges
 * that follow each other in the file are read with one call. HVR_LENGTH unless the extents add up to
 * `length`. out is undefined after a failure. */
int hvr_read_extents(int descriptor, const struct hvr_block_map *map, const uint64_t *extents, size_t count,
                     uint8_t *out, size_t length, struct hvr_place *place);

/* Write data[0 .. length) to the extents, one after another, in this order. HVR_LENGTH, HVR_OUT_OF_RANGE and
 * HVR_ABSENT are found before anything is written. */
int hvr_write_extents(int descriptor, const struct hvr_block_map *map, const uint64_t *extents, size_t count,
                      const uint8_t *data, size_t length, struct hvr_place *place);

/* Pieces are rows of three 64-bit numbers, (file offset, length, buffer offset), all in bytes.
 *
 * For each piece fill out[buffer offset .. + length) from the file, or with zeros where the file offset is
 * 2^64 - 1. Pieces that follow each other in file and buffer are read with one call. HVR_OUT_OF_RANGE with
 * place->index = row, before anything is read, for a piece beyond out[0 .. length) or 63 bits; HVR_TRUNCATED.
 */
int hvr_read_pieces(int descriptor, const uint64_t *pieces, size_t count, uint8_t *out, size_t length,
                    struct hvr_place *place);

/* Copy source[source_offsets[i] .. + length of extent i) to extent i, in this order. Both files are distinct.
 * The window is filled with as many pieces as it holds, read in order of their source offset, neighbours
 * together; what follows each other in the target is written together. HVR_LENGTH if window_length is 0;
 * HVR_OUT_OF_RANGE and HVR_ABSENT are found before anything is written, HVR_TRUNCATED and -errno when they
 * are met. */
int hvr_copy_extents(int source, const uint64_t *source_offsets, int descriptor,
                     const struct hvr_block_map *map, const uint64_t *extents, size_t count, uint8_t *window,
                     size_t window_length, struct hvr_place *place);

/* ---- live tracking: what guests write, by epochs that end with cuts ----
 *
 * The structures below are shared by threads and changed with atomic operations; the caller gives them zeroed
 * memory, 8-byte aligned, and leaves their fields alone while a function may use them, but for reads of
 * counters.
 *
 * A grain is 64 KiB of the guest's disk, a region 4 MiB. Bitmaps of grains have map_bytes, those of regions
 * region_bytes, both multiples of 8.
 */

enum { HVR_GRAIN_BYTES = 65536, HVR_REGION_BYTES = 4194304 };

/* Who may touch what now. stripes: bit i is held while a grain whose number is i modulo 64 is written, all of
 * them while the gate is closed. A closing gate lets nobody in. Reads hold no stripe; they are counted, and
 * kept away where barred. */
struct hvr_gate {
    uint64_t stripes;
    uint32_t closing;
    uint32_t readers;
    uint32_t barred;
    uint32_t padding;
};

/* Wait for the stripes of `mask` and take them; leave gives them back. */
void hvr_gate_enter(struct hvr_gate *gate, uint64_t mask);
void hvr_gate_leave(struct hvr_gate *gate, uint64_t mask);

/* Take all stripes, before whoever waits for some, and with bar_readers != 0 wait until no read is on its
 * way; one thread at a time. Open gives all back. */
void hvr_gate_close(struct hvr_gate *gate, int bar_readers);
void hvr_gate_open(struct hvr_gate *gate);

/* Count a read in, once readers are not barred, and out. */
void hvr_read_enter(struct hvr_gate *gate);
void hvr_read_leave(struct hvr_gate *gate);

/* Return the stripes of the grains of a range. */
uint64_t hvr_stripes(uint64_t disk_offset, uint64_t length);

enum hvr_log_state {
    HVR_LOG_OFF = 0,   /* nothing is logged */
    HVR_LOG_OPEN = 1,
    HVR_LOG_FULL = 2,  /* the next write would have gone beyond `limit` */
    HVR_LOG_FAILED = 3 /* a write to the log failed with errno `error` */
};

/* A moment of a log: `entries` were in it before. time_us: Unix time in microseconds. */
struct hvr_mark {
    uint64_t entries;
    uint64_t time_us;
};

/* Marks with at most one for each slot of time, slot k being [k * slot_us, (k + 1) * slot_us). When all
 * `capacity` rows, 0 or at least 4, are taken, slots become longer, 2 and 5 times in turn, so that each lies in
 * one of the next length: 1, 2, 10, 20, 100 and so on. next_us: where the slot of the newest row ends. */
struct hvr_marks {
    struct hvr_mark *rows;
    uint64_t count;
    uint64_t capacity;
    uint64_t slot_us;
    uint64_t next_us;
};

/* An .hrl that grows, [MS-HRL]. position: where the next byte belongs. last_block: of the newest metadata
 * block. pending: the metadata block that grows, 4096 bytes, with pending_count entries behind room for its
 * header. A log that is not OPEN is not touched any more.
 *
 * ticks: for each slot in which an entry came the moment of its first one; nothing where capacity is 0, and
 * then nothing is noted of time. flushes: for each slot the last moment in which a guest asked for a flush.
 * Moments of a log never go back: last_us is the newest, and clock_back is set once the clock was before it. */
struct hvr_log {
    int descriptor;
    int state;
    int error;
    uint32_t lock;
    uint8_t *pending;
    uint64_t pending_count;
    uint64_t position;
    uint64_t last_block;
    uint64_t limit;
    uint64_t write_bytes_max; /* longer writes are not logged */
    uint64_t blocks;
    uint64_t entries;
    uint64_t data_bytes;
    struct hvr_marks ticks;
    struct hvr_marks flushes;
    uint64_t last_us;
    uint64_t flushed_us;
    uint64_t clock_back;
};

/* What was written since a cut. dirty: grains. unlogged: those of them of which the log does not have the last
 * content. logged: those of which it has any. touched: regions. ended_us: when the cut was, Unix time. */
struct hvr_epoch {
    uint8_t *dirty;
    uint8_t *unlogged;
    uint8_t *logged;
    uint8_t *touched;
    uint64_t ended_us;
    struct hvr_log log;
};

/* One disk. armed: regions that may be written, because that is durably known. guard: NULL, or grains that
 * the last cut has still to read. written: set by each write, taken by whoever flushes. */
struct hvr_track {
    struct hvr_gate *gate;
    struct hvr_epoch *epoch;
    uint8_t *armed;
    uint8_t *guard;
    uint64_t map_bytes;
    uint64_t region_bytes;
    uint64_t written;
    uint64_t writes;
    uint64_t written_bytes;
};

enum hvr_track_status {
    HVR_TRACK_READY = 0,  
    HVR_TRACK_ARM = 1,    /* a region of the range is not armed */
    HVR_TRACK_GUARDED = 2 /* the last cut has to read a grain of it first */
};

/* Say whether a range, which lies in the disk, may be written now. The caller holds its stripes, and goes on
 * holding them until the write is in the disk. */
int hvr_track_check(const struct hvr_track *track, uint64_t disk_offset, uint64_t length);

/* Note a range as written: dirty, touched, and logged or unlogged. The
 * caller holds any stripe. HVR_OUT_OF_RANGE, and nothing noted, for a range beyond the disk. */
int hvr_track_mark(struct hvr_track *track, uint64_t disk_offset, uint64_t length, int logged);

/* Return whether anything was written since the last call. */
int hvr_track_take_written(struct hvr_track *track);

/* Note a write that comes next and log its data, or note it as unlogged. time_stamp: as in a log; where the
 * log notes moments, its entries are stamped with the second of theirs. The caller holds its stripes. */
void hvr_track_write(struct hvr_track *track, int variant, uint64_t disk_offset, const uint8_t *data,
                     uint64_t length, uint32_t time_stamp);

/* Note in the log of each track that a guest asks for a flush now: one moment, between the same writes in all
 * of them. Nothing where none has an entry more than at the last one. The caller holds no stripe; tracks stand
 * in the same order in every call, and share the gate. */
void hvr_note_flush(struct hvr_gate *gate, struct hvr_track **tracks, size_t count);

/* End the epoch of each track and begin next[i], all behind one closed gate: one instant. The old epoch's
 * `unlogged` becomes the guard, with all that is dirty in it where its log has failed; armed regions that it did
 * not touch are disarmed, and noted in disarmed[i] (region_bytes, zeroed by the caller). *held_ns: for how long
 * writes were kept away. */
void hvr_cut(struct hvr_gate *gate, struct hvr_track **tracks, struct hvr_epoch **next, uint8_t **disarmed,
             size_t count, uint64_t *held_ns);

/* bitmap |= other, atomically, in the regions that are set in `touched`. Both are bitmaps of grains. */
void hvr_grains_merge(uint8_t *bitmap, const uint8_t *other, const uint8_t *touched, size_t region_bytes);

/* Clear the bits of a range of grains, atomically. */
void hvr_grains_clear(uint8_t *bitmap, uint64_t first, uint64_t count);

/* ---- what stands under a disk ---- */

/* A disk of which extents are known to be elsewhere. Row i says that the bytes from starts[i] up to ends[i]
 * stand at file_offsets[i] of descriptors[i], a file that does not change; or are zeros where that descriptor is
 * -1; or are where only the caller can read them where it is -2. Rows are sorted, disjoint and not empty. What no row
 * covers is read from `descriptor` through `map`. counter: NULL where that file does not change either; else
 * whoever changes it adds to *counter before the first byte, and what was read of it counts only where *counter
 * is still `applied` afterwards. */
struct hvr_under {
    const uint64_t *starts;
    const uint64_t *ends;
    const uint64_t *file_offsets;
    const int32_t *descriptors;
    size_t count;
    int descriptor;
    const struct hvr_block_map *map;
    const uint64_t *counter;
    uint64_t applied;
};

/* Fill out[0 .. length). HVR_STALE where rows and map must be made anew; HVR_ELSEWHERE where a row says so;
 * HVR_ABSENT for a block in state 7; HVR_OUT_OF_RANGE, HVR_TRUNCATED or -errno. out is undefined unless HVR_OK. */
int hvr_under_read(const struct hvr_under *under, uint64_t disk_offset, uint8_t *out, uint64_t length);

/* ---- the transmission phase of NBD ---- */

/* A disk as it is exported. A block in state 6 of `map` is served here; without has_parent all others but
 * state 7 read as zeros here. Where a connection has an `under`, that has what a block in state 0 has not.
 * descriptor: negative for a disk of which nothing stands anywhere but under it. map: NULL for a raw file.
 * track: NULL where nothing is tracked. */
struct hvr_nbd_export {
    int descriptor;
    int read_only;
    int has_parent;
    int variant;
    uint64_t virtual_bytes;
    const struct hvr_block_map *map;
    struct hvr_gate *gate;
    struct hvr_track *track;
};

enum hvr_nbd_event {
    HVR_NBD_CLOSED = 0,  /* the client said goodbye, or closed between requests */
    HVR_NBD_BROKEN = 1,  /* it closed inside of a request, or sent no request: see `error`, errno or 0 */
    HVR_NBD_COMMAND = 2, /* the request is the caller's: it answers it */
    HVR_NBD_PIECE = 3,   /* a piece of a write cannot be done here: see `reason` */
    HVR_NBD_FLUSH = 4,   /* a write with FUA is done but for the flush; the caller flushes and answers it */
    HVR_NBD_REFRESH = 5, /* `under` is stale: the caller gives a new one, and the read is done again */
    HVR_NBD_FILL = 6     /* a part of a read is the caller's: it fills output[0 .. piece_bytes) */
};

enum hvr_nbd_reason {
    HVR_NBD_ARM = 1,     /* HVR_TRACK_ARM */
    HVR_NBD_GUARDED = 2, /* HVR_TRACK_GUARDED */
    HVR_NBD_PLACE = 3    /* a block has no place, or only part of it counts */
};

/* One connection, of one thread. under: NULL, or what the disk has under it, changed by the caller between
 * two calls only. input, output: buffers of at least 1 MiB. spin_ns: how long to look for the
 * next request before the thread sleeps. Below `type` is the request that an event speaks of, as it came;
 * cookie in the client's bytes. done: bytes of its payload before the piece. failed: 0, or the NBD error that
 * it will be answered with. phase: for hvr_nbd_serve() alone. */
struct hvr_nbd {
    const struct hvr_nbd_export *exported;
    const struct hvr_under *under;
    int descriptor;
    int structured;
    uint64_t spin_ns;
    uint8_t *input;
    uint64_t input_bytes;
    uint64_t input_start;
    uint64_t input_end;
    uint8_t *output;
    uint64_t output_bytes;
    uint64_t output_end;
    int error;
    int reason;
    uint32_t failed;
    uint16_t flags;
    uint16_t type;
    uint64_t cookie;
    uint64_t offset;
    uint64_t length;
    uint64_t done;
    uint8_t *piece;
    uint64_t piece_bytes;
    uint32_t phase;
    uint32_t padding;
    uint64_t requests;
};

/* Serve until something is not for this function: an enum hvr_nbd_event. Replies to all earlier requests were
 * sent by then. After COMMAND and FLUSH call again once the reply is sent. After PIECE call again with
 * written = 0 where the reason is gone, so that it is done here, or with written = 1 once the caller has done
 * it, `failed` set if that failed. After FILL call again once the bytes from `offset` + `done` on are in output;
 * where they cannot be read, no more can be told to the client. */
int hvr_nbd_serve(struct hvr_nbd *connection, int written);

/* Send all of buf; the caller's thread is the connection's. Returns 0 or errno. */
int hvr_nbd_send(struct hvr_nbd *connection, const uint8_t *buf, size_t length);

#endif
