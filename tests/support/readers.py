"""Programs that are not ours read our images and those of others, and where each of them may not be believed.

A reader answers with what the guest would see, or refuses. `doubts(reader, facts)` says why an answer of it
is no evidence for an image with such facts: then the tests do not ask, and one test shows that the doubt is
still deserved. Everything else that a reader answers must be what we read.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from tests.support.images import Content, Nz4k, copy_sparse, digest_ranges, file_content
from tests.support.tools import missing, require_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    from tests.support.images import Range

try:
    import pyvhdi
except ImportError:
    pyvhdi = None
try:
    from dissect.hypervisor.disk.vhd import VHD
    from dissect.hypervisor.disk.vhdx import VHDX
except ImportError:
    VHD = VHDX = None

_TOOL_TIMEOUT_S = 120
_RAW_FILE_BYTES_MAX = 4 << 40  # some file systems hold no larger file, be it empty
_STREAMED_BYTES_MAX = 512 << 20  # 7-Zip writes out every zero


class Refused(Exception):
    """A reader does not open an image, or warns of its own answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an image is, from another source than our own reader."""

    format: str  # "vhd" or "vhdx"
    type: str
    virtual_bytes: int
    logical_sector_bytes: int = 512
    dirty: bool = False
    raw_parent: bool = False
    depth: int = 0  # how many parents below
    bitmap_absent: bool = False  # a child whose chunks have no sector bitmap, for it holds nothing
    sums_good: bool = True


@dataclass(frozen=True, slots=True)
class Doubt:
    """Where a reader is known to be wrong or to refuse, the rule that it misses, and how it fails."""

    applies: Callable[[Facts], bool]
    reason: str  # with the section of the specification
    refuses: bool  # else it answers wrongly, without a word


@dataclass(frozen=True, slots=True)
class Reader:
    """A program with an opinion. read: of (image, facts, ranges to ask, folder for its own files)."""

    name: str
    read: Callable[[Path, Facts, Sequence[Range], Path], Content]
    doubts: tuple[Doubt, ...]
    virtual_bytes_max: int = 1 << 63  # more would take it too long


def _read_qemu(path: Path, facts: Facts, ranges: Sequence[Range], folder: Path) -> Content:
    """Convert to raw; a log is replayed in a copy first; the size of a VHD is told to be the footer's."""
    if facts.dirty:
        path = copy_sparse(path, folder / f"repaired.{path.name}")
        _run("qemu-img", "check", "-f", "vhdx", "-r", "all", path)
    image = qemu_image(path, facts.format)
    if facts.virtual_bytes > _RAW_FILE_BYTES_MAX:
        return Content(facts.virtual_bytes, _qemu_windows(image, facts, ranges, folder))
    raw = folder / f"{path.name}.by-qemu.raw"
    _run("qemu-img", "convert", "--image-opts", "-O", "raw", image, raw)
    content = file_content(raw)
    raw.unlink()
    return content


def qemu_image(path: Path, format_name: str) -> str:
    """Return how qemu is told to open an image with the size that all others see."""
    name = os.fspath(path).replace(",", ",,")
    if format_name == "vhd":
        return f"driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={name}"
    return f"driver={format_name},file.driver=file,file.filename={name}"


def _qemu_windows(image: str, facts: Facts, ranges: Sequence[Range], folder: Path) -> str:
    """Read no more than `ranges`, all at once: slices of the disk as sources, one after the other."""
    whole = [(offset, -(-length // 512) * 512) for offset, length in ranges]
    slices = [f"driver=raw,offset={offset},size={length},{_nested(image)}" for offset, length in whole]
    raw = folder / "slices.raw"
    _run("qemu-img", "convert", "--image-opts", "-O", "raw", *slices, raw)
    starts = dict(
        zip(
            (offset for offset, _ in whole),
            accumulate((length for _, length in whole), initial=0),
            strict=False,
        )
    )
    with raw.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            start = max(each for each in starts if each <= offset)
            file.seek(starts[start] + offset - start)
            return file.read(length)

        return digest_ranges(read, ranges, facts.virtual_bytes)


def _nested(image: str) -> str:
    """Return qemu's options with each of them below `file`."""
    return ",".join(f"file.{option}" for option in image.split(",") if option)


def _read_7zip(path: Path, facts: Facts, ranges: Sequence[Range], folder: Path) -> Content:  # noqa: ARG001 - a reader's shape
    """Extract to a pipe: it writes every byte of the disk. It finds parents in the image's folder."""
    command = [require_tool("7z"), "x", "-so", f"-t{facts.format}", path.name]
    digest, size = Nz4k(), 0
    with subprocess.Popen(
        command, cwd=path.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while piece := process.stdout.read(1 << 20):
            digest.add(size, piece)
            size += len(piece)
        complaint = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise Refused(f"7z ended with {process.returncode}: {complaint}")
    return Content(size, digest.hexdigest())


def _read_libvhdi(path: Path, facts: Facts, ranges: Sequence[Range], folder: Path) -> Content:  # noqa: ARG001 - as above
    """Read through the Python binding of libvhdi; it is given the parents that the image names."""
    if pyvhdi is None:
        missing("libvhdi-python is not installed (pip install libvhdi-python)")
    opened: list[Any] = []
    try:
        disk = _open_libvhdi(path, opened)
        size = disk.get_media_size()
        return Content(
            size, digest_ranges(lambda at, length: disk.read_buffer_at_offset(length, at), ranges, size)
        )
    except OSError as error:
        raise Refused(f"libvhdi: {error}") from error
    finally:
        for each in opened:
            each.close()


def _open_libvhdi(path: Path, opened: list[Any]) -> Any:
    disk = pyvhdi.file()
    disk.open(os.fspath(path))
    opened.append(disk)
    identifier = disk.get_parent_identifier()
    if identifier is not None:
        disk.set_parent(_open_libvhdi(_by_identifier(path.parent, identifier), opened))
    return disk


def _by_identifier(folder: Path, identifier: str) -> Path:
    """Return the parent, by its id: the library reads one kind of name only and leaves the search to its caller."""
    for path in sorted(folder.iterdir()):
        if path.suffix in {".vhd", ".vhdx", ".avhdx"}:
            disk = pyvhdi.file()
            disk.open(os.fspath(path))
            found = disk.get_identifier()
            disk.close()
            if found == identifier:
                return path
    raise Refused(f"libvhdi: no image in {folder} has the id {identifier}")


def _read_dissect(path: Path, facts: Facts, ranges: Sequence[Range], folder: Path) -> Content:  # noqa: ARG001 - as above
    """Read through dissect.hypervisor; it finds the parents of a VHDX itself."""
    if VHDX is None:
        missing("dissect.hypervisor is not installed (pip install dissect.hypervisor)")
    with _dissect_disk(path, facts) as disk:

        def read(offset: int, length: int) -> bytes:
            disk.seek(offset)
            octets: bytes = disk.read(length)
            return octets

        return Content(disk.size, digest_ranges(read, ranges, disk.size))


@contextmanager
def _dissect_disk(path: Path, facts: Facts) -> Iterator[Any]:
    """Open a disk and close what it opened itself, which it leaves to the collector."""
    disk: Any = None
    try:
        with path.open("rb") as file:
            yield (disk := VHD(file) if facts.format == "vhd" else VHDX(path))
    except AssertionError:
        raise
    except Exception as error:  # it raises whatever its parts do
        raise Refused(f"dissect: {error!r}") from error
    finally:
        while disk is not None:
            disk.fh.close()
            disk = getattr(disk, "parent", None)


def _run(name: str, *arguments: str | Path) -> None:
    done = run_tool(name, *arguments, expected=tuple(range(256)), timeout_s=_TOOL_TIMEOUT_S)
    if done.returncode:
        raise Refused(f"{name} ended with {done.returncode}: {done.stderr.strip()}")


def vhdiinfo_bytes(path: Path) -> int:
    """Return the size of the disk that libvhdi's own program tells; it is older than the Python binding."""
    for line in run_tool("vhdiinfo", path).stdout.splitlines():
        if "Media size" in line:
            text = line.rpartition("(")[2].partition(" ")[0] if "(" in line else line.split()[-2]
            return int(text)
    raise Refused("vhdiinfo tells no size")


def _vhd_child(facts: Facts) -> bool:
    return facts.format == "vhd" and facts.type == "differencing"


def _dirty(facts: Facts) -> bool:
    return facts.dirty


_NO_REPLAY = "ignores the VHDX's log: [MS-VHDX] 2.3.3, the log must be replayed before the file is used"
_RAW_PARENT = (
    "wants the parent to be a VHD: XenServer lets a raw disk be one; VHD 1.0, Differencing Hard Disk Images"
)

READERS = (
    Reader(
        "qemu",
        _read_qemu,
        (
            Doubt(
                _vhd_child, "ignores a VHD's parent: VHD 1.0, Differencing Hard Disk Images", refuses=False
            ),
            Doubt(
                lambda facts: facts.format == "vhdx" and facts.type == "differencing",
                "opens no differencing VHDX: [MS-VHDX] 2.6.2.6",
                refuses=True,
            ),
            Doubt(
                lambda facts: facts.logical_sector_bytes != 512,
                "opens no logical sectors of 4096 bytes: [MS-VHDX] 2.6.2.4",
                refuses=True,
            ),
            Doubt(
                lambda facts: not facts.sums_good,
                "refuses a wrong checksum: VHD 1.0, Hard Disk Footer",
                refuses=True,
            ),
        ),
    ),
    Reader(
        "7-Zip",
        _read_7zip,
        (
            Doubt(_dirty, "says that it does not replay the log: [MS-VHDX] 2.3.3", refuses=True),
            Doubt(
                lambda facts: (
                    facts.format == "vhdx" and facts.virtual_bytes // facts.logical_sector_bytes % 2 == 1
                ),
                "refuses an odd number of sectors: [MS-VHDX] 2.6.2.2 asks for whole sectors only",
                refuses=True,
            ),
            Doubt(lambda facts: facts.raw_parent, _RAW_PARENT, refuses=True),
            Doubt(
                lambda facts: not facts.sums_good,
                "refuses a wrong checksum: VHD 1.0, Hard Disk Footer",
                refuses=True,
            ),
        ),
        virtual_bytes_max=_STREAMED_BYTES_MAX,
    ),
    Reader(
        "libvhdi",
        _read_libvhdi,
        (
            Doubt(
                lambda facts: _vhd_child(facts) and not facts.raw_parent,
                "takes all sectors after the first one that a byte of the bitmap names: VHD 1.0, Block Bitmap",
                refuses=False,
            ),
            Doubt(_dirty, _NO_REPLAY, refuses=False),
            Doubt(
                lambda facts: facts.format == "vhdx" and facts.bitmap_absent,
                "takes an absent bitmap to stand at the start of the file: [MS-VHDX] 2.5.1.2, SB_BLOCK_NOT_PRESENT",
                refuses=False,
            ),
            Doubt(lambda facts: facts.raw_parent, _RAW_PARENT, refuses=True),
        ),
    ),
    Reader(
        "dissect",
        _read_dissect,
        (
            Doubt(
                _vhd_child, "ignores a VHD's parent: VHD 1.0, Differencing Hard Disk Images", refuses=False
            ),
            Doubt(
                lambda facts: facts.format == "vhdx" and facts.depth > 1,
                "loses sectors where a partial block lies over a partial block: [MS-VHDX] 2.5.1.1",
                refuses=False,
            ),
            Doubt(_dirty, _NO_REPLAY, refuses=False),
        ),
    ),
)


def doubts(reader: Reader, facts: Facts) -> list[Doubt]:
    """Return why a reader is no evidence for such an image; empty: it is."""
    return [doubt for doubt in reader.doubts if doubt.applies(facts)]
