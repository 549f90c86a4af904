/* The kernels for x86-64 with AVX-512 F, BW, VL, DQ, VPOPCNTDQ and VPCLMULQDQ: Ice Lake, Zen 4 and newer. */
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET             \
    __attribute__((target( \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,vpclmulqdq,avx2,bmi2,popcnt,sse4.2,pclmul")))

TARGET static inline __m512i vector_at(const uint8_t *at)
{
    return _mm512_loadu_si512((const void *)at);
}

TARGET static inline __m512i vector_part(const uint8_t *at, size_t length)
{
    return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, (unsigned)length), at);
}

/* A 128-bit lane moves over n bits by two carry-less products: of its first word (the high powers) with x^(n
 * + 63) and of its second with x^(n - 1), both modulo the polynomial and reflected into the upper half of a
 * word. */
#define FIRST_OVER_2048_BITS 0xe9a5d8be00000000ull
#define SECOND_OVER_2048_BITS 0x1426a81500000000ull
#define FIRST_OVER_512_BITS 0x1c19243b00000000ull
#define SECOND_OVER_512_BITS 0x75bba45b00000000ull
#define FIRST_OVER_384_BITS 0xa46ef4aa00000000ull
#define SECOND_OVER_384_BITS 0x6051243f00000000ull
#define FIRST_OVER_256_BITS 0x33ccbbbc00000000ull
#define SECOND_OVER_256_BITS 0xa2158b3400000000ull
#define FIRST_OVER_128_BITS 0x3743f7bd00000000ull
#define SECOND_OVER_128_BITS 0x3171d43000000000ull

enum { XOR_OF_THREE = 0x96, FOLD_BYTES = 256 };

TARGET static inline __m512i pair_of(unsigned long long first, unsigned long long second)
{
    return _mm512_set_epi64((long long)second, (long long)first, (long long)second, (long long)first,
                            (long long)second, (long long)first, (long long)second, (long long)first);
}

TARGET static inline __m512i folded(__m512i lanes, __m512i factors, __m512i next)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, factors, 0x00),
                                     _mm512_clmulepi64_epi128(lanes, factors, 0x11), next, XOR_OF_THREE);
}

/* The four lanes as 16 bytes with the same remainder, then those bytes through the crc32 instruction. */
TARGET static inline uint32_t crc32c_of_lanes(__m512i lanes)
{
    const __m512i factors =
        _mm512_set_epi64(0, 0, (long long)SECOND_OVER_128_BITS, (long long)FIRST_OVER_128_BITS,
                         (long long)SECOND_OVER_256_BITS, (long long)FIRST_OVER_256_BITS,
                         (long long)SECOND_OVER_384_BITS, (long long)FIRST_OVER_384_BITS);
    __m512i last = _mm512_maskz_mov_epi64(0xc0, lanes);
    __m512i sum = folded(lanes, factors, last);
    __m256i half = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    __m128i quarter = _mm_xor_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(quarter));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(quarter, 1));
}

TARGET static uint32_t crc32c(const uint8_t *buf, size_t length, uint32_t state)
{
    if (length < FOLD_BYTES) {
        return hvr_crc32c_sse42(buf, length, state);
    }
    const __m512i over_2048 = pair_of(FIRST_OVER_2048_BITS, SECOND_OVER_2048_BITS);
    const __m512i over_512 = pair_of(FIRST_OVER_512_BITS, SECOND_OVER_512_BITS);
    __m512i first = _mm512_xor_si512(vector_at(buf), _mm512_castsi128_si512(_mm_cvtsi32_si128((int)state)));
    __m512i second = vector_at(buf + 64);
    __m512i third = vector_at(buf + 128);
    __m512i fourth = vector_at(buf + 192);
    size_t at = FOLD_BYTES;
    for (; length - at >= FOLD_BYTES; at += FOLD_BYTES) {
        first = folded(first, over_2048, vector_at(buf + at));
        second = folded(second, over_2048, vector_at(buf + at + 64));
        third = folded(third, over_2048, vector_at(buf + at + 128));
        fourth = folded(fourth, over_2048, vector_at(buf + at + 192));
    }
    __m512i lanes = folded(folded(folded(first, over_512, second), over_512, third), over_512, fourth);
    for (; length - at >= 64; at += 64) {
        lanes = folded(lanes, over_512, vector_at(buf + at));
    }
    return hvr_crc32c_sse42(buf + at, length - at, crc32c_of_lanes(lanes));
}

TARGET static uint32_t byte_sum(const uint8_t *buf, size_t length)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i first = zero;
    __m512i second = zero;
    size_t at = 0;
    for (; length - at >= 256; at += 256) {
        first = _mm512_add_epi64(first, _mm512_add_epi64(_mm512_sad_epu8(vector_at(buf + at), zero),
                                                         _mm512_sad_epu8(vector_at(buf + at + 64), zero)));
        second = _mm512_add_epi64(second, _mm512_add_epi64(_mm512_sad_epu8(vector_at(buf + at + 128), zero),
                                                           _mm512_sad_epu8(vector_at(buf + at + 192), zero)));
    }
    for (; length - at >= 64; at += 64) {
        first = _mm512_add_epi64(first, _mm512_sad_epu8(vector_at(buf + at), zero));
    }
    if (at < length) {
        second = _mm512_add_epi64(second, _mm512_sad_epu8(vector_part(buf + at, length - at), zero));
    }
    return (uint32_t)_mm512_reduce_add_epi64(_mm512_add_epi64(first, second));
}

TARGET static size_t zero_prefix(const uint8_t *buf, size_t length)
{
    size_t at = 0;
    for (; length - at >= 256; at += 256) {
        __m512i any = _mm512_or_si512(_mm512_or_si512(vector_at(buf + at), vector_at(buf + at + 64)),
                                      _mm512_or_si512(vector_at(buf + at + 128), vector_at(buf + at + 192)));
        if (_mm512_test_epi64_mask(any, any)) {
            break;
        }
    }
    for (; at < length; at += 64) {
        __m512i part = length - at >= 64 ? vector_at(buf + at) : vector_part(buf + at, length - at);
        uint64_t data = _mm512_test_epi8_mask(part, part);
        if (data) {
            return at + (size_t)__builtin_ctzll(data);
        }
    }
    return length;
}

TARGET static inline __m512i with_difference(__m512i any, const uint8_t *a, const uint8_t *b)
{
    enum { A_OR_B_XOR_C = 0xf6 };
    return _mm512_ternarylogic_epi64(any, vector_at(a), vector_at(b), A_OR_B_XOR_C);
}

TARGET static size_t equal_prefix(const uint8_t *a, const uint8_t *b, size_t length)
{
    size_t at = 0;
    for (; length - at >= 256; at += 256) {
        __m512i any = _mm512_xor_si512(vector_at(a + at), vector_at(b + at));
        any = with_difference(any, a + at + 64, b + at + 64);
        any = with_difference(any, a + at + 128, b + at + 128);
        any = with_difference(any, a + at + 192, b + at + 192);
        if (_mm512_test_epi64_mask(any, any)) {
            break;
        }
    }
    for (; at < length; at += 64) {
        size_t size = smaller(length - at, 64);
        uint64_t differs = _mm512_cmpneq_epi8_mask(vector_part(a + at, size), vector_part(b + at, size));
        if (differs) {
            return at + (size_t)__builtin_ctzll(differs);
        }
    }
    return length;
}

TARGET static inline __m512i xxh3_stripe(__m512i lanes, const uint8_t *stripe, const uint8_t *secret)
{
    __m512i value = vector_at(stripe);
    __m512i keyed = _mm512_xor_si512(value, vector_at(secret));
    __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    __m512i swapped = _mm512_shuffle_epi32(value, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
    return _mm512_add_epi64(lanes, _mm512_add_epi64(product, swapped));
}

TARGET static void xxh3_accumulate(uint64_t *lanes, const uint8_t *buf, size_t length)
{
    const __m512i prime = _mm512_set1_epi64(XXH_PRIME32_1);
    const __m512i scramble_key = vector_at(hvr_xxh3_secret + XXH3_SCRAMBLE_AT);
    __m512i sums = _mm512_loadu_si512((const void *)lanes);
    size_t stripe_count = (length - 1) / XXH3_STRIPE_BYTES;
    const uint8_t *at = buf;
    while (stripe_count > 0) {
        size_t batch = smaller(stripe_count, XXH3_STRIPES_PER_BLOCK);
        for (size_t stripe = 0; stripe < batch; stripe += 1, at += XXH3_STRIPE_BYTES) {
            prefetch_ahead(at);
            sums = xxh3_stripe(sums, at, hvr_xxh3_secret + stripe * XXH3_SECRET_STEP_BYTES);
        }
        stripe_count -= batch;
        if (batch == XXH3_STRIPES_PER_BLOCK) {
            sums = _mm512_ternarylogic_epi64(sums, _mm512_srli_epi64(sums, 47), scramble_key, XOR_OF_THREE);
            sums = _mm512_mullo_epi64(sums, prime);
        }
    }
    sums = xxh3_stripe(sums, buf + length - XXH3_STRIPE_BYTES, hvr_xxh3_secret + XXH3_LAST_STRIPE_AT);
    _mm512_storeu_si512((void *)lanes, sums);
}

TARGET static uint64_t bitmap_count(const uint8_t *bitmap, size_t length)
{
    __m512i first = _mm512_setzero_si512();
    __m512i second = first;
    size_t at = 0;
    for (; length - at >= 256; at += 256) {
        first = _mm512_add_epi64(first, _mm512_add_epi64(_mm512_popcnt_epi64(vector_at(bitmap + at)),
                                                         _mm512_popcnt_epi64(vector_at(bitmap + at + 64))));
        second =
            _mm512_add_epi64(second, _mm512_add_epi64(_mm512_popcnt_epi64(vector_at(bitmap + at + 128)),
                                                      _mm512_popcnt_epi64(vector_at(bitmap + at + 192))));
    }
    uint64_t count = (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(first, second));
    return count + hvr_bitmap_count_popcnt(bitmap + at, length - at);
}

TARGET static void bitmap_merge(uint8_t *target, const uint8_t *other, size_t length)
{
    size_t at = 0;
    for (; length - at >= 64; at += 64) {
        _mm512_storeu_si512((void *)(target + at),
                            _mm512_or_si512(vector_at(target + at), vector_at(other + at)));
    }
    for (; at < length; at += 1) {
        target[at] = (uint8_t)(target[at] | other[at]);
    }
}

const struct hvr_kernels hvr_avx512_kernels = {
    .crc32c = crc32c,
    .byte_sum = byte_sum,
    .zero_prefix = zero_prefix,
    .equal_prefix = equal_prefix,
    .xxh3_accumulate = xxh3_accumulate,
    .bitmap_count = bitmap_count,
    .bitmap_merge = bitmap_merge,
};

#else
typedef int hvr_avx512_is_for_x86_64;
#endif
