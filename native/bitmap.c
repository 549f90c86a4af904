/* Bitmaps: change a range of bits, find the runs of set ones. */
#include "kernels.h"

/* A gap of this many words is worth a call of the vector kernel. */
enum { INLINE_WORDS = 4 };

static void change_byte(uint8_t *byte, unsigned mask, int value)
{
    *byte = (uint8_t)(value ? *byte | mask : *byte & ~mask);
}

int hvr_bitmap_change(uint8_t *bitmap, size_t length, uint64_t first, uint64_t count, int value)
{
    uint64_t bit_count = (uint64_t)length * 8;
    if (length > UINT64_MAX / 8 || first > bit_count || count > bit_count - first) {
        return HVR_OUT_OF_RANGE;
    }
    if (count == 0) {
        return HVR_OK;
    }
    size_t first_byte = (size_t)(first / 8);
    size_t last_byte = (size_t)((first + count - 1) / 8);
    unsigned first_mask = 0xffu << (first % 8);
    unsigned last_mask = 0xffu >> (7 - (first + count - 1) % 8);
    if (first_byte == last_byte) {
        change_byte(bitmap + first_byte, first_mask & last_mask, value);
        return HVR_OK;
    }
    change_byte(bitmap + first_byte, first_mask & 0xffu, value);
    memset(bitmap + first_byte + 1, value ? 0xff : 0, last_byte - first_byte - 1);
    change_byte(bitmap + last_byte, last_mask, value);
    return HVR_OK;
}

/* The 64 bits from byte `at` on, with zeros for what lies behind the bitmap. */
static uint64_t word_at(const uint8_t *bitmap, size_t length, size_t at)
{
    uint64_t word = 0;
    if (length - at >= 8) {
        return load64(bitmap + at);
    }
    memcpy(&word, bitmap + at, length - at);
    return word;
}

/* The first bit at or behind `bit` that is set; at least `end` where there is none before it. */
static uint64_t next_set(const struct hvr_kernels *kernels, const uint8_t *bitmap, size_t length,
                         uint64_t bit, uint64_t end)
{
    for (unsigned step = 0; bit < end; step += 1) {
        size_t at = (size_t)(bit / 64) * 8;
        uint64_t word = word_at(bitmap, length, at) >> (bit % 64);
        if (word != 0) {
            return bit + (uint64_t)__builtin_ctzll(word);
        }
        bit = (uint64_t)at * 8 + 64;
        if (step >= INLINE_WORDS && bit < end) {
            size_t zeros = kernels->zero_prefix(bitmap + at + 8, length - at - 8);
            bit += (uint64_t)(zeros / 8) * 64;
        }
    }
    return bit;
}

/* The first bit at or behind `bit` that is clear; bits behind the bitmap count as clear. */
static uint64_t next_clear(const uint8_t *bitmap, size_t length, uint64_t bit, uint64_t end)
{
    while (bit < end) {
        size_t at = (size_t)(bit / 64) * 8;
        uint64_t word = ~word_at(bitmap, length, at) >> (bit % 64);
        if (word != 0) {
            return bit + (uint64_t)__builtin_ctzll(word);
        }
        bit = (uint64_t)at * 8 + 64;
        while (bit < end && length - bit / 8 >= 32
               && (load64(bitmap + bit / 8) & load64(bitmap + bit / 8 + 8) & load64(bitmap + bit / 8 + 16)
                   & load64(bitmap + bit / 8 + 24))
                      == UINT64_MAX) {
            bit += 256;
        }
    }
    return bit;
}

size_t hvr_bitmap_runs(int variant, const uint8_t *bitmap, size_t length, uint64_t *position, uint64_t end,
                       int64_t *runs, size_t capacity)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    size_t count = 0;
    if (length > INT64_MAX / 8 || end > (uint64_t)length * 8) {
        return 0;
    }
    while (*position < end && count < capacity) {
        uint64_t first = next_set(kernels, bitmap, length, *position, end);
        if (first >= end) {
            *position = end;
            break;
        }
        uint64_t behind = next_clear(bitmap, length, first, end);
        *position = behind < end ? behind : end;
        runs[2 * count] = (int64_t)first;
        runs[2 * count + 1] = (int64_t)(*position - first);
        count += 1;
    }
    return count;
}
