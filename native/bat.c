/* The BAT of a VHDX: states, bits, and who claims which unit of the file. */
#include "kernels.h"

enum { STATE_MASK = 7, OFFSET_SHIFT = 20, AHEAD = 24 };
static const uint64_t reserved_mask = 0xffff8;

enum {
    NOT_PRESENT = 0,
    UNDEFINED = 1,
    ZERO = 2,
    UNMAPPED = 3,
    UNMAPPED_V095 = 5, /* UNMAPPED before the format was final */
    FULLY_PRESENT = 6,
    PARTIALLY_PRESENT = 7
};

static void report(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, unsigned fault,
                   uint64_t index, uint64_t entry)
{
    if (walk->faults[fault] < rules->list_max && walk->finding_count < walk->capacity) {
        struct hvr_bat_finding *finding = walk->findings + walk->finding_count;
        finding->index = index;
        finding->entry = entry;
        finding->fault = fault;
        walk->finding_count += 1;
    }
    walk->faults[fault] += 1;
}

/* Set bits [first, first + count), which are inside; return whether any was set before. */
static int claim(uint8_t *bitmap, uint64_t first, uint64_t count)
{
    unsigned before = 0;
    while (count != 0) {
        unsigned shift = (unsigned)(first % 8);
        unsigned here = count < 8 - shift ? (unsigned)count : 8 - shift;
        unsigned mask = ((1u << here) - 1) << shift;
        before |= bitmap[first / 8] & mask;
        bitmap[first / 8] = (uint8_t)(bitmap[first / 8] | mask);
        first += here;
        count -= here;
    }
    return before != 0;
}

/* Blocks in a random order touch a random byte of claims each: ask for it before its turn comes. */
static inline void prefetch_claim(const struct hvr_bat_rules *rules, const struct hvr_bat_walk *walk,
                                  uint64_t entry)
{
    uint64_t unit = entry >> OFFSET_SHIFT;
    if (unit < rules->file_units) {
        __builtin_prefetch(walk->claims + unit / 8, 1);
    }
}

static void check_place(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, uint64_t index,
                        uint64_t entry, uint64_t units)
{
    uint64_t unit = entry >> OFFSET_SHIFT;
    if ((entry & reserved_mask) != 0) {
        report(rules, walk, HVR_BAT_RESERVED, index, entry);
    }
    if (units > rules->file_units || unit > rules->file_units - units) {
        report(rules, walk, HVR_BAT_OUTSIDE, index, entry);
    } else if (claim(walk->claims, unit, units)) {
        report(rules, walk, HVR_BAT_SHARED, index, entry);
    }
}

static void check_loose(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, uint64_t index,
                        uint64_t entry)
{
    uint64_t unit = entry >> OFFSET_SHIFT;
    if ((entry & reserved_mask) != 0) {
        report(rules, walk, HVR_BAT_STALE, index, entry);
    }
    if (unit == 0) {
        return;
    }
    if (rules->block_units > rules->file_units || unit > rules->file_units - rules->block_units) {
        report(rules, walk, HVR_BAT_ANCHOR_OUTSIDE, index, entry);
    } else {
        claim(walk->anchors, unit, rules->block_units);
    }
}

static void check_payload(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, uint64_t index,
                          uint64_t entry)
{
    unsigned state = (unsigned)(entry & STATE_MASK);
    walk->states[state] += 1;
    switch (state) {
    case PARTIALLY_PRESENT:
        if (!rules->has_parent) {
            report(rules, walk, HVR_BAT_STATE, index, entry);
        } else if (walk->partial_index == UINT64_MAX) {
            walk->partial_index = index;
        }
        check_place(rules, walk, index, entry, rules->block_units);
        break;
    case FULLY_PRESENT:
        check_place(rules, walk, index, entry, rules->block_units);
        break;
    case NOT_PRESENT:
    case ZERO:
        if (entry > STATE_MASK) {
            report(rules, walk, HVR_BAT_STALE, index, entry);
        }
        break;
    case UNDEFINED:
    case UNMAPPED:
    case UNMAPPED_V095:
        check_loose(rules, walk, index, entry);
        break;
    default:
        report(rules, walk, HVR_BAT_STATE, index, entry);
    }
}

static void end_chunk(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, uint64_t entry)
{
    if (walk->partial_index != UINT64_MAX) {
        report(rules, walk, HVR_BAT_NO_BITMAP, walk->partial_index, entry);
        walk->partial_index = UINT64_MAX;
    }
}

static void check_bitmap(const struct hvr_bat_rules *rules, struct hvr_bat_walk *walk, uint64_t index,
                         uint64_t entry)
{
    unsigned state = (unsigned)(entry & STATE_MASK);
    if (!rules->has_parent) {
        if (entry != 0) {
            report(rules, walk, HVR_BAT_UNUSED, index, entry);
        }
    } else if (state == FULLY_PRESENT || state == PARTIALLY_PRESENT) {
        walk->partial_index = UINT64_MAX;
        walk->bitmap_blocks += 1;
        check_place(rules, walk, index, entry, 1);
    } else {
        if (state != NOT_PRESENT) {
            report(rules, walk, HVR_BAT_STATE, index, entry);
        } else if (entry != 0) {
            report(rules, walk, HVR_BAT_STALE, index, entry);
        }
        end_chunk(rules, walk, entry);
    }
}

int hvr_bat_check(const uint64_t *entries, size_t count, uint64_t first, const struct hvr_bat_rules *rules,
                  struct hvr_bat_walk *walk)
{
    uint64_t chunk_entries = rules->chunk_ratio + 1;
    if (walk->bitmap_bytes > UINT64_MAX / 8 || rules->file_units > (uint64_t)walk->bitmap_bytes * 8) {
        return HVR_LENGTH;
    }
    uint64_t place = first % chunk_entries;
    uint64_t block = first / chunk_entries * rules->chunk_ratio + place;
    if (walk->partial_index != UINT64_MAX && walk->partial_index / chunk_entries != first / chunk_entries) {
        end_chunk(rules, walk, 0);
    }
    for (size_t at = 0; at < count; at += 1) {
        uint64_t entry = entries[at];
        if (count - at > AHEAD) {
            prefetch_claim(rules, walk, entries[at + AHEAD]);
        }
        if (place == rules->chunk_ratio) {
            check_bitmap(rules, walk, first + at, entry);
            place = 0;
            continue;
        }
        if (block < rules->block_count) {
            check_payload(rules, walk, first + at, entry);
        } else if (entry != 0) {
            report(rules, walk, HVR_BAT_UNUSED, first + at, entry);
        }
        block += 1;
        place += 1;
    }
    return HVR_OK;
}
