/* Newest write wins: a sweep over the extents in disk order, with a heap that knows the newest one at each
 * place. */
#include "kernels.h"

enum { DIGIT_BITS = 8, DIGIT_VALUES = 1 << DIGIT_BITS, DIGIT_COUNT = 64 / DIGIT_BITS };

struct sort_columns {
    uint64_t *keys;
    uint32_t *indexes;
};

static uint64_t end_of(const struct hvr_source_extents *source, size_t index)
{
    return source->disk_offsets[index] + source->lengths[index];
}

/* Appends a piece of source extent `index`, or lengthens the last row where both offsets continue it. */
static void emit(struct hvr_target_extents *target, const struct hvr_source_extents *source, size_t index,
                 uint64_t start, uint64_t end)
{
    uint64_t log_offset = source->log_offsets[index] + (start - source->disk_offsets[index]);
    if (target->count > 0) {
        size_t last = target->count - 1;
        uint64_t last_length = target->lengths[last];
        if (target->disk_offsets[last] + last_length == start
            && target->log_offsets[last] + last_length == log_offset) {
            target->lengths[last] = last_length + (end - start);
            return;
        }
    }
    target->disk_offsets[target->count] = start;
    target->lengths[target->count] = end - start;
    target->log_offsets[target->count] = log_offset;
    target->count += 1;
}

/* Stable, least significant digit first; a digit that all keys share costs nothing. Returns where the result
 * stands. */
static struct sort_columns sorted(struct sort_columns from, struct sort_columns to, size_t count)
{
    uint32_t histogram[DIGIT_COUNT][DIGIT_VALUES];
    memset(histogram, 0, sizeof histogram);
    for (size_t row = 0; row < count; row += 1) {
        for (unsigned digit = 0; digit < DIGIT_COUNT; digit += 1) {
            histogram[digit][(from.keys[row] >> (digit * DIGIT_BITS)) % DIGIT_VALUES] += 1;
        }
    }
    for (unsigned digit = 0; digit < DIGIT_COUNT; digit += 1) {
        uint32_t *places = histogram[digit];
        unsigned shift = digit * DIGIT_BITS;
        if (places[(from.keys[0] >> shift) % DIGIT_VALUES] == count) {
            continue;
        }
        uint32_t place = 0;
        for (size_t value = 0; value < DIGIT_VALUES; value += 1) {
            uint32_t rows = places[value];
            places[value] = place;
            place += rows;
        }
        for (size_t row = 0; row < count; row += 1) {
            uint32_t target = places[(from.keys[row] >> shift) % DIGIT_VALUES]++;
            to.keys[target] = from.keys[row];
            to.indexes[target] = from.indexes[row];
        }
        struct sort_columns other = from;
        from = to;
        to = other;
    }
    return from;
}

static void heap_push(uint32_t *heap, size_t count, uint32_t index)
{
    size_t hole = count;
    while (hole > 0 && heap[(hole - 1) / 2] < index) {
        heap[hole] = heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    heap[hole] = index;
}

/* Removes the newest; count: with it, at least 1. */
static void heap_pop(uint32_t *heap, size_t count)
{
    uint32_t index = heap[count - 1];
    size_t end = count - 1;
    size_t hole = 0;
    for (;;) {
        size_t child = 2 * hole + 1;
        if (child + 1 < end && heap[child + 1] > heap[child]) {
            child += 1;
        }
        if (child >= end || heap[child] <= index) {
            break;
        }
        heap[hole] = heap[child];
        hole = child;
    }
    heap[hole] = index;
}

/* Each step ends at the end of the newest extent or at the start of another one: at most 2 * count rows. */
static void sweep(const struct hvr_source_extents *source, const uint32_t *order, uint32_t *heap,
                  struct hvr_target_extents *target)
{
    size_t next = 0;
    size_t active = 0;
    uint64_t position = 0;
    while (next < source->count || active > 0) {
        if (active == 0) {
            position = source->disk_offsets[order[next]];
        }
        for (; next < source->count && source->disk_offsets[order[next]] <= position; next += 1) {
            if (source->lengths[order[next]] > 0) {
                heap_push(heap, active, order[next]);
                active += 1;
            }
        }
        while (active > 0 && end_of(source, heap[0]) <= position) {
            heap_pop(heap, active);
            active -= 1;
        }
        if (active == 0) {
            continue;
        }
        uint64_t end = end_of(source, heap[0]);
        if (next < source->count && source->disk_offsets[order[next]] < end) {
            end = source->disk_offsets[order[next]];
        }
        emit(target, source, heap[0], position, end);
        position = end;
    }
}

/* Returns 1 where the source needs no sweep and is in the target already. */
static int copied_in_order(const struct hvr_source_extents *source, struct hvr_target_extents *target)
{
    uint64_t end = 0;
    for (size_t index = 0; index < source->count; index += 1) {
        if (source->disk_offsets[index] < end) {
            return 0;
        }
        end = end_of(source, index);
    }
    for (size_t index = 0; index < source->count; index += 1) {
        if (source->lengths[index] > 0) {
            emit(target, source, index, source->disk_offsets[index], end_of(source, index));
        }
    }
    return 1;
}

static int all_in_range(const struct hvr_source_extents *source)
{
    for (size_t index = 0; index < source->count; index += 1) {
        uint64_t room = UINT64_MAX - source->lengths[index];
        if (source->disk_offsets[index] > room || source->log_offsets[index] > room) {
            return 0;
        }
    }
    return source->count <= UINT32_MAX;
}

int hvr_coalesce(const struct hvr_source_extents *source, struct hvr_target_extents *target,
                 uint64_t *scratch, size_t scratch_words)
{
    size_t count = source->count;
    target->count = 0;
    if (!all_in_range(source)) {
        return HVR_OUT_OF_RANGE;
    }
    if (target->capacity / 2 < count || scratch_words / 4 < count) {
        return HVR_LENGTH;
    }
    if (copied_in_order(source, target)) {
        return HVR_OK;
    }
    /* Two columns of keys, two of indexes that fill one column of words together, and the heap. */
    uint32_t *halves = (uint32_t *)(scratch + 2 * count);
    struct sort_columns first = {scratch, halves};
    struct sort_columns second = {scratch + count, halves + count};
    for (size_t index = 0; index < count; index += 1) {
        first.keys[index] = source->disk_offsets[index];
        first.indexes[index] = (uint32_t)index;
    }
    sweep(source, sorted(first, second, count).indexes, halves + 2 * count, target);
    return HVR_OK;
}
