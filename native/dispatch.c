/* Which kernels run here, and the public functions that only choose one. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static int variant_exists(int variant)
{
    return variant >= 0 && variant < HVR_VARIANT_COUNT;
}

#if defined(__x86_64__)

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")
           && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("sse4.2")
           && __builtin_cpu_supports("pclmul");
}

static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
           && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("vpclmulqdq");
}

int hvr_variant_available(int variant)
{
    if (!variant_exists(variant)) {
        return -2;
    }
    switch (variant) {
    case HVR_SCALAR:
        return 1;
    case HVR_AVX2:
        return has_avx2();
    case HVR_AVX512:
        return has_avx512();
    default:
        return -1;
    }
}

const struct hvr_kernels *hvr_kernels_of(int variant)
{
    if (variant == HVR_AVX512 && has_avx512()) {
        return &hvr_avx512_kernels;
    }
    if (variant == HVR_AVX2 && has_avx2()) {
        return &hvr_avx2_kernels;
    }
    return &hvr_scalar_kernels;
}

#elif defined(__aarch64__)

/* Advanced SIMD is part of every aarch64; the CRC instructions are optional before Armv8.1. */
static int has_neon(void)
{
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & (1ul << 7)) != 0; /* HWCAP_CRC32 */
#elif defined(__APPLE__)
    return 1;
#else
    return 0;
#endif
}

int hvr_variant_available(int variant)
{
    if (!variant_exists(variant)) {
        return -2;
    }
    switch (variant) {
    case HVR_SCALAR:
        return 1;
    case HVR_NEON:
        return has_neon();
    default:
        return -1;
    }
}

const struct hvr_kernels *hvr_kernels_of(int variant)
{
    return variant == HVR_NEON && has_neon() ? &hvr_neon_kernels : &hvr_scalar_kernels;
}

#else

int hvr_variant_available(int variant)
{
    if (!variant_exists(variant)) {
        return -2;
    }
    return variant == HVR_SCALAR ? 1 : -1;
}

const struct hvr_kernels *hvr_kernels_of(int variant)
{
    (void)variant;
    return &hvr_scalar_kernels;
}

#endif

uint32_t hvr_crc32c(int variant, const uint8_t *buf, size_t length, uint32_t value)
{
    return ~hvr_kernels_of(variant)->crc32c(buf, length, ~value);
}

uint32_t hvr_byte_sum(int variant, const uint8_t *buf, size_t length)
{
    return hvr_kernels_of(variant)->byte_sum(buf, length);
}

size_t hvr_zero_prefix(int variant, const uint8_t *buf, size_t length)
{
    return hvr_kernels_of(variant)->zero_prefix(buf, length);
}

size_t hvr_equal_prefix(int variant, const uint8_t *a, const uint8_t *b, size_t length)
{
    return hvr_kernels_of(variant)->equal_prefix(a, b, length);
}

uint64_t hvr_bitmap_count(int variant, const uint8_t *bitmap, size_t length)
{
    return hvr_kernels_of(variant)->bitmap_count(bitmap, length);
}

void hvr_bitmap_merge(int variant, uint8_t *target, const uint8_t *other, size_t length)
{
    hvr_kernels_of(variant)->bitmap_merge(target, other, length);
}
