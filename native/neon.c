/* The kernels for aarch64 with Advanced SIMD and the CRC instructions. */
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

/* The two compilers name the same instructions differently; arm_acle.h hides them unless all of the file may
 * use them. */
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("crc")))
#define CRC_WORD __builtin_arm_crc32cd
#define CRC_BYTE __builtin_arm_crc32cb
#else
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC_WORD __builtin_aarch64_crc32cx
#define CRC_BYTE __builtin_aarch64_crc32cb
#endif

CRC_TARGET static uint32_t crc32c(const uint8_t *buf, size_t length, uint32_t state)
{
    size_t at = 0;
    for (; length - at >= 8; at += 8) {
        state = CRC_WORD(state, load64(buf + at));
    }
    for (; at < length; at += 1) {
        state = CRC_BYTE(state, buf[at]);
    }
    return state;
}

static uint32_t byte_sum(const uint8_t *buf, size_t length)
{
    uint64x2_t sums = vdupq_n_u64(0);
    size_t at = 0;
    while (length - at >= 16) {
        /* A 16-bit lane takes at most 510 a step. */
        size_t end = at + smaller((length - at) / 16, 128) * 16;
        uint16x8_t lanes = vdupq_n_u16(0);
        for (; at < end; at += 16) {
            lanes = vpadalq_u8(lanes, vld1q_u8(buf + at));
        }
        sums = vpadalq_u32(sums, vpaddlq_u16(lanes));
    }
    return (uint32_t)vaddvq_u64(sums) + byte_sum_tail(buf, at, length);
}

static size_t zero_prefix(const uint8_t *buf, size_t length)
{
    size_t at = 0;
    for (; length - at >= 64; at += 64) {
        uint8x16_t any = vorrq_u8(vorrq_u8(vld1q_u8(buf + at), vld1q_u8(buf + at + 16)),
                                  vorrq_u8(vld1q_u8(buf + at + 32), vld1q_u8(buf + at + 48)));
        if (vmaxvq_u8(any) != 0) {
            break;
        }
    }
    return zero_prefix_tail(buf, at, length);
}

static inline uint8x16_t difference_at(const uint8_t *a, const uint8_t *b)
{
    return veorq_u8(vld1q_u8(a), vld1q_u8(b));
}

static size_t equal_prefix(const uint8_t *a, const uint8_t *b, size_t length)
{
    size_t at = 0;
    for (; length - at >= 64; at += 64) {
        uint8x16_t any = vorrq_u8(
            vorrq_u8(difference_at(a + at, b + at), difference_at(a + at + 16, b + at + 16)),
            vorrq_u8(difference_at(a + at + 32, b + at + 32), difference_at(a + at + 48, b + at + 48)));
        if (vmaxvq_u8(any) != 0) {
            break;
        }
    }
    return equal_prefix_tail(a, b, at, length);
}

static inline uint64x2_t xxh3_quarter(uint64x2_t lanes, const uint8_t *stripe, const uint8_t *secret)
{
    uint64x2_t value = vreinterpretq_u64_u8(vld1q_u8(stripe));
    uint64x2_t keyed = veorq_u64(value, vreinterpretq_u64_u8(vld1q_u8(secret)));
    uint64x2_t swapped = vextq_u64(value, value, 1);
    return vmlal_u32(vaddq_u64(lanes, swapped), vmovn_u64(keyed), vshrn_n_u64(keyed, 32));
}

static inline uint64x2_t xxh3_scrambled_quarter(uint64x2_t lanes, const uint8_t *secret)
{
    const uint32x2_t prime = vdup_n_u32(XXH_PRIME32_1);
    uint64x2_t mixed =
        veorq_u64(veorq_u64(lanes, vshrq_n_u64(lanes, 47)), vreinterpretq_u64_u8(vld1q_u8(secret)));
    uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(mixed, 32), prime), 32);
    return vmlal_u32(high, vmovn_u64(mixed), prime);
}

static inline void xxh3_stripe(uint64x2_t *sums, const uint8_t *stripe, const uint8_t *secret)
{
    for (size_t quarter = 0; quarter < 4; quarter += 1) {
        sums[quarter] = xxh3_quarter(sums[quarter], stripe + 16 * quarter, secret + 16 * quarter);
    }
}

static void xxh3_accumulate(uint64_t *lanes, const uint8_t *buf, size_t length)
{
    uint64x2_t sums[4] = {vld1q_u64(lanes), vld1q_u64(lanes + 2), vld1q_u64(lanes + 4), vld1q_u64(lanes + 6)};
    size_t stripe_count = (length - 1) / XXH3_STRIPE_BYTES;
    const uint8_t *at = buf;
    while (stripe_count > 0) {
        size_t batch = smaller(stripe_count, XXH3_STRIPES_PER_BLOCK);
        for (size_t stripe = 0; stripe < batch; stripe += 1, at += XXH3_STRIPE_BYTES) {
            xxh3_stripe(sums, at, hvr_xxh3_secret + stripe * XXH3_SECRET_STEP_BYTES);
        }
        stripe_count -= batch;
        if (batch < XXH3_STRIPES_PER_BLOCK) {
            break;
        }
        for (size_t quarter = 0; quarter < 4; quarter += 1) {
            sums[quarter] =
                xxh3_scrambled_quarter(sums[quarter], hvr_xxh3_secret + XXH3_SCRAMBLE_AT + 16 * quarter);
        }
    }
    xxh3_stripe(sums, buf + length - XXH3_STRIPE_BYTES, hvr_xxh3_secret + XXH3_LAST_STRIPE_AT);
    for (size_t quarter = 0; quarter < 4; quarter += 1) {
        vst1q_u64(lanes + 2 * quarter, sums[quarter]);
    }
}

static uint64_t bitmap_count(const uint8_t *bitmap, size_t length)
{
    uint64x2_t sums = vdupq_n_u64(0);
    size_t at = 0;
    for (; length - at >= 16; at += 16) {
        sums = vpadalq_u32(sums, vpaddlq_u16(vpaddlq_u8(vcntq_u8(vld1q_u8(bitmap + at)))));
    }
    return vaddvq_u64(sums) + hvr_scalar_kernels.bitmap_count(bitmap + at, length - at);
}

static void bitmap_merge(uint8_t *target, const uint8_t *other, size_t length)
{
    size_t at = 0;
    for (; length - at >= 16; at += 16) {
        vst1q_u8(target + at, vorrq_u8(vld1q_u8(target + at), vld1q_u8(other + at)));
    }
    hvr_scalar_kernels.bitmap_merge(target + at, other + at, length - at);
}

const struct hvr_kernels hvr_neon_kernels = {
    .crc32c = crc32c,
    .byte_sum = byte_sum,
    .zero_prefix = zero_prefix,
    .equal_prefix = equal_prefix,
    .xxh3_accumulate = xxh3_accumulate,
    .bitmap_count = bitmap_count,
    .bitmap_merge = bitmap_merge,
};

#else
typedef int hvr_neon_is_for_aarch64;
#endif
