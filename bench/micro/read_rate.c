/* Plain read loops: the fastest one is this machine's memory read rate. Each returns a value that depends on
 * all bytes. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t vector16 __attribute__((vector_size(16), aligned(1)));
typedef uint64_t vector32 __attribute__((vector_size(32), aligned(1)));
typedef uint64_t vector64 __attribute__((vector_size(64), aligned(1)));

#define READ_LOOP(name, vector, target_text, ahead)                                        \
    target_text uint64_t name(const uint8_t *buf, size_t length)                           \
    {                                                                                      \
        vector sums[4] = {{0}, {0}, {0}, {0}};                                             \
        uint64_t result = 0;                                                               \
        for (size_t at = 0; at + 4 * sizeof(vector) <= length; at += 4 * sizeof(vector)) { \
            const vector *step = (const vector *)(const void *)(buf + at);                 \
            if (ahead > 0) {                                                               \
                __builtin_prefetch(buf + at + ahead);                                      \
                __builtin_prefetch(buf + at + ahead + 2 * sizeof(vector));                 \
            }                                                                              \
            sums[0] ^= step[0];                                                            \
            sums[1] ^= step[1];                                                            \
            sums[2] ^= step[2];                                                            \
            sums[3] ^= step[3];                                                            \
        }                                                                                  \
        sums[0] ^= sums[1] ^ sums[2] ^ sums[3];                                            \
        for (size_t word = 0; word < sizeof(vector) / 8; word += 1) {                      \
            result ^= sums[0][word];                                                       \
        }                                                                                  \
        return result;                                                                     \
    }

READ_LOOP(read_16, vector16, , 0)
READ_LOOP(read_16_ahead, vector16, , 2048)
#if defined(__x86_64__)
READ_LOOP(read_32, vector32, __attribute__((target("avx2"))), 0)
READ_LOOP(read_32_ahead, vector32, __attribute__((target("avx2"))), 2048)
READ_LOOP(read_64, vector64, __attribute__((target("avx512f"))), 0)
READ_LOOP(read_64_ahead, vector64, __attribute__((target("avx512f"))), 4096)

int read_width(void)
{
    return __builtin_cpu_supports("avx512f") ? 64 : __builtin_cpu_supports("avx2") ? 32 : 16;
}
#else
int read_width(void)
{
    return 16;
}
#endif
