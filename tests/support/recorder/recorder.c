/* Stands before the C library in a process under test and writes down, in one order and with its data, all that the
 * process does to files under some folders, and all that it sends.
 *
 * The order is that in which effects can be seen:
 * - a change of data or names is one record; the lock is held from before the call until the record is written, so
 *   that nothing which follows from the change can stand before it, and two changes stand as they took effect
 * - a sync has two records, before and after it; the lock is free between them. It covers what stands before the first
 *   and promises it from the second on
 * - bytes that are sent stand before the call, since from then on they may be seen, and a second record says how many
 *   of them left
 *
 * What it cannot follow (shared writable mappings, links, collapsed ranges) becomes a record that the reader refuses.
 * Every real call is made by number, so that nothing here is called back. Set by the environment: HVR_RECORD_TRACE,
 * the file to append to; HVR_RECORD_ROOTS, folders with ":" between them; HVR_RECORD_FAULTS, see faults.c. Children
 * are not recorded. The layout of a record is repeated in replay.py.
 */
#define _GNU_SOURCE
#include "recorder.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    KIND_WRITE = 1,      /* offset, length: bytes that arrived, which follow; flags 1: durable on return */
    KIND_RESIZE = 2,     /* length: the new size */
    KIND_ALLOCATE = 3,   /* flags: mode of fallocate; offset, length */
    KIND_SYNC_BEGIN = 4, /* token; path of a folder */
    KIND_SYNC_END = 5,   /* token, error */
    KIND_CREATE = 6,     /* path; the file did not exist */
    KIND_RENAME = 7,     /* path, then the new one behind a NUL */
    KIND_UNLINK = 8,     /* path */
    KIND_MKDIR = 9,      /* path */
    KIND_RMDIR = 10,     /* path */
    KIND_SEND = 11,      /* token; the bytes that are about to be sent */
    KIND_SENT = 12,      /* token; length: how many left, or error */
    KIND_REFUSED = 13,   /* path: what could not be followed */
};

struct record {
    uint32_t magic;
    uint16_t kind;
    uint16_t flags;
    uint32_t thread;
    int32_t error;
    uint64_t device;
    uint64_t inode;
    int64_t offset;
    int64_t length;
    int64_t mtime_ns; /* of the file after the change */
    uint64_t token;
    uint32_t path_bytes;
    uint32_t data_bytes;
};

_Static_assert(sizeof(struct record) == 72, "the layout is the reader's too");

#define MAGIC 0x54525648u
#define DESCRIPTORS 65536
#define ROOTS 8
#define VECTORS 1024

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static int trace = -1;
static char roots[ROOTS][PATH_MAX];
static int root_count;
static uint64_t tokens;

/* What a descriptor was found to be; the file's numbers say whether that still holds. */
static struct {
    dev_t device;
    ino_t inode;
    int8_t verdict; /* 0 unknown, 1 recorded, -1 not */
} known[DESCRIPTORS];

static void lock(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all); /* a handler that writes to a pipe must not meet the lock of the thread it interrupts */
    pthread_sigmask(SIG_SETMASK, &all, before);
    pthread_mutex_lock(&order);
}

static void unlock(const sigset_t *before)
{
    int code = errno;
    pthread_mutex_unlock(&order);
    pthread_sigmask(SIG_SETMASK, before, NULL);
    errno = code;
}

static void after_fork(void)
{
    trace = -1;
    pthread_mutex_init(&order, NULL);
}

static void append_bytes(const void *bytes, size_t length)
{
    const char *from = bytes;
    while (length > 0) {
        ssize_t moved = syscall(SYS_write, trace, from, length);
        if (moved < 0 && errno != EINTR) {
            abort(); /* a trace with a hole would prove nothing */
        }
        from += moved > 0 ? moved : 0;
        length -= moved > 0 ? (size_t)moved : 0;
    }
}

/* Append a record, its path and its data with one call where the system lets it; the lock is held. */
static void append(struct record *record, const char *path, const struct iovec *data, int count)
{
    struct iovec vectors[VECTORS + 2];
    int code = errno;
    size_t left = record->data_bytes;
    int used = 2;
    record->magic = MAGIC;
    record->thread = (uint32_t)syscall(SYS_gettid);
    vectors[0] = (struct iovec){record, sizeof(*record)};
    vectors[1] = (struct iovec){(void *)path, record->path_bytes};
    for (int index = 0; index < count && left > 0; index += 1, used += 1) {
        vectors[used] = data[index];
        vectors[used].iov_len = data[index].iov_len < left ? data[index].iov_len : left;
        left -= vectors[used].iov_len;
    }
    ssize_t moved = syscall(SYS_writev, trace, vectors, used);
    if (moved < 0) {
        abort();
    }
    size_t done = (size_t)moved;
    for (int index = 0; index < used; index += 1) {
        size_t here = vectors[index].iov_len, skipped = done < here ? done : here;
        append_bytes((const char *)vectors[index].iov_base + skipped, here - skipped);
        done -= skipped;
    }
    errno = code;
}

static int is_inside(const char *path)
{
    for (int index = 0; index < root_count; index += 1) {
        size_t length = strlen(roots[index]);
        if (strncmp(path, roots[index], length) == 0 && (path[length] == '/' || path[length] == 0)) {
            return 1;
        }
    }
    return 0;
}

size_t name_of(int descriptor, char *name, size_t room)
{
    char link[64];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, name, room - 1);
    if (length <= 0) {
        return 0;
    }
    name[length] = 0;
    return (size_t)length;
}

static void forget(int descriptor)
{
    if (descriptor >= 0 && descriptor < DESCRIPTORS) {
        known[descriptor].verdict = 0;
    }
}

/* Whether `descriptor` is a file or folder under the roots, or any socket, and its numbers. */
static int is_recorded(int descriptor, mode_t kind, struct stat *status)
{
    char name[PATH_MAX];
    int code = errno, found = 0;
    if (trace < 0 || descriptor < 0 || descriptor >= DESCRIPTORS || fstat(descriptor, status) != 0
        || (status->st_mode & S_IFMT) != kind) {
        errno = code;
        return 0;
    }
    if (kind == S_IFSOCK) {
        return 1;
    }
    if (known[descriptor].verdict != 0 && known[descriptor].device == status->st_dev
        && known[descriptor].inode == status->st_ino) {
        return known[descriptor].verdict > 0;
    }
    found = name_of(descriptor, name, sizeof(name)) > 0 && is_inside(name);
    known[descriptor].device = status->st_dev;
    known[descriptor].inode = status->st_ino;
    known[descriptor].verdict = found ? 1 : -1;
    errno = code;
    return found;
}

static struct record record_of(enum kind kind, const struct stat *status)
{
    struct record record = {.kind = (uint16_t)kind};
    if (status != NULL) {
        record.device = status->st_dev;
        record.inode = status->st_ino;
        record.mtime_ns = (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec;
    }
    return record;
}

static struct record record_after(enum kind kind, int descriptor)
{
    struct stat status;
    int code = errno;
    if (fstat(descriptor, &status) != 0) {
        abort();
    }
    errno = code;
    return record_of(kind, &status);
}

static void refuse(const char *what, const char *path)
{
    char text[PATH_MAX + 64];
    sigset_t before;
    struct record record = record_of(KIND_REFUSED, NULL);
    record.path_bytes = (uint32_t)snprintf(text, sizeof(text), "%s %s", what, path);
    lock(&before);
    append(&record, text, NULL, 0);
    unlock(&before);
}

static void refuse_file(const char *what, int descriptor)
{
    char name[PATH_MAX] = "";
    name_of(descriptor, name, sizeof(name));
    refuse(what, name);
}

__attribute__((constructor)) static void start(void)
{
    char owner[32], number[32];
    const char *path = getenv("HVR_RECORD_TRACE"), *folders = getenv("HVR_RECORD_ROOTS");
    snprintf(number, sizeof(number), "%d", (int)getpid());
    if (getenv("HVR_RECORD_OWNER") != NULL) {
        snprintf(owner, sizeof(owner), "%s", getenv("HVR_RECORD_OWNER"));
        if (strcmp(owner, number) != 0) {
            return; /* a child of the process under test */
        }
    }
    setenv("HVR_RECORD_OWNER", number, 1);
    faults_start();
    pthread_atfork(NULL, NULL, after_fork);
    if (path == NULL || folders == NULL) {
        return;
    }
    while (*folders != 0 && root_count < ROOTS) {
        size_t length = strcspn(folders, ":");
        snprintf(roots[root_count], PATH_MAX, "%.*s", (int)length, folders);
        root_count += 1;
        folders += length + (folders[length] == ':');
    }
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    trace = (int)syscall(SYS_fcntl, file, F_DUPFD_CLOEXEC, 900); /* out of the way of who closes all low numbers */
    if (trace < 0) {
        abort();
    }
    syscall(SYS_close, file);
}

/* Data */

static size_t length_of(const struct iovec *vectors, int count)
{
    size_t length = 0;
    for (int index = 0; index < count; index += 1) {
        length += vectors[index].iov_len;
    }
    return length;
}

/* Copy vectors so that they hold `length` bytes at most; return how many are used. */
static int shortened(const struct iovec *vectors, int count, size_t length, struct iovec *copy)
{
    int used = 0;
    for (; used < count && length > 0; used += 1) {
        copy[used] = vectors[used];
        copy[used].iov_len = vectors[used].iov_len < length ? vectors[used].iov_len : length;
        length -= copy[used].iov_len;
    }
    return used;
}

/* offset -1: where the descriptor stands, which moves on. */
static ssize_t call_write(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags)
{
    if (offset < 0) {
        return syscall(SYS_writev, descriptor, vectors, count);
    }
    if (flags != 0) {
        return syscall(SYS_pwritev2, descriptor, vectors, count, offset, 0L, flags);
    }
    return syscall(SYS_pwritev, descriptor, vectors, count, offset, 0L);
}

static ssize_t write_file(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags)
{
    struct iovec some[VECTORS];
    struct stat status;
    sigset_t before;
    size_t length = length_of(vectors, count);
    if (count > VECTORS) {
        errno = EINVAL;
        return -1;
    }
    if (faults_strike(FAULT_WRITE, descriptor, NULL, &length) != 0) {
        return -1;
    }
    count = shortened(vectors, count, length, some);
    if (!is_recorded(descriptor, S_IFREG, &status)) {
        return call_write(descriptor, some, count, offset, flags);
    }
    lock(&before);
    ssize_t moved = call_write(descriptor, some, count, offset, flags);
    if (moved > 0) {
        struct record record = record_after(KIND_WRITE, descriptor);
        int modes = (int)syscall(SYS_fcntl, descriptor, F_GETFL, 0);
        record.flags = (flags & (RWF_DSYNC | RWF_SYNC)) != 0 || (modes & O_DSYNC) != 0;
        record.offset = offset >= 0 ? offset : (off_t)syscall(SYS_lseek, descriptor, 0, SEEK_CUR) - moved;
        record.length = moved;
        record.data_bytes = (uint32_t)moved;
        append(&record, NULL, some, count);
    }
    unlock(&before);
    return moved;
}

static uint64_t begin_send(const struct stat *status, const struct iovec *vectors, int count)
{
    sigset_t before;
    struct record record = record_of(KIND_SEND, status);
    record.data_bytes = (uint32_t)length_of(vectors, count);
    lock(&before);
    tokens += 1;
    record.token = tokens;
    append(&record, NULL, vectors, count);
    unlock(&before);
    return record.token;
}

static void end_send(const struct stat *status, uint64_t token, ssize_t moved)
{
    sigset_t before;
    struct record record = record_of(KIND_SENT, status);
    record.token = token;
    record.length = moved;
    record.error = moved < 0 ? errno : 0;
    lock(&before);
    append(&record, NULL, NULL, 0);
    unlock(&before);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t length, off64_t offset)
{
    const struct iovec vector = {(void *)bytes, length};
    return write_file(descriptor, &vector, 1, offset, 0);
}

ssize_t pwrite(int descriptor, const void *bytes, size_t length, off_t offset)
{
    return pwrite64(descriptor, bytes, length, offset);
}

ssize_t pwritev64(int descriptor, const struct iovec *vectors, int count, off64_t offset)
{
    return write_file(descriptor, vectors, count, offset, 0);
}

ssize_t pwritev(int descriptor, const struct iovec *vectors, int count, off_t offset)
{
    return write_file(descriptor, vectors, count, offset, 0);
}

ssize_t pwritev64v2(int descriptor, const struct iovec *vectors, int count, off64_t offset, int flags)
{
    return write_file(descriptor, vectors, count, offset, flags);
}

ssize_t pwritev2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags)
{
    return write_file(descriptor, vectors, count, offset, flags);
}

ssize_t writev(int descriptor, const struct iovec *vectors, int count)
{
    struct stat status;
    if (!is_recorded(descriptor, S_IFSOCK, &status) || count > VECTORS) {
        return write_file(descriptor, vectors, count, -1, 0);
    }
    uint64_t token = begin_send(&status, vectors, count);
    ssize_t moved = syscall(SYS_writev, descriptor, vectors, count);
    end_send(&status, token, moved);
    return moved;
}

ssize_t write(int descriptor, const void *bytes, size_t length)
{
    const struct iovec vector = {(void *)bytes, length};
    return writev(descriptor, &vector, 1);
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags)
{
    struct stat status;
    if (!is_recorded(descriptor, S_IFSOCK, &status) || message->msg_iovlen > VECTORS) {
        return syscall(SYS_sendmsg, descriptor, message, flags);
    }
    uint64_t token = begin_send(&status, message->msg_iov, (int)message->msg_iovlen);
    ssize_t moved = syscall(SYS_sendmsg, descriptor, message, flags);
    end_send(&status, token, moved);
    return moved;
}

ssize_t sendto(int descriptor, const void *bytes, size_t length, int flags, const struct sockaddr *to, socklen_t size)
{
    struct iovec vector = {(void *)bytes, length};
    const struct msghdr message = {
        .msg_name = (void *)to, .msg_namelen = size, .msg_iov = &vector, .msg_iovlen = 1};
    return sendmsg(descriptor, &message, flags);
}

ssize_t send(int descriptor, const void *bytes, size_t length, int flags)
{
    return sendto(descriptor, bytes, length, flags, NULL, 0);
}

/* Write down what the system copied into a file, as it stands there now; the lock is held. */
static void append_copied(int descriptor, off64_t offset, ssize_t length)
{
    static char window[1 << 20];
    while (length > 0) {
        size_t wanted = (size_t)length < sizeof(window) ? (size_t)length : sizeof(window);
        ssize_t moved = syscall(SYS_pread64, descriptor, window, wanted, offset);
        if (moved <= 0) {
            abort();
        }
        const struct iovec vector = {window, (size_t)moved};
        struct record record = record_after(KIND_WRITE, descriptor);
        record.offset = offset;
        record.length = moved;
        record.data_bytes = (uint32_t)moved;
        append(&record, NULL, &vector, 1);
        offset += moved;
        length -= moved;
    }
}

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t length, unsigned int flags)
{
    struct stat status;
    sigset_t before;
    if (faults_strike(FAULT_WRITE, target, NULL, &length) != 0) {
        return -1;
    }
    if (!is_recorded(target, S_IFREG, &status)) {
        return syscall(SYS_copy_file_range, source, from, target, to, length, flags);
    }
    lock(&before);
    off64_t offset = to != NULL ? *to : (off64_t)syscall(SYS_lseek, target, 0, SEEK_CUR);
    ssize_t moved = syscall(SYS_copy_file_range, source, from, target, to, length, flags);
    if (moved > 0) {
        append_copied(target, offset, moved);
    }
    unlock(&before);
    return moved;
}

static int resize(int descriptor, off64_t length)
{
    struct stat status;
    sigset_t before;
    if (faults_strike(FAULT_RESIZE, descriptor, NULL, NULL) != 0) {
        return -1;
    }
    if (!is_recorded(descriptor, S_IFREG, &status)) {
        return (int)syscall(SYS_ftruncate, descriptor, length);
    }
    lock(&before);
    int result = (int)syscall(SYS_ftruncate, descriptor, length);
    if (result == 0) {
        struct record record = record_after(KIND_RESIZE, descriptor);
        record.length = length;
        append(&record, NULL, NULL, 0);
    }
    unlock(&before);
    return result;
}

int ftruncate(int descriptor, off_t length)
{
    return resize(descriptor, length);
}

int ftruncate64(int descriptor, off64_t length)
{
    return resize(descriptor, length);
}

static int allocate(int descriptor, int mode, off64_t offset, off64_t length)
{
    struct stat status;
    sigset_t before;
    if (faults_strike(FAULT_ALLOCATE, descriptor, NULL, NULL) != 0) {
        return -1;
    }
    if (!is_recorded(descriptor, S_IFREG, &status)) {
        return (int)syscall(SYS_fallocate, descriptor, mode, offset, length);
    }
    if (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) {
        refuse_file("moved ranges of", descriptor);
    }
    lock(&before);
    int result = (int)syscall(SYS_fallocate, descriptor, mode, offset, length);
    if (result == 0) {
        struct record record = record_after(KIND_ALLOCATE, descriptor);
        record.flags = (uint16_t)mode;
        record.offset = offset;
        record.length = length;
        append(&record, NULL, NULL, 0);
    }
    unlock(&before);
    return result;
}

int fallocate(int descriptor, int mode, off_t offset, off_t length)
{
    return allocate(descriptor, mode, offset, length);
}

int fallocate64(int descriptor, int mode, off64_t offset, off64_t length)
{
    return allocate(descriptor, mode, offset, length);
}

int posix_fallocate(int descriptor, off_t offset, off_t length)
{
    int code = errno;
    int result = allocate(descriptor, 0, offset, length) == 0 ? 0 : errno;
    errno = code;
    return result;
}

int posix_fallocate64(int descriptor, off64_t offset, off64_t length)
{
    return posix_fallocate(descriptor, offset, length);
}

/* Syncs */

static int sync_file(long number, int descriptor)
{
    char name[PATH_MAX] = "";
    struct stat status;
    sigset_t before;
    int is_folder = is_recorded(descriptor, S_IFDIR, &status);
    if (!is_folder && !is_recorded(descriptor, S_IFREG, &status)) {
        return faults_strike(FAULT_SYNC, descriptor, NULL, NULL) != 0 ? -1 : (int)syscall(number, descriptor);
    }
    struct record begin = record_of(KIND_SYNC_BEGIN, &status);
    if (is_folder) {
        begin.path_bytes = (uint32_t)name_of(descriptor, name, sizeof(name));
    }
    lock(&before);
    tokens += 1;
    begin.token = tokens;
    append(&begin, name, NULL, 0);
    unlock(&before);
    /* A rule that holds this call up makes a long sync of it, which covers nothing that is written meanwhile. */
    int result = faults_strike(FAULT_SYNC, descriptor, NULL, NULL);
    result = result == 0 ? (int)syscall(number, descriptor) : result;
    struct record end = record_of(KIND_SYNC_END, &status);
    end.token = begin.token;
    end.error = result == 0 ? 0 : errno;
    lock(&before);
    append(&end, NULL, NULL, 0);
    unlock(&before);
    return result;
}

int fsync(int descriptor)
{
    return sync_file(SYS_fsync, descriptor);
}

int fdatasync(int descriptor)
{
    return sync_file(SYS_fdatasync, descriptor);
}

/* Names */

/* Write down the absolute path of a name, its folder without links; 0 where it is not under the roots. */
static int resolve(int folder, const char *name, char *path)
{
    char whole[PATH_MAX * 2], base[PATH_MAX] = "", real[PATH_MAX];
    int code = errno, inside = 0;
    if (trace < 0 || name == NULL) {
        return 0;
    }
    if (name[0] != '/') {
        size_t length = folder == AT_FDCWD ? (getcwd(base, sizeof(base)) != NULL ? strlen(base) : 0)
                                           : name_of(folder, base, sizeof(base));
        if (length == 0) {
            errno = code;
            return 0;
        }
    }
    snprintf(whole, sizeof(whole), "%s/%s", base, name);
    while (strlen(whole) > 1 && whole[strlen(whole) - 1] == '/') {
        whole[strlen(whole) - 1] = 0;
    }
    char *last = strrchr(whole, '/');
    *last = 0;
    if (realpath(last == whole ? "/" : whole, real) != NULL) {
        size_t length = (size_t)snprintf(path, PATH_MAX, "%s/%s", real, last + 1);
        inside = length < PATH_MAX && is_inside(path);
    }
    errno = code;
    return inside;
}

static int open_at(int folder, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    struct stat status;
    sigset_t before;
    int is_inside_roots = (flags & (O_CREAT | O_TRUNC)) != 0 && resolve(folder, name, path);
    if ((flags & O_CREAT) != 0 && faults_strike(FAULT_OPEN, -1, is_inside_roots ? path : name, NULL) != 0) {
        return -1;
    }
    if (!is_inside_roots) {
        int file = (int)syscall(SYS_openat, folder, name, flags, mode);
        forget(file);
        return file;
    }
    if ((flags & O_TMPFILE) == O_TMPFILE) {
        refuse("file without a name in", path);
    }
    lock(&before);
    int code = errno;
    int existed = syscall(SYS_newfstatat, AT_FDCWD, path, &status, 0) == 0;
    errno = code;
    int file = (int)syscall(SYS_openat, folder, name, flags, mode);
    forget(file);
    if (file >= 0 && !existed) {
        struct record record = record_after(KIND_CREATE, file);
        record.path_bytes = (uint32_t)strlen(path);
        append(&record, path, NULL, 0);
    } else if (file >= 0 && (flags & O_TRUNC) != 0 && status.st_size > 0) {
        struct record record = record_after(KIND_RESIZE, file);
        append(&record, NULL, NULL, 0);
    }
    unlock(&before);
    return file;
}

#define MODE_OF(flags, mode)                                                                                 \
    mode_t mode = 0;                                                                                         \
    if (((flags) & (O_CREAT | __O_TMPFILE)) != 0) {                                                          \
        va_list rest;                                                                                        \
        va_start(rest, flags);                                                                               \
        mode = va_arg(rest, mode_t);                                                                         \
        va_end(rest);                                                                                        \
    }

int open(const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return open_at(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return open_at(AT_FDCWD, name, flags, mode);
}

int openat(int folder, const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return open_at(folder, name, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...)
{
    MODE_OF(flags, mode)
    return open_at(folder, name, flags, mode);
}

int creat(const char *name, mode_t mode)
{
    return open_at(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

int creat64(const char *name, mode_t mode)
{
    return creat(name, mode);
}

/* What a compiler with checks makes of open() without a mode. */
int __open_2(const char *name, int flags)
{
    return open_at(AT_FDCWD, name, flags, 0);
}

int __open64_2(const char *name, int flags)
{
    return open_at(AT_FDCWD, name, flags, 0);
}

int __openat_2(int folder, const char *name, int flags)
{
    return open_at(folder, name, flags, 0);
}

int __openat64_2(int folder, const char *name, int flags)
{
    return open_at(folder, name, flags, 0);
}

static int rename_at(int folder, const char *source, int other, const char *target, unsigned int flags)
{
    char paths[PATH_MAX * 2 + 1], to[PATH_MAX];
    struct stat status;
    sigset_t before;
    int from_inside = resolve(folder, source, paths), to_inside = resolve(other, target, to);
    if (faults_strike(FAULT_RENAME, -1, to_inside ? to : target, NULL) != 0) {
        return -1;
    }
    if (!from_inside && !to_inside) {
        return (int)syscall(SYS_renameat2, folder, source, other, target, flags);
    }
    if (!from_inside || !to_inside || (flags & ~(unsigned int)RENAME_NOREPLACE) != 0) {
        refuse("unusual rename to", to_inside ? to : target);
    }
    lock(&before);
    int result = (int)syscall(SYS_renameat2, folder, source, other, target, flags);
    if (result == 0 && from_inside && to_inside) {
        syscall(SYS_newfstatat, AT_FDCWD, to, &status, AT_SYMLINK_NOFOLLOW);
        struct record record = record_of(KIND_RENAME, &status);
        size_t first = strlen(paths) + 1, second = strlen(to);
        memcpy(paths + first, to, second);
        record.path_bytes = (uint32_t)(first + second);
        append(&record, paths, NULL, 0);
    }
    unlock(&before);
    return result;
}

int rename(const char *source, const char *target)
{
    return rename_at(AT_FDCWD, source, AT_FDCWD, target, 0);
}

int renameat(int folder, const char *source, int other, const char *target)
{
    return rename_at(folder, source, other, target, 0);
}

int renameat2(int folder, const char *source, int other, const char *target, unsigned int flags)
{
    return rename_at(folder, source, other, target, flags);
}

/* A call that makes or takes away one name. */
static int change_name(enum kind kind, int folder, const char *name, long argument)
{
    char path[PATH_MAX];
    sigset_t before;
    long number = kind == KIND_MKDIR ? SYS_mkdirat : SYS_unlinkat;
    int inside = resolve(folder, name, path);
    if (kind == KIND_UNLINK && faults_strike(FAULT_UNLINK, -1, inside ? path : name, NULL) != 0) {
        return -1;
    }
    if (!inside) {
        return (int)syscall(number, folder, name, argument);
    }
    lock(&before);
    int result = (int)syscall(number, folder, name, argument);
    if (result == 0) {
        struct record record = record_of(kind, NULL);
        record.path_bytes = (uint32_t)strlen(path);
        append(&record, path, NULL, 0);
    }
    unlock(&before);
    return result;
}

int unlinkat(int folder, const char *name, int flags)
{
    return change_name(flags & AT_REMOVEDIR ? KIND_RMDIR : KIND_UNLINK, folder, name, flags);
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

int rmdir(const char *name)
{
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}

int mkdirat(int folder, const char *name, mode_t mode)
{
    return change_name(KIND_MKDIR, folder, name, mode);
}

int mkdir(const char *name, mode_t mode)
{
    return mkdirat(AT_FDCWD, name, mode);
}

/* Descriptors that become others */

int close(int descriptor)
{
    if (descriptor == trace && trace >= 0) {
        return 0;
    }
    forget(descriptor);
    return (int)syscall(SYS_close, descriptor);
}

int dup3(int descriptor, int wanted, int flags)
{
    forget(wanted);
    return (int)syscall(SYS_dup3, descriptor, wanted, flags);
}

int dup2(int descriptor, int wanted)
{
    return descriptor == wanted ? (int)syscall(SYS_fcntl, descriptor, F_GETFD, 0) < 0 ? -1 : wanted
                                : dup3(descriptor, wanted, 0);
}

/* What cannot be followed */

void *mmap64(void *place, size_t length, int protection, int flags, int descriptor, off64_t offset)
{
    struct stat status;
    if ((flags & MAP_SHARED) != 0 && (protection & PROT_WRITE) != 0 && is_recorded(descriptor, S_IFREG, &status)) {
        refuse_file("shared writable mapping of", descriptor);
    }
    return (void *)syscall(SYS_mmap, place, length, protection, flags, descriptor, offset);
}

void *mmap(void *place, size_t length, int protection, int flags, int descriptor, off_t offset)
{
    return mmap64(place, length, protection, flags, descriptor, offset);
}

int linkat(int folder, const char *source, int other, const char *target, int flags)
{
    char path[PATH_MAX];
    if (resolve(other, target, path)) {
        refuse("second name", path);
    }
    return (int)syscall(SYS_linkat, folder, source, other, target, flags);
}

int link(const char *source, const char *target)
{
    return linkat(AT_FDCWD, source, AT_FDCWD, target, 0);
}

int truncate64(const char *name, off64_t length)
{
    char path[PATH_MAX];
    if (resolve(AT_FDCWD, name, path)) {
        refuse("resize without opening of", path);
    }
    return (int)syscall(SYS_truncate, name, length);
}

int truncate(const char *name, off_t length)
{
    return truncate64(name, length);
}
