/* The kernels for x86-64 with AVX2, BMI2, POPCNT, SSE4.2 and PCLMULQDQ: every server processor since about
 * 2015. */
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,bmi2,popcnt,sse4.2,pclmul")))

/* The crc32 instruction takes a word per cycle but answers after three, so three stretches run side by side.
 * Moving a state over n bytes multiplies it by x^(8n) modulo the polynomial: a carry-less product with x^(8n
 * - 33) (33 = the bit that a reflected product lacks, and the 32 that crc32 adds), reduced by crc32 itself.
 */
enum { LONG_STRETCH_BYTES = 2048, SHORT_STRETCH_BYTES = 256 };
#define OVER_4096_BYTES 0x82f89c77u
#define OVER_2048_BYTES 0xa51b6135u
#define OVER_512_BYTES 0xdd7e3b0cu
#define OVER_256_BYTES 0xb9e02b86u

TARGET static inline uint64_t crc32c_moved(uint64_t state, uint32_t factor)
{
    __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)state), _mm_cvtsi32_si128((int)factor), 0);
    return (uint64_t)_mm_cvtsi128_si64(product);
}

TARGET static inline uint64_t crc32c_three(const uint8_t *buf, size_t stretch_bytes, uint64_t state,
                                           uint32_t over_one, uint32_t over_two)
{
    uint64_t second = 0;
    uint64_t third = 0;
    for (size_t at = 0; at < stretch_bytes; at += 8) {
        state = _mm_crc32_u64(state, load64(buf + at));
        second = _mm_crc32_u64(second, load64(buf + stretch_bytes + at));
        third = _mm_crc32_u64(third, load64(buf + 2 * stretch_bytes + at));
    }
    return third ^ _mm_crc32_u64(0, crc32c_moved(state, over_two) ^ crc32c_moved(second, over_one));
}

TARGET uint32_t hvr_crc32c_sse42(const uint8_t *buf, size_t length, uint32_t state)
{
    uint64_t wide = state;
    size_t at = 0;
    for (; length - at >= 3 * LONG_STRETCH_BYTES; at += 3 * LONG_STRETCH_BYTES) {
        wide = crc32c_three(buf + at, LONG_STRETCH_BYTES, wide, OVER_2048_BYTES, OVER_4096_BYTES);
    }
    for (; length - at >= 3 * SHORT_STRETCH_BYTES; at += 3 * SHORT_STRETCH_BYTES) {
        wide = crc32c_three(buf + at, SHORT_STRETCH_BYTES, wide, OVER_256_BYTES, OVER_512_BYTES);
    }
    for (; length - at >= 8; at += 8) {
        wide = _mm_crc32_u64(wide, load64(buf + at));
    }
    for (; at < length; at += 1) {
        wide = _mm_crc32_u8((uint32_t)wide, buf[at]);
    }
    return (uint32_t)wide;
}

TARGET uint64_t hvr_bitmap_count_popcnt(const uint8_t *bitmap, size_t length)
{
    uint64_t counts[4] = {0, 0, 0, 0};
    size_t at = 0;
    for (; length - at >= 32; at += 32) {
        counts[0] += (uint64_t)_mm_popcnt_u64(load64(bitmap + at));
        counts[1] += (uint64_t)_mm_popcnt_u64(load64(bitmap + at + 8));
        counts[2] += (uint64_t)_mm_popcnt_u64(load64(bitmap + at + 16));
        counts[3] += (uint64_t)_mm_popcnt_u64(load64(bitmap + at + 24));
    }
    for (; at < length; at += 1) {
        counts[0] += (uint64_t)_mm_popcnt_u32(bitmap[at]);
    }
    return counts[0] + counts[1] + counts[2] + counts[3];
}

TARGET static inline __m256i vector_at(const uint8_t *at)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)at);
}

TARGET static uint32_t byte_sum(const uint8_t *buf, size_t length)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i first = zero;
    __m256i second = zero;
    size_t at = 0;
    for (; length - at >= 128; at += 128) {
        first = _mm256_add_epi64(first, _mm256_add_epi64(_mm256_sad_epu8(vector_at(buf + at), zero),
                                                         _mm256_sad_epu8(vector_at(buf + at + 32), zero)));
        second = _mm256_add_epi64(second, _mm256_add_epi64(_mm256_sad_epu8(vector_at(buf + at + 64), zero),
                                                           _mm256_sad_epu8(vector_at(buf + at + 96), zero)));
    }
    for (; length - at >= 32; at += 32) {
        first = _mm256_add_epi64(first, _mm256_sad_epu8(vector_at(buf + at), zero));
    }
    uint64_t sums[4];
    _mm256_storeu_si256((__m256i *)(void *)sums, _mm256_add_epi64(first, second));
    return (uint32_t)(sums[0] + sums[1] + sums[2] + sums[3]) + byte_sum_tail(buf, at, length);
}

TARGET static size_t zero_prefix(const uint8_t *buf, size_t length)
{
    size_t at = 0;
    for (; length - at >= 128; at += 128) {
        __m256i any = _mm256_or_si256(_mm256_or_si256(vector_at(buf + at), vector_at(buf + at + 32)),
                                      _mm256_or_si256(vector_at(buf + at + 64), vector_at(buf + at + 96)));
        if (!_mm256_testz_si256(any, any)) {
            break;
        }
    }
    return zero_prefix_tail(buf, at, length);
}

TARGET static inline __m256i difference_at(const uint8_t *a, const uint8_t *b)
{
    return _mm256_xor_si256(vector_at(a), vector_at(b));
}

TARGET static size_t equal_prefix(const uint8_t *a, const uint8_t *b, size_t length)
{
    size_t at = 0;
    for (; length - at >= 128; at += 128) {
        __m256i any = _mm256_or_si256(
            _mm256_or_si256(difference_at(a + at, b + at), difference_at(a + at + 32, b + at + 32)),
            _mm256_or_si256(difference_at(a + at + 64, b + at + 64),
                            difference_at(a + at + 96, b + at + 96)));
        if (!_mm256_testz_si256(any, any)) {
            break;
        }
    }
    return equal_prefix_tail(a, b, at, length);
}

TARGET static inline __m256i xxh3_half(__m256i lanes, const uint8_t *stripe, const uint8_t *secret)
{
    __m256i value = vector_at(stripe);
    __m256i keyed = _mm256_xor_si256(value, vector_at(secret));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, swapped));
}

/* There is no 64-bit product: low half and high half times the 32-bit prime, the latter moved up. */
TARGET static inline __m256i xxh3_scrambled_half(__m256i lanes, const uint8_t *secret)
{
    const __m256i prime = _mm256_set1_epi32((int)XXH_PRIME32_1);
    __m256i mixed =
        _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), vector_at(secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

TARGET static void xxh3_accumulate(uint64_t *lanes, const uint8_t *buf, size_t length)
{
    __m256i low = vector_at((const uint8_t *)lanes);
    __m256i high = vector_at((const uint8_t *)(lanes + 4));
    size_t stripe_count = (length - 1) / XXH3_STRIPE_BYTES;
    const uint8_t *at = buf;
    while (stripe_count > 0) {
        size_t batch = smaller(stripe_count, XXH3_STRIPES_PER_BLOCK);
        for (size_t stripe = 0; stripe < batch; stripe += 1, at += XXH3_STRIPE_BYTES) {
            const uint8_t *secret = hvr_xxh3_secret + stripe * XXH3_SECRET_STEP_BYTES;
            prefetch_ahead(at);
            low = xxh3_half(low, at, secret);
            high = xxh3_half(high, at + 32, secret + 32);
        }
        stripe_count -= batch;
        if (batch == XXH3_STRIPES_PER_BLOCK) {
            low = xxh3_scrambled_half(low, hvr_xxh3_secret + XXH3_SCRAMBLE_AT);
            high = xxh3_scrambled_half(high, hvr_xxh3_secret + XXH3_SCRAMBLE_AT + 32);
        }
    }
    at = buf + length - XXH3_STRIPE_BYTES;
    low = xxh3_half(low, at, hvr_xxh3_secret + XXH3_LAST_STRIPE_AT);
    high = xxh3_half(high, at + 32, hvr_xxh3_secret + XXH3_LAST_STRIPE_AT + 32);
    _mm256_storeu_si256((__m256i *)(void *)lanes, low);
    _mm256_storeu_si256((__m256i *)(void *)(lanes + 4), high);
}

TARGET static void bitmap_merge(uint8_t *target, const uint8_t *other, size_t length)
{
    size_t at = 0;
    for (; length - at >= 32; at += 32) {
        _mm256_storeu_si256((__m256i *)(void *)(target + at),
                            _mm256_or_si256(vector_at(target + at), vector_at(other + at)));
    }
    for (; at < length; at += 1) {
        target[at] = (uint8_t)(target[at] | other[at]);
    }
}

const struct hvr_kernels hvr_avx2_kernels = {
    .crc32c = hvr_crc32c_sse42,
    .byte_sum = byte_sum,
    .zero_prefix = zero_prefix,
    .equal_prefix = equal_prefix,
    .xxh3_accumulate = xxh3_accumulate,
    .bitmap_count = hvr_bitmap_count_popcnt,
    .bitmap_merge = bitmap_merge,
};

#else
typedef int hvr_avx2_is_for_x86_64;
#endif
