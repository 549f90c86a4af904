/* The transmission phase of NBD: read ahead, do what needs no rule, answer in batches.
 *
 * Requests that have come are done in turn; small writes that follow each other are done as one group: their
 * stripes are taken together, and their data goes to the log with one call. Replies gather in the output
 * buffer and leave before the thread waits for anything.
 */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#if !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif

#include "kernels.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_REPLY_MAGIC 0x67446698u
#define STRUCTURED_REPLY_MAGIC 0x668e33efu

enum {
    REQUEST_BYTES = 28,
    SIMPLE_REPLY_BYTES = 16,
    CHUNK_BYTES = 20,
    CHUNK_DONE = 1,
    CHUNK_OFFSET_DATA = 1,
    CHUNK_OFFSET_HOLE = 2,
    COMMAND_READ = 0,
    COMMAND_WRITE = 1,
    COMMAND_DISCONNECT = 2,
    FLAG_FUA = 1,
    FLAG_DF = 4,
    ERROR_PERMITTED = 1,
    ERROR_IO = 5,
    ERROR_MEMORY = 12,
    ERROR_INVALID = 22,
    ERROR_SPACE = 28,
    PAYLOAD_BYTES_MAX = 32 << 20,
    SMALL_BYTES_MAX = 64 << 10, /* longer writes are streamed through the buffer */
    GROUP_BYTES_MAX = 256 << 10,
    PIECE_BYTES_MAX = 512 << 10 /* of a streamed write: stays in the cache between socket and file */
};

/* Beside the events: go on with the next request. */
enum { GO_ON = -1 };

/* Beside errno: what was read does not count. */
enum { STALE = -1, ELSEWHERE = -2 };

/* hvr_nbd.phase */
enum { BETWEEN = 0, IN_SMALL = 1, IN_PAYLOAD = 2, IN_READ = 3, IN_FILL = 4 };

static uint16_t big16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t big32(const uint8_t *at)
{
    return __builtin_bswap32(load32(at));
}

static uint64_t big64(const uint8_t *at)
{
    return __builtin_bswap64(load64(at));
}

static void put32(uint8_t *at, uint32_t value)
{
    store32(at, __builtin_bswap32(value));
}

static void put64(uint8_t *at, uint64_t value)
{
    store64(at, __builtin_bswap64(value));
}

static uint32_t nbd_error(int error)
{
    switch (error) {
    case EPERM:
        return ERROR_PERMITTED;
    case ENOMEM:
        return ERROR_MEMORY;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return ERROR_SPACE;
    default:
        return ERROR_IO;
    }
}

/* ---- the socket ---- */

int hvr_nbd_send(struct hvr_nbd *c, const uint8_t *buf, size_t length)
{
    while (length > 0) {
        ssize_t moved = send(c->descriptor, buf, length, MSG_NOSIGNAL);
        if (moved < 0 && errno != EINTR) {
            return errno;
        }
        if (moved > 0) {
            buf += moved;
            length -= (size_t)moved;
        }
    }
    return 0;
}

static int flush_output(struct hvr_nbd *c)
{
    size_t length = (size_t)c->output_end;
    c->output_end = 0;
    c->error = hvr_nbd_send(c, c->output, length);
    return c->error == 0 ? GO_ON : HVR_NBD_BROKEN;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* As recv(), that sleeps only after it has looked for spin_ns: a client that waits for our answer sends its
 * next request sooner than a thread wakes up. */
static ssize_t receive_some(struct hvr_nbd *c, uint8_t *buf, size_t length)
{
    ssize_t moved = recv(c->descriptor, buf, length, MSG_DONTWAIT);
    if (moved >= 0 || c->spin_ns == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
        return moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? recv(c->descriptor, buf, length, 0)
                                                                      : moved;
    }
    for (uint64_t end_ns = now_ns() + c->spin_ns; now_ns() < end_ns;) {
        moved = recv(c->descriptor, buf, length, MSG_DONTWAIT);
        if (moved >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
            return moved;
        }
    }
    return recv(c->descriptor, buf, length, 0);
}

static uint64_t available(const struct hvr_nbd *c)
{
    return c->input_end - c->input_start;
}

/* Makes `want` bytes available, which the buffer has room for; sends the replies first. */
static int receive(struct hvr_nbd *c, uint64_t want)
{
    if (available(c) >= want) {
        return GO_ON;
    }
    if (c->output_end > 0 && flush_output(c) != GO_ON) {
        return HVR_NBD_BROKEN;
    }
    if (available(c) == 0) {
        c->input_start = c->input_end = 0;
    } else if (c->input_start + want > c->input_bytes || c->input_end + REQUEST_BYTES > c->input_bytes) {
        memmove(c->input, c->input + c->input_start, (size_t)available(c));
        c->input_end -= c->input_start;
        c->input_start = 0;
    }
    while (available(c) < want) {
        uint64_t room = c->input_bytes - c->input_end;
        if (c->phase == IN_PAYLOAD) {
            /* What comes behind would have to be moved to the buffer's start: only the next head is taken. */
            uint64_t wanted = want - available(c) + REQUEST_BYTES;
            room = wanted < room ? wanted : room;
        }
        ssize_t moved = receive_some(c, c->input + c->input_end, (size_t)room);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            c->error = moved < 0 ? errno : 0;
            int between = c->phase == BETWEEN && available(c) == 0 && moved == 0;
            return between ? HVR_NBD_CLOSED : HVR_NBD_BROKEN;
        }
        c->input_end += (uint64_t)moved;
    }
    return GO_ON;
}

static uint8_t *output_room(struct hvr_nbd *c, size_t length)
{
    if (c->output_end + length > c->output_bytes && flush_output(c) != GO_ON) {
        return NULL;
    }
    return c->output + c->output_end;
}

static int put_simple(struct hvr_nbd *c, uint32_t error)
{
    uint8_t *reply = output_room(c, SIMPLE_REPLY_BYTES);
    if (reply == NULL) {
        return HVR_NBD_BROKEN;
    }
    put32(reply, SIMPLE_REPLY_MAGIC);
    put32(reply + 4, error);
    store64(reply + 8, c->cookie);
    c->output_end += SIMPLE_REPLY_BYTES;
    return GO_ON;
}

static uint8_t *put_chunk(struct hvr_nbd *c, uint8_t *chunk, uint16_t type, uint32_t length)
{
    put32(chunk, STRUCTURED_REPLY_MAGIC);
    chunk[4] = 0;
    chunk[5] = CHUNK_DONE;
    chunk[6] = (uint8_t)(type >> 8);
    chunk[7] = (uint8_t)type;
    store64(chunk + 8, c->cookie);
    put32(chunk + 16, length);
    return chunk + CHUNK_BYTES;
}

/* ---- the disk ---- */

static int is_inside(const struct hvr_nbd_export *e, uint64_t offset, uint64_t length)
{
    return offset <= e->virtual_bytes && length <= e->virtual_bytes - offset;
}

/* Whether every block of a range has a place that counts as a whole. */
static int is_placed(const struct hvr_nbd_export *e, uint64_t offset, uint64_t length)
{
    struct hvr_place place;
    struct piece piece = {0, 0, 0, 0};
    for (; length > 0; offset += piece.length, length -= piece.length) {
        if (hvr_piece_at(e->map, offset, length, &piece, &place) != HVR_OK || !piece.present) {
            return 0;
        }
    }
    return 1;
}

/* Writes to blocks that are placed. Returns 0 or errno. */
static int write_range(const struct hvr_nbd_export *e, uint64_t offset, const uint8_t *data, uint64_t length)
{
    struct hvr_place place;
    struct piece piece = {0, 0, 0, 0};
    for (; length > 0; offset += piece.length, length -= piece.length, data += piece.length) {
        if (hvr_piece_at(e->map, offset, length, &piece, &place) != HVR_OK || !piece.present) {
            return EIO;
        }
        uint64_t done = 0;
        while (done < piece.length) {
            ssize_t moved = pwrite(e->descriptor, data + done, (size_t)(piece.length - done),
                                   (off_t)(piece.file_offset + done));
            if (moved < 0 && errno == EINTR) {
                continue;
            }
            if (moved <= 0) {
                return moved < 0 ? errno : EIO;
            }
            done += (uint64_t)moved;
        }
    }
    return 0;
}

/* Returns 0, errno, STALE or ELSEWHERE. */
static int read_under(const struct hvr_nbd *c, uint64_t offset, uint8_t *out, uint64_t length)
{
    int status = hvr_under_read(c->under, offset, out, length);
    if (status <= 0) {
        return -status;
    }
    if (status == HVR_ELSEWHERE) {
        return ELSEWHERE;
    }
    return status == HVR_STALE ? STALE : EIO;
}

/* Whether a block has nothing of its own, not even that it is zero: then what is under it counts. Asked before
 * the block's place is: one that gets its place meanwhile holds what was under it until that is written. */
static int is_open(const struct hvr_block_map *map, uint64_t offset)
{
    if (map == NULL) {
        return 0;
    }
    uint64_t block = offset / map->block_bytes;
    uint64_t index = block + (map->chunk_ratio > 0 ? block / map->chunk_ratio : 0);
    return index < map->entry_count && (map->entries[index] & BAT_STATE_MASK) == 0;
}

/* Whether a range can be read here; *all_zero: no block of it holds anything. */
static int is_readable(const struct hvr_nbd *c, uint64_t offset, uint64_t length, int *all_zero)
{
    const struct hvr_nbd_export *e = c->exported;
    struct hvr_place place;
    struct piece piece = {0, 0, 0, 0};
    *all_zero = c->under == NULL;
    if (e->descriptor < 0) {
        return c->under != NULL;
    }
    for (; length > 0; offset += piece.length, length -= piece.length) {
        if (hvr_piece_at(e->map, offset, length, &piece, &place) != HVR_OK) {
            return 0;
        }
        if (piece.present) {
            *all_zero = 0;
        } else if (piece.has_place || (e->has_parent && c->under == NULL)) {
            return 0;
        }
    }
    return 1;
}

/* Reads a range that is readable. Returns 0, errno, STALE or ELSEWHERE. */
static int read_range(const struct hvr_nbd *c, uint64_t offset, uint8_t *out, uint64_t length)
{
    const struct hvr_nbd_export *e = c->exported;
    struct hvr_place place;
    if (e->descriptor < 0) {
        return read_under(c, offset, out, length);
    }
    struct piece piece = {0, 0, 0, 0};
    for (; length > 0; offset += piece.length, length -= piece.length, out += piece.length) {
        int open = is_open(e->map, offset);
        if (hvr_piece_at(e->map, offset, length, &piece, &place) != HVR_OK) {
            return EIO;
        }
        if (!piece.present) {
            if (piece.has_place || (e->has_parent && c->under == NULL)) {
                return EIO;
            }
            if (c->under != NULL && open) {
                int error = read_under(c, offset, out, piece.length);
                if (error != 0) {
                    return error;
                }
            } else {
                memset(out, 0, (size_t)piece.length);
            }
            continue;
        }
        uint64_t done = 0;
        while (done < piece.length) {
            ssize_t moved = pread(e->descriptor, out + done, (size_t)(piece.length - done),
                                  (off_t)(piece.file_offset + done));
            if (moved < 0 && errno == EINTR) {
                continue;
            }
            if (moved <= 0) {
                return moved < 0 ? errno : EIO;
            }
            done += (uint64_t)moved;
        }
    }
    return 0;
}

/* ---- requests ---- */

struct request {
    uint16_t flags;
    uint16_t type;
    uint64_t cookie;
    uint64_t offset;
    uint64_t length;
};

static int parse(const uint8_t *at, struct request *request)
{
    if (big32(at) != REQUEST_MAGIC) {
        return 0;
    }
    *request = (struct request){big16(at + 4), big16(at + 6), load64(at + 8), big64(at + 16), big32(at + 24)};
    return 1;
}

static void make_current(struct hvr_nbd *c, const struct request *request)
{
    c->flags = request->flags;
    c->type = request->type;
    c->cookie = request->cookie;
    c->offset = request->offset;
    c->length = request->length;
    c->done = 0;
    c->failed = 0;
    c->requests += 1;
}

/* Ends the current write: answers it, or gives it to the caller for its flush. */
static int end_write(struct hvr_nbd *c)
{
    c->phase = BETWEEN;
    if (c->failed == 0 && (c->flags & FLAG_FUA) != 0) {
        return c->output_end > 0 && flush_output(c) != GO_ON ? HVR_NBD_BROKEN : HVR_NBD_FLUSH;
    }
    return put_simple(c, c->failed);
}

static int ask_for_piece(struct hvr_nbd *c, int reason)
{
    c->reason = reason;
    return c->output_end > 0 && flush_output(c) != GO_ON ? HVR_NBD_BROKEN : HVR_NBD_PIECE;
}

static int reason_against(const struct hvr_nbd_export *e, uint64_t offset, uint64_t length)
{
    int status = e->track == NULL ? HVR_TRACK_READY : hvr_track_check(e->track, offset, length);
    if (status != HVR_TRACK_READY) {
        return status == HVR_TRACK_ARM ? HVR_NBD_ARM : HVR_NBD_GUARDED;
    }
    return is_placed(e, offset, length) ? 0 : HVR_NBD_PLACE;
}

/* Say that the disk holds something that is not durable; before the reply, and after the write. */
static void note_written(const struct hvr_nbd_export *e)
{
    if (e->track != NULL && __atomic_load_n(&e->track->written, __ATOMIC_RELAXED) == 0) {
        __atomic_store_n(&e->track->written, 1, __ATOMIC_RELEASE);
    }
}

static uint32_t write_tracked(const struct hvr_nbd_export *e, const struct hvr_write *write)
{
    int error = write_range(e, write->disk_offset, write->data, write->length);
    if (error != 0 && e->track != NULL) {
        hvr_track_mark(e->track, write->disk_offset, write->length, 0); /* the disk may hold part of it */
    }
    return error == 0 ? 0 : nbd_error(error);
}

/* Finds the small writes at the start of the buffer that have come as a whole. */
static size_t find_group(const struct hvr_nbd *c, struct hvr_write *writes, struct request *requests)
{
    size_t count = 0;
    uint64_t total = 0;
    uint64_t at = c->input_start;
    while (count < HVR_WRITES_MAX && c->input_end - at >= REQUEST_BYTES) {
        struct request *request = requests + count;
        if (!parse(c->input + at, request) || request->type != COMMAND_WRITE
            || (request->flags & ~FLAG_FUA) != 0
            || request->length > SMALL_BYTES_MAX || request->length > c->input_end - at - REQUEST_BYTES
            || request->length == 0 || request->length + total > GROUP_BYTES_MAX
            || !is_inside(c->exported, request->offset, request->length)) {
            break;
        }
        writes[count] = (struct hvr_write){request->offset, request->length, c->input + at + REQUEST_BYTES};
        total += request->length;
        at += REQUEST_BYTES + request->length;
        count += 1;
        if ((request->flags & FLAG_FUA) != 0) {
            break;
        }
    }
    return count;
}

/* Does the small writes that have come. GO_ON with *found = 0 where the next request is none. */
static int do_group(struct hvr_nbd *c, size_t *found)
{
    const struct hvr_nbd_export *e = c->exported;
    struct hvr_write writes[HVR_WRITES_MAX];
    struct request requests[HVR_WRITES_MAX];
    size_t count = e->read_only ? 0 : find_group(c, writes, requests);
    *found = count;
    if (count == 0) {
        return GO_ON;
    }
    uint64_t mask = 0;
    for (size_t index = 0; index < count; index += 1) {
        mask |= hvr_stripes(writes[index].disk_offset, writes[index].length);
    }
    uint32_t errors[HVR_WRITES_MAX];
    size_t ready = 0;
    int reason = 0;
    hvr_gate_enter(e->gate, mask);
    for (; ready < count; ready += 1) {
        reason = reason_against(e, writes[ready].disk_offset, writes[ready].length);
        if (reason != 0) {
            break;
        }
    }
    if (ready > 0 && e->track != NULL) {
        hvr_track_writes(e->track, e->variant, writes, ready, hvr_time_stamp());
    }
    for (size_t index = 0; index < ready; index += 1) {
        errors[index] = write_tracked(e, writes + index);
    }
    if (ready > 0) {
        note_written(e);
    }
    hvr_gate_leave(e->gate, mask);
    for (size_t index = 0; index < ready; index += 1) {
        make_current(c, requests + index);
        c->failed = errors[index];
        c->input_start += REQUEST_BYTES + requests[index].length;
        int event = end_write(c);
        if (event != GO_ON) {
            return event; /* FLUSH is of the last one: a write with FUA ends its group */
        }
    }
    if (reason != 0) {
        make_current(c, requests + ready);
        c->piece = c->input + c->input_start + REQUEST_BYTES;
        c->piece_bytes = requests[ready].length;
        c->phase = IN_SMALL;
        return ask_for_piece(c, reason);
    }
    return GO_ON;
}

/* Takes the payload of the current write piece by piece; drops it where the write has failed. */
static int stream_write(struct hvr_nbd *c)
{
    const struct hvr_nbd_export *e = c->exported;
    while (c->done < c->length) {
        uint64_t rest = c->length - c->done;
        uint64_t want = rest < PIECE_BYTES_MAX ? rest : PIECE_BYTES_MAX;
        int event = receive(c, want);
        if (event != GO_ON) {
            return event;
        }
        if (c->failed == 0) {
            struct hvr_write write = {c->offset + c->done, want, c->input + c->input_start};
            uint64_t mask = hvr_stripes(write.disk_offset, want);
            hvr_gate_enter(e->gate, mask);
            int reason = reason_against(e, write.disk_offset, want);
            if (reason == 0) {
                if (e->track != NULL) {
                    hvr_track_stream(e->track, e->variant, &write, c->length, hvr_time_stamp());
                }
                c->failed = write_tracked(e, &write);
                note_written(e);
            }
            hvr_gate_leave(e->gate, mask);
            if (reason != 0) {
                c->piece = c->input + c->input_start;
                c->piece_bytes = want;
                return ask_for_piece(c, reason);
            }
        }
        c->input_start += want;
        c->done += want;
    }
    return end_write(c);
}

static int command(struct hvr_nbd *c)
{
    return c->output_end > 0 && flush_output(c) != GO_ON ? HVR_NBD_BROKEN : HVR_NBD_COMMAND;
}

/* Reads `length` bytes into room that is there, counted in. Returns 0, errno, STALE or ELSEWHERE. */
static int read_counted(const struct hvr_nbd *c, uint64_t offset, uint8_t *out, uint64_t length)
{
    hvr_read_enter(c->exported->gate);
    int error = read_range(c, offset, out, length);
    hvr_read_leave(c->exported->gate);
    return error;
}

/* Asks for another `under`; `done` says from where on the read is to be done again. */
static int ask_to_refresh(struct hvr_nbd *c)
{
    c->phase = IN_READ;
    return c->output_end > 0 && flush_output(c) != GO_ON ? HVR_NBD_BROKEN : HVR_NBD_REFRESH;
}

/* Sends what the output buffer had no room for. */
static int stream_read(struct hvr_nbd *c)
{
    while (c->done < c->length) {
        if (flush_output(c) != GO_ON) {
            return HVR_NBD_BROKEN;
        }
        uint64_t rest = c->length - c->done;
        uint64_t part = rest < c->output_bytes ? rest : c->output_bytes;
        int error = read_counted(c, c->offset + c->done, c->output, part);
        if (error == STALE) {
            return ask_to_refresh(c);
        }
        if (error == ELSEWHERE) {
            c->phase = IN_FILL;
            c->piece_bytes = part;
            return HVR_NBD_FILL;
        }
        if (error != 0) {
            c->error = error;
            return HVR_NBD_BROKEN; /* the head has promised bytes: only the line can say that they fail */
        }
        c->output_end = part;
        c->done += part;
    }
    return GO_ON;
}

static int do_read(struct hvr_nbd *c)
{
    const struct hvr_nbd_export *e = c->exported;
    int all_zero = 0;
    if ((c->flags & ~(FLAG_FUA | FLAG_DF)) != 0 || c->length == 0 || c->length > PAYLOAD_BYTES_MAX
        || !is_inside(e, c->offset, c->length)
        || !is_readable(c, c->offset, c->length, &all_zero)) {
        return command(c);
    }
    uint8_t *at = output_room(c, CHUNK_BYTES + 12);
    if (at == NULL) {
        return HVR_NBD_BROKEN;
    }
    if (all_zero && c->structured) {
        at = put_chunk(c, at, CHUNK_OFFSET_HOLE, 12);
        put64(at, c->offset);
        put32(at + 8, (uint32_t)c->length);
        c->output_end += CHUNK_BYTES + 12;
        return GO_ON;
    }
    uint64_t head = c->structured ? CHUNK_BYTES + 8 : SIMPLE_REPLY_BYTES;
    uint64_t whole = head + c->length;
    if (whole <= c->output_bytes && (at = output_room(c, (size_t)whole)) == NULL) {
        return HVR_NBD_BROKEN;
    }
    /* The first part is read before its head is believed: an error of it can still be told. */
    uint64_t room = c->output_bytes - c->output_end - head;
    uint64_t part = c->length < room ? c->length : room;
    int error = read_counted(c, c->offset, at + head, part);
    if (error == STALE) {
        return ask_to_refresh(c);
    }
    if (error != 0) {
        return command(c); /* the caller reads again, and tells the error */
    }
    if (c->structured) {
        put64(put_chunk(c, at, CHUNK_OFFSET_DATA, (uint32_t)(c->length + 8)), c->offset);
    } else if (put_simple(c, 0) != GO_ON) {
        return HVR_NBD_BROKEN;
    } else {
        c->output_end -= SIMPLE_REPLY_BYTES;
    }
    c->output_end += head + part;
    c->done = part;
    return stream_read(c);
}

/* Does the current read again, from where it was stale. */
static int resume_read(struct hvr_nbd *c)
{
    c->phase = BETWEEN;
    return c->done > 0 ? stream_read(c) : do_read(c);
}

/* Goes on with a read of which the caller has filled a part. */
static int resume_fill(struct hvr_nbd *c)
{
    c->phase = BETWEEN;
    c->output_end = c->piece_bytes;
    c->done += c->piece_bytes;
    return stream_read(c);
}

static int begin_write(struct hvr_nbd *c)
{
    if (c->length > PAYLOAD_BYTES_MAX) {
        return HVR_NBD_BROKEN;
    }
    if (c->exported->read_only) {
        c->failed = ERROR_PERMITTED;
    } else if (!is_inside(c->exported, c->offset, c->length)) {
        c->failed = ERROR_SPACE;
    } else if ((c->flags & ~FLAG_FUA) != 0) {
        c->failed = ERROR_INVALID;
    }
    c->phase = IN_PAYLOAD;
    return stream_write(c);
}

/* Does one request, or a group of writes. */
static int step(struct hvr_nbd *c)
{
    int event = receive(c, REQUEST_BYTES);
    if (event != GO_ON) {
        return event;
    }
    size_t found = 0;
    event = do_group(c, &found);
    if (event != GO_ON || found > 0) {
        return event;
    }
    struct request request;
    if (!parse(c->input + c->input_start, &request)) {
        return HVR_NBD_BROKEN;
    }
    if (request.type == COMMAND_WRITE && request.length <= SMALL_BYTES_MAX && request.length > 0
        && (request.flags & ~FLAG_FUA) == 0
        && !c->exported->read_only && is_inside(c->exported, request.offset, request.length)
        && available(c) < REQUEST_BYTES + request.length) {
        c->phase = IN_SMALL; /* for receive(): the line may not end here */
        event = receive(c, REQUEST_BYTES + request.length);
        c->phase = BETWEEN;
        return event;
    }
    c->input_start += REQUEST_BYTES;
    make_current(c, &request);
    switch (request.type) {
    case COMMAND_READ:
        return do_read(c);
    case COMMAND_WRITE:
        return begin_write(c);
    case COMMAND_DISCONNECT:
        return c->output_end > 0 && flush_output(c) != GO_ON ? HVR_NBD_BROKEN : HVR_NBD_CLOSED;
    default:
        return command(c);
    }
}

/* Goes on after the caller has looked at a piece. */
static int resume(struct hvr_nbd *c, int written)
{
    c->reason = 0;
    if (c->phase == IN_SMALL) {
        c->phase = BETWEEN;
        if (!written) {
            c->requests -= 1; /* it is parsed again */
            return GO_ON;
        }
        c->input_start += REQUEST_BYTES + c->piece_bytes;
        return end_write(c);
    }
    if (written) {
        c->input_start += c->piece_bytes;
        c->done += c->piece_bytes;
    }
    return stream_write(c);
}

int hvr_nbd_serve(struct hvr_nbd *c, int written)
{
    c->error = 0;
    int event = GO_ON;
    if (c->phase == IN_READ) {
        event = resume_read(c);
    } else if (c->phase == IN_FILL) {
        event = resume_fill(c);
    } else if (c->reason != 0) {
        event = resume(c, written);
    }
    while (event == GO_ON) {
        event = step(c);
    }
    return event;
}
