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

#endif
