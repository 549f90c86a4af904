/* What stands under a disk that is served: extents in files that never change, and the rest in a disk that
 * others may change. Whatever came from that disk counts only if nobody began to change it before the read was
 * over: its counter says so. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#if !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64
#endif

#include "kernels.h"

#include <errno.h>
#include <unistd.h>

enum { ZEROS = -1 };

/* Returns the first row that ends behind `offset`; count where none does. */
static size_t find_row(const struct hvr_under *under, uint64_t offset)
{
    size_t low = 0;
    size_t high = under->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (under->ends[middle] > offset) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

static int read_fully(int descriptor, uint8_t *out, uint64_t length, uint64_t file_offset)
{
    while (length > 0) {
        ssize_t moved = pread(descriptor, out, (size_t)length, (off_t)file_offset);
        if (moved < 0 && errno == EINTR) {
            continue;
        }
        if (moved <= 0) {
            return moved < 0 ? -errno : HVR_TRUNCATED;
        }
        out += moved;
        length -= (uint64_t)moved;
        file_offset += (uint64_t)moved;
    }
    return HVR_OK;
}

/* Reads what no extent covers. */
static int read_base(const struct hvr_under *under, uint64_t offset, uint8_t *out, uint64_t length)
{
    struct hvr_place place;
    struct piece piece = {0, 0, 0, 0};
    int status = HVR_OK;
    for (; length > 0 && status == HVR_OK; offset += piece.length, length -= piece.length, out += piece.length) {
        status = hvr_piece_at(under->map, offset, length, &piece, &place);
        if (status != HVR_OK) {
            return status;
        }
        if (piece.present) {
            status = read_fully(under->descriptor, out, piece.length, piece.file_offset);
        } else if (piece.has_place) {
            return HVR_ABSENT;
        } else {
            memset(out, 0, (size_t)piece.length);
        }
    }
    return status;
}

int hvr_under_read(const struct hvr_under *under, uint64_t disk_offset, uint8_t *out, uint64_t length)
{
    int status = HVR_OK;
    int asked_base = 0;
    size_t row = find_row(under, disk_offset);
    while (length > 0 && status == HVR_OK) {
        uint64_t start = row < under->count ? under->starts[row] : UINT64_MAX;
        uint64_t part;
        if (start > disk_offset) {
            part = start - disk_offset < length ? start - disk_offset : length;
            asked_base = 1;
            status = read_base(under, disk_offset, out, part);
        } else {
            uint64_t room = under->ends[row] - disk_offset;
            part = room < length ? room : length;
            if (under->descriptors[row] == ZEROS) {
                memset(out, 0, (size_t)part);
            } else if (under->descriptors[row] < 0) {
                status = HVR_ELSEWHERE;
            } else {
                status = read_fully(under->descriptors[row], out, part,
                                    under->file_offsets[row] + (disk_offset - start));
            }
            row += 1;
        }
        disk_offset += part;
        out += part;
        length -= part;
    }
    if (asked_base && under->counter != NULL) {
        /* Also where the read has failed: what it was led by may have been half new. */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (__atomic_load_n(under->counter, __ATOMIC_ACQUIRE) != under->applied) {
            return HVR_STALE;
        }
    }
    return status;
}
