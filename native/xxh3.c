/* XXH3 with 128 bits, seed 0 and the default secret, from the algorithm's public description; the long loop
 * is a kernel. And what is made of it: the fingerprints of blocks, the digest of a disk's pages. */
#include "kernels.h"

#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u
#define PRIME_MX2 0x9FB21C651E98DF25u

const uint8_t hvr_xxh3_secret[XXH3_SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

struct half_pair {
    uint64_t low;
    uint64_t high;
};

__extension__ typedef unsigned __int128 product_t;

static struct half_pair multiply(uint64_t a, uint64_t b)
{
    product_t product = (product_t)a * b;
    return (struct half_pair){(uint64_t)product, (uint64_t)(product >> 64)};
}

static uint64_t multiply_folded(uint64_t a, uint64_t b)
{
    struct half_pair product = multiply(a, b);
    return product.low ^ product.high;
}

static uint64_t key64(size_t at)
{
    return load64(hvr_xxh3_secret + at);
}

static uint64_t avalanche(uint64_t hash)
{
    hash ^= hash >> 37;
    hash *= PRIME_MX1;
    return hash ^ (hash >> 32);
}

static uint64_t avalanche_xxh64(uint64_t hash)
{
    hash ^= hash >> 33;
    hash *= PRIME64_2;
    hash ^= hash >> 29;
    hash *= PRIME64_3;
    return hash ^ (hash >> 32);
}

static struct half_pair hash_1_to_3(const uint8_t *buf, size_t length)
{
    uint32_t low = ((uint32_t)buf[0] << 16) | ((uint32_t)buf[length >> 1] << 24) | buf[length - 1]
                   | ((uint32_t)length << 8);
    uint32_t swapped = __builtin_bswap32(low);
    uint32_t high = (swapped << 13) | (swapped >> 19);
    uint64_t flip_low = load32(hvr_xxh3_secret) ^ load32(hvr_xxh3_secret + 4);
    uint64_t flip_high = load32(hvr_xxh3_secret + 8) ^ load32(hvr_xxh3_secret + 12);
    return (struct half_pair){avalanche_xxh64(low ^ flip_low), avalanche_xxh64(high ^ flip_high)};
}

static struct half_pair hash_4_to_8(const uint8_t *buf, size_t length)
{
    uint64_t input = load32(buf) + ((uint64_t)load32(buf + length - 4) << 32);
    struct half_pair hash = multiply(input ^ key64(16) ^ key64(24), PRIME64_1 + ((uint64_t)length << 2));
    hash.high += hash.low << 1;
    hash.low ^= hash.high >> 3;
    hash.low ^= hash.low >> 35;
    hash.low *= PRIME_MX2;
    hash.low ^= hash.low >> 28;
    hash.high = avalanche(hash.high);
    return hash;
}

static struct half_pair hash_9_to_16(const uint8_t *buf, size_t length)
{
    uint64_t high = load64(buf + length - 8);
    struct half_pair middle = multiply(load64(buf) ^ high ^ key64(32) ^ key64(40), PRIME64_1);
    middle.low += (uint64_t)(length - 1) << 54;
    high ^= key64(48) ^ key64(56);
    middle.high += high + (high & 0xffffffffu) * (PRIME32_2 - 1);
    middle.low ^= __builtin_bswap64(middle.high);
    struct half_pair hash = multiply(middle.low, PRIME64_2);
    hash.high += middle.high * PRIME64_2;
    return (struct half_pair){avalanche(hash.low), avalanche(hash.high)};
}

static uint64_t mix_16(const uint8_t *buf, size_t secret_at)
{
    return multiply_folded(load64(buf) ^ key64(secret_at), load64(buf + 8) ^ key64(secret_at + 8));
}

static void mix_32(struct half_pair *hash, const uint8_t *first, const uint8_t *second, size_t secret_at)
{
    hash->low += mix_16(first, secret_at);
    hash->low ^= load64(second) + load64(second + 8);
    hash->high += mix_16(second, secret_at + 16);
    hash->high ^= load64(first) + load64(first + 8);
}

static struct half_pair finish_middle(struct half_pair hash, size_t length)
{
    uint64_t low = hash.low + hash.high;
    uint64_t high = hash.low * PRIME64_1 + hash.high * PRIME64_4 + (uint64_t)length * PRIME64_2;
    return (struct half_pair){avalanche(low), 0 - avalanche(high)};
}

static struct half_pair hash_17_to_128(const uint8_t *buf, size_t length)
{
    struct half_pair hash = {(uint64_t)length * PRIME64_1, 0};
    for (size_t pair = (length - 1) / 32 + 1; pair-- > 0;) {
        mix_32(&hash, buf + 16 * pair, buf + length - 16 * (pair + 1), 32 * pair);
    }
    return finish_middle(hash, length);
}

static struct half_pair hash_129_to_240(const uint8_t *buf, size_t length)
{
    struct half_pair hash = {(uint64_t)length * PRIME64_1, 0};
    for (size_t at = 0; at < 128; at += 32) {
        mix_32(&hash, buf + at, buf + at + 16, at);
    }
    hash.low = avalanche(hash.low);
    hash.high = avalanche(hash.high);
    for (size_t at = 128; at + 32 <= length; at += 32) {
        mix_32(&hash, buf + at, buf + at + 16, at - 128 + 3);
    }
    mix_32(&hash, buf + length - 16, buf + length - 32, 136 - 17 - 16);
    return finish_middle(hash, length);
}

static uint64_t merge_lanes(const uint64_t *lanes, size_t secret_at, uint64_t start)
{
    for (size_t lane = 0; lane < 8; lane += 2) {
        start += multiply_folded(lanes[lane] ^ key64(secret_at + 8 * lane),
                                 lanes[lane + 1] ^ key64(secret_at + 8 * lane + 8));
    }
    return avalanche(start);
}

static struct half_pair hash_long(const struct hvr_kernels *kernels, const uint8_t *buf, size_t length)
{
    uint64_t lanes[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                         PRIME64_4, PRIME32_2, PRIME64_5, XXH_PRIME32_1};
    kernels->xxh3_accumulate(lanes, buf, length);
    return (struct half_pair){
        merge_lanes(lanes, 11, (uint64_t)length * PRIME64_1),
        merge_lanes(lanes, XXH3_SECRET_BYTES - XXH3_STRIPE_BYTES - 11, ~((uint64_t)length * PRIME64_2)),
    };
}

static struct half_pair hash_of(const struct hvr_kernels *kernels, const uint8_t *buf, size_t length)
{
    if (length > 240) {
        return hash_long(kernels, buf, length);
    }
    if (length > 128) {
        return hash_129_to_240(buf, length);
    }
    if (length > 16) {
        return hash_17_to_128(buf, length);
    }
    if (length > 8) {
        return hash_9_to_16(buf, length);
    }
    if (length >= 4) {
        return hash_4_to_8(buf, length);
    }
    if (length > 0) {
        return hash_1_to_3(buf, length);
    }
    return (struct half_pair){avalanche_xxh64(key64(64) ^ key64(72)), avalanche_xxh64(key64(80) ^ key64(88))};
}

static int is_zero(const struct hvr_kernels *kernels, const uint8_t *buf, size_t length)
{
    return kernels->zero_prefix(buf, length) == length;
}

static void digest_of(const struct hvr_kernels *kernels, const uint8_t *buf, size_t length, uint8_t *digest)
{
    struct half_pair hash = hash_of(kernels, buf, length);
    store64(digest, __builtin_bswap64(hash.high));
    store64(digest + 8, __builtin_bswap64(hash.low));
}

int hvr_fingerprints(int variant, const uint8_t *buf, size_t length, size_t block_bytes, uint8_t *digests,
                     size_t count)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    if (block_bytes == 0 || count != length / block_bytes + (length % block_bytes != 0)) {
        return HVR_LENGTH;
    }
    for (size_t block = 0; block < count; block += 1) {
        const uint8_t *start = buf + block * block_bytes;
        size_t size = smaller(block_bytes, length - block * block_bytes);
        if (is_zero(kernels, start, size)) {
            memset(digests + 16 * block, 0, 16);
        } else {
            digest_of(kernels, start, size, digests + 16 * block);
        }
    }
    return HVR_OK;
}

static void add_page(const struct hvr_kernels *kernels, const uint8_t *buf, uint64_t page, uint64_t *sums)
{
    struct half_pair hash = hash_long(kernels, buf, HVR_PAGE_BYTES);
    sums[0] += avalanche_xxh64(hash.low + page * PRIME64_1);
    sums[1] += avalanche_xxh64(hash.high + page * PRIME64_2);
}

void hvr_page_digest(int variant, const uint8_t *buf, size_t length, uint64_t first_page, uint64_t *sums)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    size_t count = length / HVR_PAGE_BYTES;
    for (size_t page = 0; page < count; page += 1) {
        if (!is_zero(kernels, buf + page * HVR_PAGE_BYTES, HVR_PAGE_BYTES)) {
            add_page(kernels, buf + page * HVR_PAGE_BYTES, first_page + page, sums);
        }
    }
    size_t rest = length % HVR_PAGE_BYTES;
    if (rest > 0 && !is_zero(kernels, buf + length - rest, rest)) {
        uint8_t last[HVR_PAGE_BYTES] = {0};
        memcpy(last, buf + length - rest, rest);
        add_page(kernels, last, first_page + count, sums);
    }
}

int hvr_extents_digest(int variant, const uint8_t *buf, size_t length, const uint64_t *extents, size_t count,
                       uint64_t *sums)
{
    size_t done = 0;
    for (size_t row = 0; row < count; row += 1) {
        uint64_t disk_offset = extents[2 * row];
        uint64_t extent_bytes = extents[2 * row + 1];
        if (disk_offset % HVR_PAGE_BYTES != 0) {
            return HVR_OUT_OF_RANGE;
        }
        if (extent_bytes > length - done) {
            return HVR_LENGTH;
        }
        hvr_page_digest(variant, buf + done, (size_t)extent_bytes, disk_offset / HVR_PAGE_BYTES, sums);
        done += (size_t)extent_bytes;
    }
    return done == length ? HVR_OK : HVR_LENGTH;
}
