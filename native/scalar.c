/* The kernels in plain C11: for every machine, and the yardstick of the vector variants. */
#include "kernels.h"

/* Slicing-by-8. CRC is linear, so TABLE[k][i] is the sum of the entries of i's bits; a row is written as
 * those eight. */
#define BIT(i, b, entry) ((((i) >> (b)) & 1u) ? (entry) : 0u)
#define SUM(i, e0, e1, e2, e3, e4, e5, e6, e7)                                                     \
    (BIT(i, 0, e0) ^ BIT(i, 1, e1) ^ BIT(i, 2, e2) ^ BIT(i, 3, e3) ^ BIT(i, 4, e4) ^ BIT(i, 5, e5) \
     ^ BIT(i, 6, e6) ^ BIT(i, 7, e7))
#define ROW4(i, ...) \
    SUM((i), __VA_ARGS__), SUM((i) + 1, __VA_ARGS__), SUM((i) + 2, __VA_ARGS__), SUM((i) + 3, __VA_ARGS__)
#define ROW16(i, ...)                                                               \
    ROW4((i), __VA_ARGS__), ROW4((i) + 4, __VA_ARGS__), ROW4((i) + 8, __VA_ARGS__), \
        ROW4((i) + 12, __VA_ARGS__)
#define ROW64(i, ...)                                                                    \
    ROW16((i), __VA_ARGS__), ROW16((i) + 16, __VA_ARGS__), ROW16((i) + 32, __VA_ARGS__), \
        ROW16((i) + 48, __VA_ARGS__)
#define ROW256(...)                                                                                         \
    {                                                                                                       \
        ROW64(0u, __VA_ARGS__), ROW64(64u, __VA_ARGS__), ROW64(128u, __VA_ARGS__), ROW64(192u, __VA_ARGS__) \
    }

static const uint32_t CRC32C_TABLE[8][256] = {
    ROW256(0xf26b8303u, 0xe13b70f7u, 0xc79a971fu, 0x8ad958cfu, 0x105ec76fu, 0x20bd8edeu, 0x417b1dbcu,
           0x82f63b78u),
    ROW256(0x13a29877u, 0x274530eeu, 0x4e8a61dcu, 0x9d14c3b8u, 0x3fc5f181u, 0x7f8be302u, 0xff17c604u,
           0xfbc3faf9u),
    ROW256(0xa541927eu, 0x4f6f520du, 0x9edea41au, 0x38513ec5u, 0x70a27d8au, 0xe144fb14u, 0xc76580d9u,
           0x8b277743u),
    ROW256(0xdd45aab8u, 0xbf672381u, 0x7b2231f3u, 0xf64463e6u, 0xe964b13du, 0xd725148bu, 0xaba65fe7u,
           0x52a0c93fu),
    ROW256(0x38116facu, 0x7022df58u, 0xe045beb0u, 0xc5670b91u, 0x8f2261d3u, 0x1ba8b557u, 0x37516aaeu,
           0x6ea2d55cu),
    ROW256(0xef306b19u, 0xdb8ca0c3u, 0xb2f53777u, 0x6006181fu, 0xc00c303eu, 0x85f4168du, 0x0e045bebu,
           0x1c08b7d6u),
    ROW256(0x68032cc8u, 0xd0065990u, 0xa5e0c5d1u, 0x4e2dfd53u, 0x9c5bfaa6u, 0x3d5b83bdu, 0x7ab7077au,
           0xf56e0ef4u),
    ROW256(0x493c7d27u, 0x9278fa4eu, 0x211d826du, 0x423b04dau, 0x847609b4u, 0x0d006599u, 0x1a00cb32u,
           0x34019664u),
};

static uint32_t crc32c(const uint8_t *buf, size_t length, uint32_t state)
{
    size_t at = 0;
    for (; length - at >= 8; at += 8) {
        uint64_t word = load64(buf + at) ^ state;
        state = CRC32C_TABLE[7][word & 0xff] ^ CRC32C_TABLE[6][(word >> 8) & 0xff]
                ^ CRC32C_TABLE[5][(word >> 16) & 0xff] ^ CRC32C_TABLE[4][(word >> 24) & 0xff]
                ^ CRC32C_TABLE[3][(word >> 32) & 0xff] ^ CRC32C_TABLE[2][(word >> 40) & 0xff]
                ^ CRC32C_TABLE[1][(word >> 48) & 0xff] ^ CRC32C_TABLE[0][word >> 56];
    }
    for (; at < length; at += 1) {
        state = CRC32C_TABLE[0][(state ^ buf[at]) & 0xff] ^ (state >> 8);
    }
    return state;
}

/* Four 16-bit lanes take two bytes of a word each, at most 510 a step, so 128 steps cannot carry from lane to
 * lane. */
static uint32_t byte_sum(const uint8_t *buf, size_t length)
{
    const uint64_t even_bytes = 0x00ff00ff00ff00ffu;
    const uint64_t even_lanes = 0x0000ffff0000ffffu;
    uint64_t sum = 0;
    size_t at = 0;
    while (length - at >= 8) {
        size_t end = at + smaller((length - at) / 8, 128) * 8;
        uint64_t lanes = 0;
        for (; at < end; at += 8) {
            uint64_t word = load64(buf + at);
            lanes += (word & even_bytes) + ((word >> 8) & even_bytes);
        }
        lanes = (lanes & even_lanes) + ((lanes >> 16) & even_lanes);
        sum += (lanes & 0xffffffffu) + (lanes >> 32);
    }
    return (uint32_t)sum + byte_sum_tail(buf, at, length);
}

static size_t zero_prefix(const uint8_t *buf, size_t length)
{
    size_t at = 0;
    while (length - at >= 32
           && (load64(buf + at) | load64(buf + at + 8) | load64(buf + at + 16) | load64(buf + at + 24))
                  == 0) {
        at += 32;
    }
    return zero_prefix_tail(buf, at, length);
}

static size_t equal_prefix(const uint8_t *a, const uint8_t *b, size_t length)
{
    size_t at = 0;
    while (length - at >= 32
           && ((load64(a + at) ^ load64(b + at)) | (load64(a + at + 8) ^ load64(b + at + 8))
               | (load64(a + at + 16) ^ load64(b + at + 16)) | (load64(a + at + 24) ^ load64(b + at + 24)))
                  == 0) {
        at += 32;
    }
    return equal_prefix_tail(a, b, at, length);
}

static void xxh3_stripe(uint64_t *lanes, const uint8_t *stripe, const uint8_t *secret)
{
    for (size_t lane = 0; lane < 8; lane += 1) {
        uint64_t value = load64(stripe + 8 * lane);
        uint64_t keyed = value ^ load64(secret + 8 * lane);
        lanes[lane ^ 1] += value;
        lanes[lane] += (keyed & 0xffffffffu) * (keyed >> 32);
    }
}

static void xxh3_stripes(uint64_t *lanes, const uint8_t *buf, size_t stripe_count)
{
    for (size_t stripe = 0; stripe < stripe_count; stripe += 1) {
        xxh3_stripe(lanes, buf + stripe * XXH3_STRIPE_BYTES,
                    hvr_xxh3_secret + stripe * XXH3_SECRET_STEP_BYTES);
    }
}

static void xxh3_accumulate(uint64_t *lanes, const uint8_t *buf, size_t length)
{
    size_t block_count = (length - 1) / XXH3_BLOCK_BYTES;
    const uint8_t *at = buf;
    for (size_t block = 0; block < block_count; block += 1, at += XXH3_BLOCK_BYTES) {
        xxh3_stripes(lanes, at, XXH3_STRIPES_PER_BLOCK);
        for (size_t lane = 0; lane < 8; lane += 1) {
            uint64_t key = load64(hvr_xxh3_secret + XXH3_SCRAMBLE_AT + 8 * lane);
            lanes[lane] = (lanes[lane] ^ (lanes[lane] >> 47) ^ key) * XXH_PRIME32_1;
        }
    }
    xxh3_stripes(lanes, at, (length - 1 - block_count * XXH3_BLOCK_BYTES) / XXH3_STRIPE_BYTES);
    xxh3_stripe(lanes, buf + length - XXH3_STRIPE_BYTES, hvr_xxh3_secret + XXH3_LAST_STRIPE_AT);
}

static uint64_t bitmap_count(const uint8_t *bitmap, size_t length)
{
    uint64_t count = 0;
    size_t at = 0;
    for (; length - at >= 8; at += 8) {
        count += (uint64_t)__builtin_popcountll(load64(bitmap + at));
    }
    for (; at < length; at += 1) {
        count += (uint64_t)__builtin_popcount(bitmap[at]);
    }
    return count;
}

static void bitmap_merge(uint8_t *target, const uint8_t *other, size_t length)
{
    size_t at = 0;
    for (; length - at >= 8; at += 8) {
        store64(target + at, load64(target + at) | load64(other + at));
    }
    for (; at < length; at += 1) {
        target[at] = (uint8_t)(target[at] | other[at]);
    }
}

const struct hvr_kernels hvr_scalar_kernels = {
    .crc32c = crc32c,
    .byte_sum = byte_sum,
    .zero_prefix = zero_prefix,
    .equal_prefix = equal_prefix,
    .xxh3_accumulate = xxh3_accumulate,
    .bitmap_count = bitmap_count,
    .bitmap_merge = bitmap_merge,
};
