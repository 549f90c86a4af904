/* The bytes of a disk through its block map: pieces that follow each other in the file become one call. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* preadv */
#endif
#if !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif

#include "kernels.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define ZERO_PIECE UINT64_MAX

enum {
    CALL_BYTES_MAX = 1 << 30, /* Linux moves at most 2^31 - 4096 bytes a call */
    PARTS_MAX = 1024,         /* IOV_MAX of Linux, macOS and the BSDs */
    FILE_TARGET = 0,
    FILE_SOURCE = 1
};

/* Bytes that follow each other in the buffer and in the file, not yet moved. */
struct pending {
    uint64_t file_offset;
    size_t at;
    size_t length;
};

struct file_place {
    int descriptor;
    int file;
    struct hvr_place *place;
};

/* Goes through all pieces without touching the files. */
static int check_extents(const struct hvr_block_map *map, const uint64_t *extents, size_t count,
                         int all_placed, struct hvr_place *place)
{
    for (size_t row = 0; row < count; row += 1) {
        uint64_t offset = extents[2 * row];
        uint64_t length = extents[2 * row + 1];
        struct piece piece = {0, 0, 0, 0};
        if (length == 0 && (offset > INT64_MAX)) {
            return HVR_OUT_OF_RANGE;
        }
        for (; length > 0; offset += piece.length, length -= piece.length) {
            int status = hvr_piece_at(map, offset, length, &piece, place);
            if (status != HVR_OK) {
                return status;
            }
            if (all_placed && !piece.has_place) {
                return HVR_ABSENT;
            }
        }
    }
    return HVR_OK;
}

static int check_length(const uint64_t *extents, size_t count, size_t length)
{
    for (size_t row = 0; row < count; row += 1) {
        if (extents[2 * row + 1] > length) {
            return HVR_LENGTH;
        }
        length -= (size_t)extents[2 * row + 1];
    }
    return length == 0 ? HVR_OK : HVR_LENGTH;
}

static int stopped(const struct file_place *file, uint64_t offset, int status)
{
    file->place->file = file->file;
    file->place->offset = offset;
    return status;
}

static int read_fully(const struct file_place *file, uint8_t *buf, size_t length, uint64_t offset)
{
    while (length > 0) {
        ssize_t moved = pread(file->descriptor, buf, smaller(length, CALL_BYTES_MAX), (off_t)offset);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            return stopped(file, offset, moved < 0 ? -errno : HVR_TRUNCATED);
        }
        buf += moved;
        length -= (size_t)moved;
        offset += (uint64_t)moved;
    }
    return HVR_OK;
}

static int write_fully(const struct file_place *file, const uint8_t *buf, size_t length, uint64_t offset)
{
    while (length > 0) {
        ssize_t moved = pwrite(file->descriptor, buf, smaller(length, CALL_BYTES_MAX), (off_t)offset);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            return stopped(file, offset, moved < 0 ? -errno : -EIO);
        }
        buf += moved;
        length -= (size_t)moved;
        offset += (uint64_t)moved;
    }
    return HVR_OK;
}

/* Fills the vectors one after another; they are used up. */
static int read_vectors(const struct file_place *file, struct iovec *vectors, size_t count, uint64_t offset)
{
    while (count > 0) {
        ssize_t moved = preadv(file->descriptor, vectors, (int)count, (off_t)offset);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            return stopped(file, offset, moved < 0 ? -errno : HVR_TRUNCATED);
        }
        offset += (uint64_t)moved;
        size_t rest = (size_t)moved;
        while (count > 0 && rest >= vectors->iov_len) {
            rest -= vectors->iov_len;
            vectors += 1;
            count -= 1;
        }
        if (rest > 0) {
            vectors->iov_base = (uint8_t *)vectors->iov_base + rest;
            vectors->iov_len -= rest;
        }
    }
    return HVR_OK;
}

/* Lengthens `pending` by what follows it in file and buffer; returns 0 where it does not. */
static int joined(struct pending *pending, uint64_t file_offset, size_t at, size_t length)
{
    if (pending->length == 0) {
        *pending = (struct pending){file_offset, at, length};
        return 1;
    }
    if (pending->file_offset + pending->length != file_offset || pending->at + pending->length != at) {
        return 0;
    }
    pending->length += length;
    return 1;
}

static int read_pending(const struct file_place *file, uint8_t *out, struct pending *pending)
{
    size_t length = pending->length;
    pending->length = 0;
    return read_fully(file, out + pending->at, length, pending->file_offset);
}

static int write_pending(const struct file_place *file, const uint8_t *data, struct pending *pending)
{
    size_t length = pending->length;
    pending->length = 0;
    return write_fully(file, data + pending->at, length, pending->file_offset);
}

int hvr_read_extents(int descriptor, const struct hvr_block_map *map, const uint64_t *extents, size_t count,
                     uint8_t *out, size_t length, struct hvr_place *place)
{
    const struct file_place file = {descriptor, FILE_TARGET, place};
    struct pending pending = {0, 0, 0};
    int status = check_length(extents, count, length);
    if (status == HVR_OK) {
        status = check_extents(map, extents, count, 0, place);
    }
    size_t at = 0;
    for (size_t row = 0; status == HVR_OK && row < count; row += 1) {
        uint64_t offset = extents[2 * row];
        uint64_t rest = extents[2 * row + 1];
        struct piece piece = {0, 0, 0, 0};
        for (; status == HVR_OK && rest > 0;
             offset += piece.length, rest -= piece.length, at += (size_t)piece.length) {
            status = hvr_piece_at(map, offset, rest, &piece, place);
            if (status != HVR_OK) {
                break;
            }
            if (!piece.present) {
                memset(out + at, 0, (size_t)piece.length);
            } else if (!joined(&pending, piece.file_offset, at, (size_t)piece.length)) {
                status = read_pending(&file, out, &pending);
                joined(&pending, piece.file_offset, at, (size_t)piece.length);
            }
        }
    }
    return status == HVR_OK ? read_pending(&file, out, &pending) : status;
}

/* Zero pieces are filled here; the rest passes through `pending`. */
int hvr_read_pieces(int descriptor, const uint64_t *pieces, size_t count, uint8_t *out, size_t length,
                    struct hvr_place *place)
{
    const struct file_place file = {descriptor, FILE_TARGET, place};
    struct pending pending = {0, 0, 0};
    for (size_t row = 0; row < count; row += 1) {
        const uint64_t *piece = pieces + 3 * row;
        place->index = row;
        if (piece[1] > length || piece[2] > length - piece[1]) {
            return HVR_OUT_OF_RANGE;
        }
        if (piece[0] != ZERO_PIECE && (piece[0] > INT64_MAX || piece[1] > INT64_MAX - piece[0])) {
            return HVR_OUT_OF_RANGE;
        }
    }
    int status = HVR_OK;
    for (size_t row = 0; status == HVR_OK && row < count; row += 1) {
        const uint64_t *piece = pieces + 3 * row;
        size_t at = (size_t)piece[2];
        if (piece[0] == ZERO_PIECE) {
            memset(out + at, 0, (size_t)piece[1]);
        } else if (!joined(&pending, piece[0], at, (size_t)piece[1])) {
            status = read_pending(&file, out, &pending);
            joined(&pending, piece[0], at, (size_t)piece[1]);
        }
    }
    return status == HVR_OK ? read_pending(&file, out, &pending) : status;
}

/* Writes the window's bytes to the extents of rows [row, ...) from `skip` on into the first one, until
 * `length` are written; what is left unwritten stays in `pending`. */
static int write_rows(const struct file_place *file, const struct hvr_block_map *map, const uint64_t *extents,
                      uint64_t skip, const uint8_t *data, size_t length)
{
    struct pending pending = {0, 0, 0};
    int status = HVR_OK;
    for (size_t at = 0; status == HVR_OK && at < length; extents += 2, skip = 0) {
        uint64_t offset = extents[0] + skip;
        size_t rest = extents[1] - skip < length - at ? (size_t)(extents[1] - skip) : length - at;
        struct piece piece = {0, 0, 0, 0};
        for (; status == HVR_OK && rest > 0;
             offset += piece.length, rest -= (size_t)piece.length, at += (size_t)piece.length) {
            status = hvr_piece_at(map, offset, rest, &piece, file->place);
            if (status == HVR_OK && !piece.has_place) {
                status = HVR_ABSENT;
            }
            if (status != HVR_OK) {
                break;
            }
            if (!joined(&pending, piece.file_offset, at, (size_t)piece.length)) {
                status = write_pending(file, data, &pending);
                joined(&pending, piece.file_offset, at, (size_t)piece.length);
            }
        }
    }
    return status == HVR_OK ? write_pending(file, data, &pending) : status;
}

int hvr_write_extents(int descriptor, const struct hvr_block_map *map, const uint64_t *extents, size_t count,
                      const uint8_t *data, size_t length, struct hvr_place *place)
{
    const struct file_place file = {descriptor, FILE_TARGET, place};
    int status = check_length(extents, count, length);
    if (status == HVR_OK) {
        status = check_extents(map, extents, count, 1, place);
    }
    return status == HVR_OK ? write_rows(&file, map, extents, 0, data, length) : status;
}

/* A stretch of the source and its place in the window. */
struct part {
    uint64_t source_offset;
    size_t at;
    size_t length;
};

/* What one filling of the window holds. */
struct batch {
    struct part parts[PARTS_MAX];
    size_t part_count;
    size_t length;
    int in_order; /* the source offsets rise */
};

/* Where the copy stands: in extent `row`, `skip` bytes into it. */
struct cursor {
    size_t row;
    uint64_t skip;
};

static int by_source_offset(const void *a, const void *b)
{
    const struct part *first = a;
    const struct part *second = b;
    return (first->source_offset > second->source_offset) - (first->source_offset < second->source_offset);
}

static void plan_batch(struct batch *batch, struct cursor *cursor, const uint64_t *source_offsets,
                       const uint64_t *extents, size_t count, size_t window_length)
{
    batch->part_count = 0;
    batch->length = 0;
    batch->in_order = 1;
    while (cursor->row < count && batch->length < window_length && batch->part_count < PARTS_MAX) {
        uint64_t rest = extents[2 * cursor->row + 1] - cursor->skip;
        size_t room = window_length - batch->length;
        size_t length = rest < room ? (size_t)rest : room;
        uint64_t source_offset = source_offsets[cursor->row] + cursor->skip;
        if (length > 0) {
            if (batch->part_count > 0 && batch->parts[batch->part_count - 1].source_offset > source_offset) {
                batch->in_order = 0;
            }
            batch->parts[batch->part_count] = (struct part){source_offset, batch->length, length};
            batch->part_count += 1;
            batch->length += length;
        }
        cursor->skip += length;
        if (cursor->skip == extents[2 * cursor->row + 1]) {
            cursor->row += 1;
            cursor->skip = 0;
        }
    }
}

/* Reads the parts in source order; neighbours in the source come with one call, wherever in the window they
 * belong. */
static int fill_window(const struct file_place *source, struct batch *batch, uint8_t *window)
{
    struct iovec vectors[PARTS_MAX];
    struct part *parts = batch->parts;
    if (!batch->in_order) {
        qsort(parts, batch->part_count, sizeof *parts, by_source_offset);
    }
    size_t next = 0;
    while (next < batch->part_count) {
        uint64_t offset = parts[next].source_offset;
        uint64_t end = offset;
        size_t vector_count = 0;
        for (; next < batch->part_count && parts[next].source_offset == end; next += 1) {
            uint8_t *base = window + parts[next].at;
            struct iovec *last = vector_count > 0 ? vectors + vector_count - 1 : NULL;
            if (last != NULL && (uint8_t *)last->iov_base + last->iov_len == base) {
                last->iov_len += parts[next].length;
            } else {
                vectors[vector_count] = (struct iovec){base, parts[next].length};
                vector_count += 1;
            }
            end += parts[next].length;
        }
        int status = read_vectors(source, vectors, vector_count, offset);
        if (status != HVR_OK) {
            return status;
        }
    }
    return HVR_OK;
}

int hvr_copy_extents(int source, const uint64_t *source_offsets, int descriptor,
                     const struct hvr_block_map *map, const uint64_t *extents, size_t count, uint8_t *window,
                     size_t window_length, struct hvr_place *place)
{
    const struct file_place from = {source, FILE_SOURCE, place};
    const struct file_place to = {descriptor, FILE_TARGET, place};
    struct cursor cursor = {0, 0};
    if (window_length == 0) {
        return HVR_LENGTH;
    }
    for (size_t row = 0; row < count; row += 1) {
        if (source_offsets[row] > INT64_MAX || extents[2 * row + 1] > INT64_MAX - source_offsets[row]) {
            place->index = row;
            return HVR_OUT_OF_RANGE;
        }
    }
    int status = check_extents(map, extents, count, 1, place);
    while (status == HVR_OK && cursor.row < count) {
        struct batch batch;
        struct cursor start = cursor;
        plan_batch(&batch, &cursor, source_offsets, extents, count, window_length);
        status = fill_window(&from, &batch, window);
        if (status == HVR_OK) {
            status = write_rows(&to, map, extents + 2 * start.row, start.skip, window, batch.length);
        }
    }
    return status;
}
