"""The only module that opens, reads, writes, syncs, renames and locks files.

Everything above takes a FileSystem, so that tests can fail, tear, drop and reorder what is written; OS_FILES
is the real one. What is durable when:

- a write is durable after sync() of the same BlockFile returned
- a new or renamed name is durable after sync_directory() of its folder returned
- a failed sync() poisons the BlockFile for good: the kernel may have dropped the dirty pages, so no later
  sync of the same file proves anything. Every later call but close() raises the first error again.

An OSError passes through with the path, the operation and the offset added as a note.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from hvreplica.errors import Locked, Truncated, kept
from hvreplica.image_lock import bars_writer, hold_image, programs_with, release_image
from hvreplica.punch import punch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from hvreplica.clock import Clock

_ZERO_WINDOW_BYTES = 1 << 20
_SOCKET_NAME_BYTES_MAX = 107  # struct sockaddr_un has 108 with the NUL
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class BlockFile(Protocol):
    """One open file, addressed by offset.

    It has one owner; reads and writes of disjoint ranges may come from many threads.
    """

    @property
    def path(self) -> Path:
        """The name it was opened by."""
        ...

    @property
    def writable(self) -> bool:
        """Whether writes are allowed."""
        ...

    def fileno(self) -> int | None:
        """Return the descriptor for native kernels, or None where every access must pass this object."""
        ...

    def size(self) -> int:
        """Return the length in bytes."""
        ...

    def read(self, file_offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises: Truncated if the file ends before."""
        ...

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        """Fill `buffer` exactly. Raises: Truncated if the file ends before."""
        ...

    def write(self, buffer: Buffer, file_offset: int) -> None:
        """Write all of `buffer`; grows the file where needed. Nothing is durable until sync()."""
        ...

    def resize(self, size_bytes: int) -> None:
        """Cut the file or extend it with zeros. Nothing is durable until sync()."""
        ...

    def zero(self, file_offset: int, length: int) -> None:
        """Make a range inside the file read as zeros, giving its space back where the file system can."""
        ...

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (file_offset, length) of what is held between `start` and `end`; the rest is zeros."""
        ...

    def sync(self) -> None:
        """Make data and length durable. A failure poisons the file."""
        ...

    def close(self) -> None:
        """Close without syncing. May be called twice."""
        ...


class FileLock(Protocol):
    """A lock that its process holds until release() or death."""

    def release(self) -> None:
        """Give it back."""
        ...


class FileIdentity(NamedTuple):
    """What tells one file, and one state of it, from another.

    device: number of the file system, which some change at each mount. mtime_ns: last change of its content,
    Unix time; 0 for a block device, whose node knows nothing of writes. inode: 0 for a block device.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


class FileSystem(Protocol):
    """Names and folders."""

    def open(
        self,
        path: Path,
        *,
        writable: bool = False,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o644,
    ) -> BlockFile:
        """Open a regular file or block device.

        create: make it where absent (implies writable). exclusive: with create, FileExistsError if present.
        mode: the permissions of a file that this call makes; 0o600 for keys, which others never may read.
        """
        ...

    def exists(self, path: Path) -> bool:
        """Return whether anything has this name."""
        ...

    def identity(self, path: Path) -> FileIdentity:
        """Return what tells the file behind `path`, links followed, from others.

        The time is the kernel's, which a power cut may set back to that of an earlier write.
        Raises: FileNotFoundError.
        """
        ...

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names in `folder`; empty where it is absent."""
        ...

    def make_directory(self, path: Path) -> None:
        """Make `path` and its parents, durably; fine where present."""
        ...

    def replace(self, source: Path, target: Path) -> None:
        """Rename over whatever has the target's name, at once and whole; durable after sync_directory()."""
        ...

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name, durable as a new one; False where the file system has no such names."""
        ...

    def copy_attributes(self, source: Path, target: Path) -> None:
        """Give `target` the permissions of `source`, and its owner where this process may."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file; fine where absent. Durable after sync_directory()."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Make the names in `path` durable."""
        ...

    def free_bytes(self, path: Path) -> int:
        """Return the bytes an unprivileged writer may still use on the file system of `path`."""
        ...

    def lock(self, path: Path, *, shared: bool = False) -> FileLock:
        """Take the lock file at `path` or raise Locked at once; an exclusive holder is named in the error."""
        ...


@contextlib.contextmanager
def _noted(operation: str, path: object, offset: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = "" if offset is None else f" at offset {offset}"
        error.add_note(f"{operation} {path}{place}")
        if error.filename is None:
            error.filename = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        raise


class OsBlockFile:
    """A BlockFile on the operating system's descriptors."""

    def __init__(self, descriptor: int, path: Path, *, writable: bool) -> None:
        self._descriptor = descriptor
        self._path = path
        self._writable = writable
        self._poison: OSError | None = None
        self._is_device = stat.S_ISBLK(os.fstat(descriptor).st_mode)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def writable(self) -> bool:
        return self._writable

    def fileno(self) -> int | None:
        self._check()
        return self._descriptor

    def size(self) -> int:
        self._check()
        if self._is_device:
            return os.lseek(self._descriptor, 0, os.SEEK_END)
        return os.fstat(self._descriptor).st_size

    def read(self, file_offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(buffer, file_offset)
        return bytes(buffer)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        self._check()
        view = memoryview(buffer).cast("B")
        done = 0
        with _noted("read", self._path, file_offset):
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], file_offset + done)
                if count == 0:
                    raise Truncated(
                        "the file ends inside what was to be read",
                        path=self._path,
                        offset=file_offset,
                        expected=f"{len(view)} bytes",
                        actual=f"{done} bytes",
                    )
                done += count

    def write(self, buffer: Buffer, file_offset: int) -> None:
        self._check()
        view = memoryview(buffer).cast("B")
        done = 0
        with _noted("write", self._path, file_offset):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], file_offset + done)

    def resize(self, size_bytes: int) -> None:
        self._check()
        with _noted("resize", self._path, size_bytes):
            os.ftruncate(self._descriptor, size_bytes)

    def zero(self, file_offset: int, length: int) -> None:
        self._check()
        if length <= 0:
            return
        with _noted("zero", self._path, file_offset):
            if punch(self._descriptor, file_offset, length):
                return
        zeros = bytes(min(length, _ZERO_WINDOW_BYTES))
        for done in range(0, length, len(zeros)):
            self.write(memoryview(zeros)[: min(len(zeros), length - done)], file_offset + done)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        self._check()
        end = min(end, self.size())
        position = start
        while position < end:
            try:
                data = os.lseek(self._descriptor, position, os.SEEK_DATA)
                hole = os.lseek(self._descriptor, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno in _UNSUPPORTED:
                    data, hole = position, end
                else:
                    error.add_note(f"seek data {self._path} at offset {position}")
                    raise
            if data >= end:
                return
            yield data, min(hole, end) - data
            position = hole

    def sync(self) -> None:
        self._check()
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            error.add_note(f"sync {self._path}: nothing written since its last sync is certain")
            self._poison = kept(error)
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # A mapping has a duplicate of the descriptor, and with it the lock, for as long as it lives.
            release_image(descriptor)
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._poison is not None:
            raise kept(self._poison)
        if self._descriptor < 0:
            message = f"{self._path} is closed"
            raise ValueError(message)


class _OsLock:
    def __init__(self, descriptor: int, *, shared: bool) -> None:
        self._descriptor = descriptor
        self._shared = shared

    def release(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            if not self._shared:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)  # or the next shared holder would be taken for us
            os.close(descriptor)


def _require_disk_or_file(mode: int, path: Path) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "neither a regular file nor a block device", os.fspath(path))


class OsFiles:
    """The FileSystem of the operating system."""

    def open(
        self,
        path: Path,
        *,
        writable: bool = False,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o644,
    ) -> OsBlockFile:
        writable = writable or create
        # O_NONBLOCK: a FIFO that somebody put under this name must be refused, not waited for.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | (os.O_EXCL if exclusive else 0)
        with _noted("open", path):
            if not create:
                # Before too: a name may come from a disk image, and opening alone can start a watchdog device
                # or rewind a tape.
                _require_disk_or_file(os.stat(path).st_mode, path)
            descriptor = os.open(path, flags, mode)
            try:
                _require_disk_or_file(os.fstat(descriptor).st_mode, path)
            except OSError:
                os.close(descriptor)
                raise
        return OsBlockFile(descriptor, Path(path), writable=writable)

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def identity(self, path: Path) -> FileIdentity:
        with _noted("stat", path):
            found = os.stat(path)
        if stat.S_ISBLK(found.st_mode):
            with contextlib.closing(self.open(path)) as device:
                return FileIdentity(found.st_rdev, 0, device.size(), 0)
        return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []

    def make_directory(self, path: Path) -> None:
        missing = []
        folder = Path(path)
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        with _noted("make directory", path):
            for folder in reversed(missing):
                folder.mkdir(mode=0o700 if folder == Path(path) else 0o755, exist_ok=True)
                self.sync_directory(folder.parent)
            if not Path(path).is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", os.fspath(path))

    def replace(self, source: Path, target: Path) -> None:
        with _noted("rename", source):
            # A rename would put a file in the place of a device's node or a FIFO, and write nothing to it.
            if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
                raise OSError(errno.EINVAL, "not a regular file; it was not touched", os.fspath(target))
            os.replace(source, target)

    def link(self, source: Path, target: Path) -> bool:
        with _noted("link", source):
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in {*_UNSUPPORTED, errno.EPERM, errno.EMLINK, errno.EXDEV}:
                    raise
                return False
        return True

    def copy_attributes(self, source: Path, target: Path) -> None:
        with _noted("copy attributes to", target):
            found = os.stat(source)
            with contextlib.suppress(PermissionError):
                os.chown(target, found.st_uid, found.st_gid)
            os.chmod(target, stat.S_IMODE(found.st_mode))

    def unlink(self, path: Path) -> None:
        with _noted("unlink", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        with _noted("sync directory", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def free_bytes(self, path: Path) -> int:
        figures = os.statvfs(path)
        return figures.f_bavail * figures.f_frsize

    def lock(self, path: Path, *, shared: bool = False) -> _OsLock:
        with _noted("lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            # Only an exclusive holder writes its number, and it removes it again unless it was killed.
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip("\0 \n")
            os.close(descriptor)
            raise Locked(
                f"another process{f' (pid {holder})' if holder.isdigit() else ''} holds this lock",
                path=path,
                hint="wait for it to end, or stop it; the lock goes away with its process",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if not shared:
            with contextlib.suppress(OSError):  # the number is for people; a full file system must not matter
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return _OsLock(descriptor, shared=shared)


def write_durably(files: FileSystem, path: Path, data: bytes, *, clock: Clock, mode: int = 0o644) -> None:
    """Put `data` under the name `path`: after any crash the old or the new content stands there, whole.

    mode: the file's permissions from its first byte on.
    """
    temporary = path.with_name(f".{path.name}.{clock.guid().hex[:8]}.tmp")
    file = files.open(temporary, create=True, exclusive=True, mode=mode)
    try:
        file.write(data, 0)
        file.sync()
        file.close()
        files.replace(temporary, path)
    except BaseException:
        file.close()
        files.unlink(temporary)
        raise
    files.sync_directory(path.parent)


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """Yield a name for `path` that fits into the address of a Unix socket, good within the block only."""
    if len(os.fsencode(path)) <= _SOCKET_NAME_BYTES_MAX:
        yield os.fspath(path)
        return
    with _noted("open folder of", path):
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def map_private(file: BlockFile, file_offset: int, length: int) -> mmap.mmap | None:
    """Map a range of `file`, to be read and changed in memory alone; None where there is no descriptor.

    Pages come from the file when they are first touched and stay as they are once changed here. The caller
    makes sure that the file never becomes shorter than the range, because touching a lost page ends the
    process. file_offset: multiple of the page size. Raises: ValueError if the file ends before.
    """
    descriptor = file.fileno()
    if descriptor is None:
        return None
    return mmap.mmap(
        descriptor, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=file_offset
    )


def map_shared(file: BlockFile, length: int) -> mmap.mmap | None:
    """Map the start of `file`, so that all processes see each other's changes; None without a descriptor.

    The file has at least `length` bytes and never becomes shorter. Nothing is durable.
    """
    descriptor = file.fileno()
    if descriptor is None:
        return None
    access = mmap.ACCESS_WRITE if file.writable else mmap.ACCESS_READ
    return mmap.mmap(descriptor, length, access=access)


def lock_open_file(file: BlockFile, *, shared: bool = False) -> None:
    """Make this the only open file of its name that holds this lock, until close; for a disk's one writer.

    QEMU's programs are kept off too, see image_lock. shared: hold it beside others that share it, against a
    writer; for a parent that must not change. Nothing to do where there is no descriptor. Raises: Locked at
    once if a holder stands against it.
    """
    descriptor = file.fileno()
    if descriptor is None:
        return
    with _noted("lock", file.path):
        is_free = hold_image(descriptor, writes=not shared)
    if not is_free:
        others = ", ".join(programs_with(descriptor)) or "another process or session"
        raise Locked(
            f"{others} has this file open for writing, or as the parent of a disk",
            path=file.path,
            hint="wait for it to end, or stop it; the lock goes away with its process",
        )


def who_bars_writers(file: BlockFile) -> str | None:
    """Return who holds a lock because of which nobody may write to a disk's file now; None if nobody does.

    Nothing is locked for it. None too where there is no descriptor.
    """
    descriptor = file.fileno()
    if descriptor is None:
        return None
    with _noted("test the locks of", file.path):
        if not bars_writer(descriptor):
            return None
    return ", ".join(programs_with(descriptor)) or "another process"


def who_has_open(file: BlockFile) -> str | None:
    """Return which other processes have the file of `file` open too; None if none, as far as one may know."""
    descriptor = file.fileno()
    return None if descriptor is None else ", ".join(programs_with(descriptor)) or None


def require_unused(files: FileSystem, path: Path) -> None:
    """Make sure that nobody holds a lock on the file at `path`, which is to be replaced; fine where absent.

    Raises: Locked; OSError for what cannot be opened for writing.
    """
    if not files.exists(path):
        return
    try:
        file = files.open(path, writable=True)
    except FileNotFoundError:
        return  # a link that leads nowhere
    try:
        lock_open_file(file)
    finally:
        file.close()


OS_FILES: FileSystem = OsFiles()


def socket_identity(path: Path) -> tuple[int, int] | None:
    """Return the (device, inode) of the Unix socket that stands at `path`, or None if no socket does."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None
