/* What the variants of the kernels share; not visible outside of the library. */
#ifndef HVR_KERNELS_H
#define HVR_KERNELS_H

#include "hvr.h"

#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels read little-endian words in place; a big-endian port needs its own loads"
#endif

/* One implementation of each inner loop. Contracts are those of the public functions of the same name in
 * hvr.h. */
struct hvr_kernels {
    uint32_t (*crc32c)(const uint8_t *buf, size_t length,
                       uint32_t state); /* state: without the two inversions */
    uint32_t (*byte_sum)(const uint8_t *buf, size_t length);
    size_t (*zero_prefix)(const uint8_t *buf, size_t length);
    size_t (*equal_prefix)(const uint8_t *a, const uint8_t *b, size_t length);
    void (*xxh3_accumulate)(uint64_t *lanes, const uint8_t *buf, size_t length); /* length > 240 */
    uint64_t (*bitmap_count)(const uint8_t *bitmap, size_t length);
    void (*bitmap_merge)(uint8_t *target, const uint8_t *other, size_t length);
};

extern const struct hvr_kernels hvr_scalar_kernels;
#if defined(__x86_64__)
extern const struct hvr_kernels hvr_avx2_kernels;
extern const struct hvr_kernels hvr_avx512_kernels;
uint32_t hvr_crc32c_sse42(const uint8_t *buf, size_t length, uint32_t state);
uint64_t hvr_bitmap_count_popcnt(const uint8_t *bitmap, size_t length);
#elif defined(__aarch64__)
extern const struct hvr_kernels hvr_neon_kernels;
#endif

/* Never NULL: an unknown or unavailable variant gives the scalar kernels. */
const struct hvr_kernels *hvr_kernels_of(int variant);

/* XXH3's default secret and geometry, for the variants of its long loop. */
enum {
    XXH3_SECRET_BYTES = 192,
    XXH3_STRIPE_BYTES = 64,
    XXH3_SECRET_STEP_BYTES = 8,
    XXH3_STRIPES_PER_BLOCK = (XXH3_SECRET_BYTES - XXH3_STRIPE_BYTES) / XXH3_SECRET_STEP_BYTES,
    XXH3_BLOCK_BYTES = XXH3_STRIPES_PER_BLOCK * XXH3_STRIPE_BYTES,
    XXH3_SCRAMBLE_AT = XXH3_SECRET_BYTES - XXH3_STRIPE_BYTES,
    XXH3_LAST_STRIPE_AT = XXH3_SECRET_BYTES - XXH3_STRIPE_BYTES - 7
};
#define XXH_PRIME32_1 0x9E3779B1u
extern const uint8_t hvr_xxh3_secret[XXH3_SECRET_BYTES];

/* XXH3's lanes form one chain of additions, too long for the processor to look far enough ahead by itself. An
 * integer, because the place may lie behind the buffer: a prefetch of it does nothing. */
enum { XXH3_AHEAD_BYTES = 2048 };
static inline void prefetch_ahead(const uint8_t *at)
{
    __builtin_prefetch((const void *)((uintptr_t)at + XXH3_AHEAD_BYTES));
}

static inline uint32_t load32(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline void store32(uint8_t *at, uint32_t word)
{
    memcpy(at, &word, sizeof word);
}

static inline void store64(uint8_t *at, uint64_t word)
{
    memcpy(at, &word, sizeof word);
}

static inline size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* The tails of the vector loops: exact, and short enough that a plain loop is fine. */
static inline size_t zero_prefix_tail(const uint8_t *buf, size_t at, size_t length)
{
    while (length - at >= 8 && load64(buf + at) == 0) {
        at += 8;
    }
    while (at < length && buf[at] == 0) {
        at += 1;
    }
    return at;
}

static inline size_t equal_prefix_tail(const uint8_t *a, const uint8_t *b, size_t at, size_t length)
{
    while (length - at >= 8 && load64(a + at) == load64(b + at)) {
        at += 8;
    }
    while (at < length && a[at] == b[at]) {
        at += 1;
    }
    return at;
}

static inline uint32_t byte_sum_tail(const uint8_t *buf, size_t at, size_t length)
{
    uint32_t sum = 0;
    for (; at < length; at += 1) {
        sum += buf[at];
    }
    return sum;
}

#define BAT_STATE_MASK 7u
#define BAT_FULLY_PRESENT 6u     /* [MS-VHDX] 2.5.1.1 */
#define BAT_PARTIALLY_PRESENT 7u /* to be written, not to be read */

/* The part of an extent that lies in one block; one block holds all of a raw file. */
struct piece {
    uint64_t file_offset;
    uint64_t length;
    int present;
    int has_place;
};

/* Finds the piece at disk_offset. HVR_OUT_OF_RANGE with place->index where the map or 63 bits end before it.
 */
static inline int hvr_piece_at(const struct hvr_block_map *map, uint64_t disk_offset, uint64_t length,
                    struct piece *piece, struct hvr_place *place)
{
    place->index = 0;
    if (disk_offset > INT64_MAX || length > INT64_MAX - disk_offset) {
        return HVR_OUT_OF_RANGE;
    }
    if (map == NULL) {
        *piece = (struct piece){disk_offset, length, 1, 1};
        return HVR_OK;
    }
    uint64_t block = disk_offset / map->block_bytes;
    uint64_t block_offset = disk_offset % map->block_bytes;
    uint64_t entry_index = block + (map->chunk_ratio > 0 ? block / map->chunk_ratio : 0);
    place->index = block;
    if (entry_index >= map->entry_count) {
        return HVR_OUT_OF_RANGE;
    }
    uint64_t entry = map->entries[entry_index];
    uint64_t block_place = entry & map->offset_mask;
    uint64_t room = map->block_bytes - block_offset;
    piece->length = length < room ? length : room;
    piece->present = (entry & BAT_STATE_MASK) == BAT_FULLY_PRESENT;
    piece->has_place = piece->present || (entry & BAT_STATE_MASK) == BAT_PARTIALLY_PRESENT;
    piece->file_offset = block_place + block_offset;
    if (!piece->has_place) {
        return HVR_OK;
    }
    int beyond = block_place > INT64_MAX || block_offset > INT64_MAX - block_place
                 || piece->length > INT64_MAX - piece->file_offset;
    return beyond ? HVR_OUT_OF_RANGE : HVR_OK;
}

/* A write of a guest. */
struct hvr_write {
    uint64_t disk_offset;
    uint64_t length;
    const uint8_t *data;
};
enum { HVR_WRITES_MAX = 32 };

/* As hvr_track_write, for `count` writes, HVR_WRITES_MAX at most, that are logged together. */
void hvr_track_writes(struct hvr_track *track, int variant, const struct hvr_write *writes, size_t count,
                      uint32_t time_stamp);

/* As hvr_track_write, for a piece of a write that is `whole` bytes long: that decides whether it is logged. */
void hvr_track_stream(struct hvr_track *track, int variant, const struct hvr_write *write, uint64_t whole,
                      uint32_t time_stamp);

/* Return what [MS-HRL] puts into a time stamp now. */
uint32_t hvr_time_stamp(void);

#endif
