/* Metadata entries of an .hrl, [MS-HRL] 2.4: a packed row of 32 bytes. */
#include "kernels.h"

enum {
    ENTRY_BYTES = 32,
    HEADER_BYTES = 32,
    BYTE_OFFSET_AT = 0,
    CHECKSUM_AT = 8,
    DATA_LENGTH_AT = 12,
    TIME_STAMP_AT = 16,
    META_OPERATION_AT = 20,
    DATA_CHECKSUM_AT = 21,
    META_OPERATION_WRITE = 1
};

/* [MS-HRL] 2.6 over the entry with its checksum left out, which is the same as with a checksum of 0. */
static uint32_t entry_checksum(const uint8_t *entry)
{
    uint32_t sum = 0;
    for (size_t at = 0; at < ENTRY_BYTES; at += 1) {
        sum += entry[at];
    }
    for (size_t at = CHECKSUM_AT; at < CHECKSUM_AT + 4; at += 1) {
        sum -= entry[at];
    }
    return ~sum;
}

static int entry_fault(const uint8_t *entry, struct hvr_bad_entry *bad)
{
    bad->expected = entry_checksum(entry);
    bad->actual = load32(entry + CHECKSUM_AT);
    if (bad->expected != bad->actual) {
        return HVR_CHECKSUM;
    }
    bad->expected = META_OPERATION_WRITE;
    bad->actual = entry[META_OPERATION_AT];
    return bad->expected == bad->actual ? HVR_OK : HVR_OPERATION;
}

int hvr_hrl_parse(const uint8_t *block, size_t length, size_t count, uint64_t log_offset,
                  struct hvr_hrl_entry *entries, struct hvr_bad_entry *bad)
{
    if (length < HEADER_BYTES ? count > 0 : count > (length - HEADER_BYTES) / ENTRY_BYTES) {
        return HVR_LENGTH;
    }
    for (size_t index = 0; index < count; index += 1) {
        const uint8_t *entry = block + HEADER_BYTES + index * ENTRY_BYTES;
        int fault = entry_fault(entry, bad);
        if (fault != HVR_OK) {
            bad->index = index;
            return fault;
        }
        uint32_t data_length = load32(entry + DATA_LENGTH_AT);
        entries[index] = (struct hvr_hrl_entry){
            .byte_offset = load64(entry + BYTE_OFFSET_AT),
            .log_offset = log_offset,
            .data_length = data_length,
            .time_stamp = load32(entry + TIME_STAMP_AT),
            .data_checksum = load32(entry + DATA_CHECKSUM_AT),
            .meta_operation = entry[META_OPERATION_AT],
            .padding = {0, 0, 0},
        };
        if (log_offset > UINT64_MAX - data_length) {
            return HVR_OUT_OF_RANGE;
        }
        log_offset += data_length;
    }
    return HVR_OK;
}

int hvr_hrl_pack(const uint64_t *extents, const uint64_t *data_checksums, size_t count, uint32_t time_stamp,
                 uint8_t *packed)
{
    for (size_t index = 0; index < count; index += 1) {
        uint8_t *entry = packed + index * ENTRY_BYTES;
        if (extents[2 * index + 1] > UINT32_MAX || data_checksums[index] > UINT32_MAX) {
            return HVR_OUT_OF_RANGE;
        }
        memset(entry, 0, ENTRY_BYTES);
        store64(entry + BYTE_OFFSET_AT, extents[2 * index]);
        store32(entry + DATA_LENGTH_AT, (uint32_t)extents[2 * index + 1]);
        store32(entry + TIME_STAMP_AT, time_stamp);
        entry[META_OPERATION_AT] = META_OPERATION_WRITE;
        store32(entry + DATA_CHECKSUM_AT, (uint32_t)data_checksums[index]);
        store32(entry + CHECKSUM_AT, entry_checksum(entry));
    }
    return HVR_OK;
}
