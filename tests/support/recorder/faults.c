/* Rules, in a file that the test and the process under test both map: the n-th call on matching names fails, is cut
 * short, or waits. The layout is repeated in __init__.py. */
#define _GNU_SOURCE
#include "recorder.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RULES 64

struct rule {
    _Atomic int32_t active; /* set last by the test, cleared first */
    int32_t operations;
    int32_t error;
    _Atomic int32_t hold; /* calls that match wait while this is set */
    int64_t skip;         /* matching calls that pass before the first one fails */
    int64_t count;        /* calls that fail then; -1: all */
    int64_t short_bytes;  /* >= 0: not an error, but a write that moves no more than this */
    _Atomic int64_t calls;
    _Atomic int64_t hits;
    _Atomic int64_t held; /* calls that began to wait */
    char pattern[192];
};

_Static_assert(sizeof(struct rule) == 256, "the layout is the test's too");

static struct rule *rules;

void faults_start(void)
{
    const char *path = getenv("HVR_RECORD_FAULTS");
    if (path == NULL) {
        return;
    }
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) {
        abort();
    }
    void *place = (void *)syscall(SYS_mmap, NULL, sizeof(struct rule) * RULES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (place == MAP_FAILED) {
        abort();
    }
    syscall(SYS_close, file);
    rules = place;
}

static void wait_while_held(struct rule *rule)
{
    const struct timespec moment = {.tv_nsec = 1000000};
    if (!rule->hold) {
        return;
    }
    rule->held += 1;
    while (rule->hold && rule->active) {
        nanosleep(&moment, NULL);
    }
}

int faults_strike(int operation, int descriptor, const char *path, size_t *length)
{
    char name[PATH_MAX];
    for (int index = 0; rules != NULL && index < RULES; index += 1) {
        struct rule *rule = &rules[index];
        if (!rule->active || !(rule->operations & operation)) {
            continue;
        }
        if (path == NULL) {
            if (name_of(descriptor, name, sizeof(name)) == 0) {
                return 0;
            }
            path = name;
        }
        if (fnmatch(rule->pattern, path, 0) != 0) {
            continue;
        }
        int64_t call = rule->calls++;
        if (call < rule->skip || (rule->count >= 0 && call >= rule->skip + rule->count)) {
            continue;
        }
        rule->hits += 1;
        wait_while_held(rule);
        if (rule->short_bytes >= 0 && length != NULL) {
            *length = *length < (size_t)rule->short_bytes ? *length : (size_t)rule->short_bytes;
        } else if (rule->error != 0) {
            errno = rule->error;
            return -1;
        }
    }
    return 0;
}
