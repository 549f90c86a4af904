/* Live tracking: the gate, the bitmaps of an epoch, the log that grows, and the cut. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* pwritev */
#endif
#if !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif

#include "kernels.h"

#include <errno.h>
#include <sched.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#define ALL_STRIPES UINT64_MAX
#define STRIPE_COUNT 64u
#define SECONDS_TO_2000 946684800 /* [MS-HRL] 2.2: time stamps begin with the year 2000 */

enum {
    ENTRY_BYTES = 32,
    METADATA_HEADER_BYTES = 32,
    METADATA_BYTES = 4096, /* of the logs that are written here */
    CLOCK_SLACK_US = 16,   /* moments run ahead of the clock by one for each flush that is followed at once */
    SECTOR_BYTES = 512
};

/* ---- waiting, for what is held for microseconds ---- */

static void pause_after(unsigned tries)
{
    if (tries < 64) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else if (tries < 256) {
        sched_yield();
    } else {
        struct timespec moment = {0, 20000};
        nanosleep(&moment, NULL);
    }
}

static void lock(uint32_t *word)
{
    for (unsigned tries = 0; __atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE) != 0; tries += 1) {
        pause_after(tries);
    }
}

static void unlock(uint32_t *word)
{
    __atomic_store_n(word, 0, __ATOMIC_RELEASE);
}

/* ---- the gate ---- */

void hvr_gate_enter(struct hvr_gate *gate, uint64_t mask)
{
    for (unsigned tries = 0;; tries += 1) {
        uint64_t held = __atomic_load_n(&gate->stripes, __ATOMIC_RELAXED);
        if ((held & mask) == 0 && __atomic_load_n(&gate->closing, __ATOMIC_ACQUIRE) == 0
            && __atomic_compare_exchange_n(&gate->stripes, &held, held | mask, 0, __ATOMIC_ACQUIRE,
                                           __ATOMIC_RELAXED)) {
            return;
        }
        pause_after(tries);
    }
}

void hvr_gate_leave(struct hvr_gate *gate, uint64_t mask)
{
    __atomic_fetch_and(&gate->stripes, ~mask, __ATOMIC_RELEASE);
}

void hvr_gate_close(struct hvr_gate *gate, int bar_readers)
{
    lock(&gate->closing);
    for (unsigned tries = 0;; tries += 1) {
        uint64_t nobody = 0;
        if (__atomic_compare_exchange_n(&gate->stripes, &nobody, ALL_STRIPES, 0, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED)) {
            break;
        }
        pause_after(tries);
    }
    if (bar_readers) {
        __atomic_store_n(&gate->barred, 1, __ATOMIC_SEQ_CST);
        for (unsigned tries = 0; __atomic_load_n(&gate->readers, __ATOMIC_SEQ_CST) != 0; tries += 1) {
            pause_after(tries);
        }
    }
}

void hvr_gate_open(struct hvr_gate *gate)
{
    __atomic_store_n(&gate->barred, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&gate->stripes, 0, __ATOMIC_RELEASE);
    unlock(&gate->closing);
}

void hvr_read_enter(struct hvr_gate *gate)
{
    for (unsigned tries = 0;; tries += 1) {
        __atomic_fetch_add(&gate->readers, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&gate->barred, __ATOMIC_SEQ_CST) == 0) {
            return;
        }
        __atomic_fetch_sub(&gate->readers, 1, __ATOMIC_SEQ_CST);
        pause_after(tries);
    }
}

void hvr_read_leave(struct hvr_gate *gate)
{
    __atomic_fetch_sub(&gate->readers, 1, __ATOMIC_RELEASE);
}

uint64_t hvr_stripes(uint64_t disk_offset, uint64_t length)
{
    if (length == 0) {
        return 0;
    }
    uint64_t first = disk_offset / HVR_GRAIN_BYTES;
    uint64_t count = (disk_offset + length - 1) / HVR_GRAIN_BYTES - first + 1;
    if (count >= STRIPE_COUNT) {
        return ALL_STRIPES;
    }
    uint64_t mask = (UINT64_C(1) << count) - 1;
    unsigned shift = (unsigned)(first % STRIPE_COUNT);
    return shift == 0 ? mask : mask << shift | mask >> (STRIPE_COUNT - shift);
}

/* ---- bitmaps that threads share, as little-endian words ---- */

/* The bits of [first, end) that lie in word `index`. */
static uint64_t word_mask(uint64_t index, uint64_t first, uint64_t end)
{
    uint64_t mask = UINT64_MAX;
    if (index == first / 64) {
        mask <<= first % 64;
    }
    if (index == (end - 1) / 64) {
        mask &= UINT64_MAX >> (63 - (end - 1) % 64);
    }
    return mask;
}

static uint64_t *words_of(uint8_t *bitmap)
{
    return (uint64_t *)(void *)bitmap;
}

static const uint64_t *const_words_of(const uint8_t *bitmap)
{
    return (const uint64_t *)(const void *)bitmap;
}

static void set_bits(uint8_t *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t index = first / 64; index <= (end - 1) / 64; index += 1) {
        uint64_t *word = words_of(bitmap) + index;
        uint64_t mask = word_mask(index, first, end);
        if ((__atomic_load_n(word, __ATOMIC_RELAXED) & mask) != mask) {
            __atomic_fetch_or(word, mask, __ATOMIC_RELAXED);
        }
    }
}

static int any_bit(const uint8_t *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t index = first / 64; index <= (end - 1) / 64; index += 1) {
        if (__atomic_load_n(const_words_of(bitmap) + index, __ATOMIC_ACQUIRE)
            & word_mask(index, first, end)) {
            return 1;
        }
    }
    return 0;
}

static int all_bits(const uint8_t *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t index = first / 64; index <= (end - 1) / 64; index += 1) {
        uint64_t mask = word_mask(index, first, end);
        if ((__atomic_load_n(const_words_of(bitmap) + index, __ATOMIC_ACQUIRE) & mask) != mask) {
            return 0;
        }
    }
    return 1;
}

void hvr_grains_clear(uint8_t *bitmap, uint64_t first, uint64_t count)
{
    if (count == 0) {
        return;
    }
    for (uint64_t index = first / 64; index <= (first + count - 1) / 64; index += 1) {
        __atomic_fetch_and(words_of(bitmap) + index, ~word_mask(index, first, first + count),
                           __ATOMIC_RELEASE);
    }
}

/* A region is one word of a bitmap of grains. */
void hvr_grains_merge(uint8_t *bitmap, const uint8_t *other, const uint8_t *touched, size_t region_bytes)
{
    _Static_assert(HVR_REGION_BYTES / HVR_GRAIN_BYTES == 64, "a region is a word of grains");
    for (size_t at = 0; at < region_bytes; at += 1) {
        for (unsigned bits = touched[at]; bits != 0; bits &= bits - 1) {
            size_t region = at * 8 + (size_t)__builtin_ctz(bits);
            uint64_t found = const_words_of(other)[region];
            if (found != 0) {
                __atomic_fetch_or(words_of(bitmap) + region, found, __ATOMIC_RELAXED);
            }
        }
    }
}

/* ---- tracking ---- */

int hvr_track_check(const struct hvr_track *track, uint64_t disk_offset, uint64_t length)
{
    if (length == 0) {
        return HVR_TRACK_READY;
    }
    uint64_t last = disk_offset + length - 1;
    if (!all_bits(track->armed, disk_offset / HVR_REGION_BYTES, last / HVR_REGION_BYTES + 1)) {
        return HVR_TRACK_ARM;
    }
    const uint8_t *guard = __atomic_load_n(&track->guard, __ATOMIC_ACQUIRE);
    if (guard != NULL && any_bit(guard, disk_offset / HVR_GRAIN_BYTES, last / HVR_GRAIN_BYTES + 1)) {
        return HVR_TRACK_GUARDED;
    }
    return HVR_TRACK_READY;
}

int hvr_track_mark(struct hvr_track *track, uint64_t disk_offset, uint64_t length, int logged)
{
    if (length == 0) {
        return HVR_OK;
    }
    if (disk_offset > INT64_MAX || length > INT64_MAX - disk_offset) {
        return HVR_OUT_OF_RANGE;
    }
    uint64_t first = disk_offset / HVR_GRAIN_BYTES;
    uint64_t end = (disk_offset + length - 1) / HVR_GRAIN_BYTES + 1;
    uint64_t end_region = (disk_offset + length - 1) / HVR_REGION_BYTES + 1;
    if (end > track->map_bytes * 8 || end_region > track->region_bytes * 8) {
        return HVR_OUT_OF_RANGE;
    }
    struct hvr_epoch *epoch = track->epoch;
    set_bits(epoch->touched, disk_offset / HVR_REGION_BYTES, end_region);
    set_bits(epoch->dirty, first, end);
    set_bits(logged ? epoch->logged : epoch->unlogged, first, end);
    return HVR_OK;
}

int hvr_track_take_written(struct hvr_track *track)
{
    return __atomic_exchange_n(&track->written, 0, __ATOMIC_ACQ_REL) != 0;
}

uint32_t hvr_time_stamp(void)
{
    return (uint32_t)(time(NULL) - SECONDS_TO_2000);
}

/* ---- the moments of a log ---- */

static uint64_t unix_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

/* Whether the slots are 1, 10, 100 ... long, and not 2, 20, 200 ... */
static int is_power_of_ten(uint64_t slot_us)
{
    while (slot_us % 10 == 0) {
        slot_us /= 10;
    }
    return slot_us == 1;
}

/* Makes slots longer until a quarter of the rows is free; keeps the first row of each, or the last. */
static void thin_out(struct hvr_marks *marks, int keep_last)
{
    while (marks->count > marks->capacity - marks->capacity / 4) {
        marks->slot_us *= is_power_of_ten(marks->slot_us) ? 2 : 5;
        uint64_t kept = 0;
        uint64_t next_us = 0;
        for (uint64_t at = 0; at < marks->count; at += 1) {
            struct hvr_mark row = marks->rows[at];
            if (kept == 0 || row.time_us >= next_us) {
                next_us = (row.time_us / marks->slot_us + 1) * marks->slot_us;
                marks->rows[kept++] = row;
            } else if (keep_last) {
                marks->rows[kept - 1] = row;
            }
        }
        marks->count = kept;
        marks->next_us = next_us;
    }
}

static void add_mark(struct hvr_marks *marks, struct hvr_mark mark, int keep_last)
{
    if (marks->count > 0 && mark.time_us < marks->next_us) {
        if (keep_last) {
            marks->rows[marks->count - 1] = mark;
        }
        return;
    }
    if (marks->count == marks->capacity) {
        thin_out(marks, keep_last);
        add_mark(marks, mark, keep_last);
        return;
    }
    marks->rows[marks->count++] = mark;
    marks->next_us = (mark.time_us / marks->slot_us + 1) * marks->slot_us;
}

/* Returns the moment that it is for a log, which is locked. What comes behind a flush is later than it. */
static uint64_t moment_of(struct hvr_log *log)
{
    uint64_t now_us = unix_us();
    if (now_us < log->last_us) {
        if (now_us + CLOCK_SLACK_US < log->last_us) {
            log->clock_back = 1;
        }
        now_us = log->last_us;
    }
    if (now_us <= log->flushed_us) {
        now_us = log->flushed_us + 1;
    }
    log->last_us = now_us;
    return now_us;
}

void hvr_note_flush(struct hvr_gate *gate, struct hvr_track **tracks, size_t count)
{
    int is_new = 0;
    hvr_gate_enter(gate, 1); /* any stripe keeps a cut away */
    for (size_t index = 0; index < count; index += 1) {
        lock(&tracks[index]->epoch->log.lock);
    }
    uint64_t now_us = 0;
    for (size_t index = 0; index < count; index += 1) {
        struct hvr_log *log = &tracks[index]->epoch->log;
        const struct hvr_marks *flushes = &log->flushes;
        is_new |= flushes->capacity > 0
                  && (flushes->count == 0 || flushes->rows[flushes->count - 1].entries != log->entries);
        uint64_t own_us = moment_of(log);
        now_us = own_us > now_us ? own_us : now_us;
    }
    for (size_t index = 0; index < count; index += 1) {
        struct hvr_log *log = &tracks[index]->epoch->log;
        if (is_new && log->flushes.capacity > 0) {
            log->last_us = log->flushed_us = now_us;
            add_mark(&log->flushes, (struct hvr_mark){log->entries, now_us}, 1);
        }
    }
    for (size_t index = 0; index < count; index += 1) {
        unlock(&tracks[index]->epoch->log.lock);
    }
    hvr_gate_leave(gate, 1);
}

static int is_loggable(const struct hvr_log *log, const struct hvr_write *write)
{
    return (write->disk_offset | write->length) % SECTOR_BYTES == 0 && write->length <= log->write_bytes_max
           && write->length > 0;
}

/* Seals the pending block into `block`; the log is locked. */
static void seal_block(struct hvr_log *log, uint8_t *block)
{
    uint8_t *header = log->pending;
    memset(header, 0, METADATA_HEADER_BYTES);
    store64(header, log->position - log->last_block);
    store32(header + 8, (uint32_t)log->pending_count);
    uint32_t sum = 0;
    for (size_t at = 0; at < 12; at += 1) {
        sum += header[at];
    }
    store32(header + 12, ~sum);
    memcpy(block, log->pending, METADATA_BYTES);
    log->last_block = log->position;
    log->position += METADATA_BYTES;
    log->blocks += 1;
    log->pending_count = 0;
    memset(log->pending, 0, METADATA_BYTES);
}

static int write_parts(int descriptor, struct iovec *parts, int count, uint64_t offset)
{
    while (count > 0) {
        ssize_t moved = pwritev(descriptor, parts, count, (off_t)offset);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            return moved < 0 ? errno : EIO;
        }
        offset += (uint64_t)moved;
        size_t rest = (size_t)moved;
        while (count > 0 && rest >= parts->iov_len) {
            rest -= parts->iov_len;
            parts += 1;
            count -= 1;
        }
        if (rest > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + rest;
            parts->iov_len -= rest;
        }
    }
    return 0;
}

/* Appends writes that can be logged; returns whether the log has them. */
static int append(struct hvr_log *log, int variant, const struct hvr_write *writes, size_t count,
                  uint32_t time_stamp)
{
    uint64_t rows[2 * HVR_WRITES_MAX];
    uint64_t sums[HVR_WRITES_MAX];
    uint8_t packed[ENTRY_BYTES * HVR_WRITES_MAX];
    uint8_t block[METADATA_BYTES];
    struct iovec parts[HVR_WRITES_MAX + 1];
    uint64_t most = METADATA_BYTES;
    for (size_t index = 0; index < count; index += 1) {
        rows[2 * index] = writes[index].disk_offset;
        rows[2 * index + 1] = writes[index].length;
        sums[index] = (uint32_t)~hvr_byte_sum(variant, writes[index].data, (size_t)writes[index].length);
        most += writes[index].length;
    }
    if (hvr_hrl_pack(rows, sums, count, time_stamp, packed) != HVR_OK) {
        return 0;
    }
    lock(&log->lock);
    if (log->state != HVR_LOG_OPEN) {
        unlock(&log->lock);
        return 0;
    }
    if (most > log->limit || log->position > log->limit - most) {
        log->state = HVR_LOG_FULL;
        unlock(&log->lock);
        return 0;
    }
    if (log->ticks.capacity > 0) {
        uint64_t now_us = moment_of(log);
        uint32_t second = (uint32_t)(now_us / 1000000u - SECONDS_TO_2000);
        if (now_us >= log->ticks.next_us) {
            add_mark(&log->ticks, (struct hvr_mark){log->entries, now_us}, 0);
        }
        if (second != time_stamp) { /* rarely: it was read before the lock was taken */
            hvr_hrl_pack(rows, sums, count, second, packed);
        }
    }
    uint64_t start = log->position;
    int part = 0;
    uint64_t capacity = (METADATA_BYTES - METADATA_HEADER_BYTES) / ENTRY_BYTES;
    for (size_t index = 0; index < count; index += 1) {
        /* iovec has no const */
        parts[part++] = (struct iovec){(void *)(uintptr_t)writes[index].data, (size_t)writes[index].length};
        memcpy(log->pending + METADATA_HEADER_BYTES + log->pending_count * ENTRY_BYTES,
               packed + index * ENTRY_BYTES, ENTRY_BYTES);
        log->pending_count += 1;
        log->position += writes[index].length;
        log->entries += 1;
        log->data_bytes += writes[index].length;
        if (log->pending_count == capacity) {
            seal_block(log, block); /* once at most: a block holds more entries than come together */
            parts[part++] = (struct iovec){block, METADATA_BYTES};
        }
    }
    unlock(&log->lock);
    int error = write_parts(log->descriptor, parts, part, start);
    if (error != 0) {
        lock(&log->lock);
        log->state = HVR_LOG_FAILED;
        log->error = error;
        unlock(&log->lock);
    }
    return error == 0;
}

void hvr_track_writes(struct hvr_track *track, int variant, const struct hvr_write *writes, size_t count,
                      uint32_t time_stamp)
{
    struct hvr_log *log = &track->epoch->log;
    struct hvr_write chosen[HVR_WRITES_MAX];
    size_t chosen_count = 0;
    uint64_t bytes = 0;
    int is_open = __atomic_load_n(&log->state, __ATOMIC_RELAXED) == HVR_LOG_OPEN;
    for (size_t index = 0; index < count; index += 1) {
        if (is_open && is_loggable(log, writes + index)) {
            chosen[chosen_count++] = writes[index];
        }
        bytes += writes[index].length;
    }
    int logged = chosen_count > 0 && append(log, variant, chosen, chosen_count, time_stamp);
    for (size_t index = 0; index < count; index += 1) {
        hvr_track_mark(track, writes[index].disk_offset, writes[index].length,
                       logged && is_loggable(log, writes + index));
    }
    __atomic_fetch_add(&track->writes, count, __ATOMIC_RELAXED);
    __atomic_fetch_add(&track->written_bytes, bytes, __ATOMIC_RELAXED);
}

void hvr_track_stream(struct hvr_track *track, int variant, const struct hvr_write *write, uint64_t whole,
                      uint32_t time_stamp)
{
    if (whole <= track->epoch->log.write_bytes_max) {
        hvr_track_writes(track, variant, write, 1, time_stamp);
        return;
    }
    hvr_track_mark(track, write->disk_offset, write->length, 0);
    __atomic_fetch_add(&track->writes, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&track->written_bytes, write->length, __ATOMIC_RELAXED);
}

void hvr_track_write(struct hvr_track *track, int variant, uint64_t disk_offset, const uint8_t *data,
                     uint64_t length, uint32_t time_stamp)
{
    struct hvr_write write = {disk_offset, length, data};
    hvr_track_writes(track, variant, &write, 1, time_stamp);
}

/* ---- the cut ---- */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void hvr_cut(struct hvr_gate *gate, struct hvr_track **tracks, struct hvr_epoch **next, uint8_t **disarmed,
             size_t count, uint64_t *held_ns)
{
    uint64_t start_ns = now_ns();
    hvr_gate_close(gate, 0);
    uint64_t ended_us = unix_us();
    for (size_t index = 0; index < count; index += 1) {
        struct hvr_track *track = tracks[index];
        struct hvr_epoch *old = track->epoch;
        if (old->log.state == HVR_LOG_FAILED) {
            hvr_grains_merge(old->unlogged, old->dirty, old->touched, (size_t)track->region_bytes);
        }
        for (size_t at = 0; at < track->region_bytes / 8; at += 1) {
            uint64_t *armed = words_of(track->armed) + at;
            uint64_t gone = __atomic_load_n(armed, __ATOMIC_RELAXED) & ~const_words_of(old->touched)[at];
            if (gone != 0) {
                __atomic_fetch_and(armed, ~gone, __ATOMIC_RELAXED);
                words_of(disarmed[index])[at] = gone;
            }
        }
        old->ended_us = ended_us;
        track->epoch = next[index];
        __atomic_store_n(&track->guard, old->unlogged, __ATOMIC_RELEASE);
    }
    hvr_gate_open(gate);
    *held_ns = now_ns() - start_ns;
}
