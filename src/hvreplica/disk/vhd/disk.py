"""A VHD as a disk: what it is beside the guest's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hvreplica.disk.blocks import BlockDisk
from hvreplica.disk.disk import DiskInfo
from hvreplica.disk.raw import RawDisk
from hvreplica.disk.vhd.bitmaps import open_bitmaps
from hvreplica.disk.vhd.parent import VhdParentReference, names_of
from hvreplica.disk.vhd.relink import relink
from hvreplica.disk.vhd.session import WriteSession
from hvreplica.formats.vhd_footer import SECTOR_BYTES
from hvreplica.formats.vhdx_bat import has_place

if TYPE_CHECKING:
    import uuid

    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.vhd.image import Image
    from hvreplica.disk.vhd.table import VhdTable
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhd_footer import Footer


def creator_of(footer: Footer) -> str:
    """Return who made the file and in which version, for people."""
    name = footer.creator_application.decode("ascii", "replace").strip("\0 ")
    return f"{name} {footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}".strip()


class VhdParts(NamedTuple):
    """What a VHD that is open for writing is made of, for whoever changes more than the guest's bytes."""

    file: BlockFile
    image: Image
    table: VhdTable
    bitmaps: SectorBitmaps
    session: WriteSession


class VhdDisk(BlockDisk):
    """See disk.Disk. A dynamic or differencing VHD. Owns `file`."""

    format = "vhd"
    logical_sector_bytes = SECTOR_BYTES
    physical_sector_bytes = SECTOR_BYTES
    virtual_disk_id = None

    def __init__(
        self, *, file: BlockFile, image: Image, table: VhdTable, footer: Footer | None = None
    ) -> None:
        """footer: what the file's footers say, where that is not what `image` shows."""
        bitmaps = open_bitmaps(file, table, image.geometry)
        session = None
        self._parts: VhdParts | None = None
        if file.writable:
            session = WriteSession(file, image, table, bitmaps, footer=footer)
            self._parts = VhdParts(file, image, table, bitmaps, session)
        super().__init__(
            file=file,
            table=table,
            bitmaps=bitmaps,
            session=session,
            has_parent=image.has_parent,
            virtual_bytes=image.footer.current_size,
        )
        self.parent_reference = VhdParentReference(file.path, image) if image.has_parent else None
        self._image = image
        self._vhd_table = table

    def parts(self) -> VhdParts:
        """Return what the disk is made of. Raises: PermissionError if it is open for reading only."""
        if self._parts is None:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        return self._parts

    @property
    def data_write_guid(self) -> None:
        """None: nothing in a VHD tells of changes to its data."""
        return

    @property
    def unique_id(self) -> uuid.UUID:
        """The identity by which children name their parent."""
        return self._image.footer.unique_id

    def rebase(self, parent: Disk) -> None:
        """Make `parent` the parent of this differencing disk, durably and at once. Close it afterwards.

        Before the first change of a session. Raises: ParentMismatch if it is no VHD.
        """
        if not self.writable:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        relink(
            self._file,
            self._image,
            bitmap_offsets=self._vhd_table.bitmap_offsets(),
            parent=names_of(self.path, parent),
        )

    @property
    def _keeps_blocks(self) -> bool:
        # A block that is given back and taken again would make XenServer's batmap speak of another one.
        return self._image.has_batmap

    def info(self) -> DiskInfo:
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type="differencing" if self._has_parent else "dynamic",
            virtual_bytes=self.virtual_bytes,
            file_bytes=self._file.size(),
            allocated_bytes=len(self._table.places(has_place)) * self.block_bytes,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
            block_bytes=self.block_bytes,
            creator=creator_of(self._image.footer),
            disk_id=str(self.unique_id),
            parent=self._parent_name(),
        )


class FixedVhdDisk(RawDisk):
    """See disk.Disk. A fixed VHD: the guest's bytes, and a footer that is never touched. Owns `file`."""

    format = "vhd"
    physical_sector_bytes = SECTOR_BYTES

    def __init__(self, file: BlockFile, footer: Footer) -> None:
        super().__init__(file)
        self.virtual_bytes = footer.current_size
        self.unique_id = footer.unique_id
        self.footer = footer

    def info(self) -> DiskInfo:
        allocated = sum(length for _, length in self._file.data_extents(0, self.virtual_bytes))
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type="fixed",
            virtual_bytes=self.virtual_bytes,
            file_bytes=self._file.size(),
            allocated_bytes=allocated,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
            creator=creator_of(self.footer),
            disk_id=str(self.unique_id),
        )
