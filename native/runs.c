/* Runs of grains that hold data or that changed, and sums of consecutive pieces. */
#include "kernels.h"

/* Rows (offset, length) that grow at their end. */
struct run_list {
    int64_t *rows;
    size_t capacity;
    size_t count;
};

/* Returns 0 where there is no more room. */
static int append_grain(struct run_list *list, size_t offset, size_t length)
{
    int64_t *last = list->count > 0 ? list->rows + 2 * (list->count - 1) : NULL;
    if (last != NULL && last[0] + last[1] == (int64_t)offset) {
        last[1] += (int64_t)length;
        return 1;
    }
    if (list->count == list->capacity) {
        return 0;
    }
    list->rows[2 * list->count] = (int64_t)offset;
    list->rows[2 * list->count + 1] = (int64_t)length;
    list->count += 1;
    return 1;
}

size_t hvr_data_runs(int variant, const uint8_t *buf, size_t length, size_t grain_bytes, int64_t *runs,
                     size_t capacity)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    struct run_list list = {runs, capacity, 0};
    for (size_t at = 0; grain_bytes > 0 && at < length;) {
        size_t grain = smaller(grain_bytes, length - at);
        /* Most grains with data show it in their first word. */
        int has_data = grain >= 8 && load64(buf + at) != 0;
        if (!has_data) {
            has_data = kernels->zero_prefix(buf + at, grain) != grain;
        }
        if (has_data && !append_grain(&list, at, grain)) {
            break;
        }
        at += grain;
    }
    return list.count;
}

size_t hvr_changed_runs(int variant, const uint8_t *a, const uint8_t *b, size_t length, size_t grain_bytes,
                        int64_t *runs, size_t capacity)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    struct run_list list = {runs, capacity, 0};
    for (size_t at = 0; grain_bytes > 0 && at < length;) {
        size_t grain = smaller(grain_bytes, length - at);
        if (kernels->equal_prefix(a + at, b + at, grain) != grain && !append_grain(&list, at, grain)) {
            break;
        }
        at += grain;
    }
    return list.count;
}

int hvr_byte_sums(int variant, const uint8_t *buf, size_t length, const uint64_t *lengths, size_t count,
                  uint32_t *sums)
{
    const struct hvr_kernels *kernels = hvr_kernels_of(variant);
    size_t at = 0;
    for (size_t piece = 0; piece < count; piece += 1) {
        if (lengths[piece] > length - at) {
            return HVR_LENGTH;
        }
        sums[piece] = kernels->byte_sum(buf + at, (size_t)lengths[piece]);
        at += (size_t)lengths[piece];
    }
    return at == length ? HVR_OK : HVR_LENGTH;
}
