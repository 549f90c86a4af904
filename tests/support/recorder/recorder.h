/* What the two halves of the recorder share: recorder.c sees and writes down, faults.c lets calls fail. */
#ifndef RECORDER_H
#define RECORDER_H

#include <stddef.h>

/* Operations that a rule of faults.c may name, as bits. */
enum {
    FAULT_WRITE = 1,
    FAULT_SYNC = 2,
    FAULT_RESIZE = 4,
    FAULT_ALLOCATE = 8,
    FAULT_OPEN = 16,
    FAULT_RENAME = 32,
    FAULT_UNLINK = 64,
};

/* Map the file of rules that HVR_RECORD_FAULTS names; without it no call ever fails. */
void faults_start(void);

/* Count a call and hold it up where a rule says so. Return 0 where it may go on, else -1 with errno set.
 * `length` (may be null) becomes smaller where a rule wants a short write. `path` may be null: then it is the name
 * that `descriptor` has now. */
int faults_strike(int operation, int descriptor, const char *path, size_t *length);

/* Write down the current name of an open file; return its length, or 0 where it has none. */
size_t name_of(int descriptor, char *name, size_t room);

#endif
