/* Stands before the C library in a test process: short transfers, EINTR, errors on demand, and a count of calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

static long calls;
static long transfer_max = INT64_MAX; /* bytes a call moves at most */
static long interrupt_every;          /* each n-th call is interrupted; 0: none */
static long fail_at = -1;             /* the call that fails */
static int fail_code;
static int armed;

void shim_arm(long max, long every, long at, int code)
{
    calls = 0;
    transfer_max = max;
    interrupt_every = every;
    fail_at = at;
    fail_code = code;
    armed = 1;
}

long shim_disarm(void)
{
    armed = 0;
    return calls;
}

static int refused(void)
{
    if (!armed) {
        return 0;
    }
    calls += 1;
    if (calls - 1 == fail_at) {
        errno = fail_code;
        return 1;
    }
    if (interrupt_every > 0 && calls % interrupt_every == 0) {
        errno = EINTR;
        return 1;
    }
    return 0;
}

static size_t cut(size_t length)
{
    long max = transfer_max > 1 && calls % 3 ? transfer_max - calls % 2 : transfer_max;
    return armed && length > (size_t)max ? (size_t)max : length;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

ssize_t pread64(int fd, void *buf, size_t length, off64_t offset)
{
    return refused() ? -1 : REAL("pread64", ssize_t (*)(int, void *, size_t, off64_t))(fd, buf, cut(length), offset);
}

ssize_t pwrite64(int fd, const void *buf, size_t length, off64_t offset)
{
    return refused() ? -1 : REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off64_t))(fd, buf, cut(length), offset);
}

ssize_t preadv64(int fd, const struct iovec *vectors, int count, off64_t offset)
{
    struct iovec some[1024];
    size_t room = SIZE_MAX;
    int used = 0;
    if (refused()) {
        return -1;
    }
    if (armed) {
        room = cut(SIZE_MAX);
    }
    for (; used < count && room > 0; used += 1) {
        some[used] = vectors[used];
        if (some[used].iov_len > room) {
            some[used].iov_len = room;
        }
        room -= some[used].iov_len;
    }
    return REAL("preadv64", ssize_t (*)(int, const struct iovec *, int, off64_t))(fd, some, used, offset);
}

ssize_t pread(int fd, void *buf, size_t length, off_t offset)
{
    return pread64(fd, buf, length, offset);
}

ssize_t pwrite(int fd, const void *buf, size_t length, off_t offset)
{
    return pwrite64(fd, buf, length, offset);
}

ssize_t preadv(int fd, const struct iovec *vectors, int count, off_t offset)
{
    return preadv64(fd, vectors, count, offset);
}
