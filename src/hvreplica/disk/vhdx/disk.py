"""A VHDX as a disk: what it is beside its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hvreplica.disk.blocks import BlockDisk
from hvreplica.disk.disk import Direct, DiskInfo
from hvreplica.disk.paths import relative_windows_path
from hvreplica.disk.vhdx.bitmaps import open_bitmaps
from hvreplica.disk.vhdx.parent import VhdxParentReference
from hvreplica.disk.vhdx.relink import locator_change
from hvreplica.disk.vhdx.session import WriteSession
from hvreplica.formats.vhdx_bat import has_place
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from hvreplica.clock import Clock
    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.vhdx.bat import Bat
    from hvreplica.disk.vhdx.headers import Headers
    from hvreplica.disk.vhdx.image import Image
    from hvreplica.files import BlockFile

_RESERVED_BAT_BYTES = 8 * MIB


class VhdxParts(NamedTuple):
    """What a VHDX that is open for writing is made of, for whoever changes more than the guest's bytes.

    bitmaps: of a differencing disk, else None.
    """

    file: BlockFile
    image: Image
    bat: Bat
    bitmaps: SectorBitmaps | None
    session: WriteSession


class VhdxDisk(BlockDisk):
    """See disk.Disk. Owns `file`."""

    format = "vhdx"

    def __init__(
        self,
        *,
        file: BlockFile,
        shown: BlockFile,
        headers: Headers,
        image: Image,
        bat: Bat,
        replayed: bool,
        clock: Clock,
    ) -> None:
        """file: writable or not; shown: what to read it through, the overlay of a dirty log or the file
        itself.

        replayed: whether the file's own log was not empty.
        """
        parameters = image.parameters
        self.logical_sector_bytes = parameters.logical_sector_bytes
        self.physical_sector_bytes = parameters.physical_sector_bytes
        self.parent_reference = None
        bitmaps = None
        if parameters.has_parent and image.locator is not None:
            bitmaps = open_bitmaps(shown, bat, sector_bytes=parameters.logical_sector_bytes)
            self.parent_reference = VhdxParentReference(file.path, image.locator, parameters)
        session = None
        self._parts: VhdxParts | None = None
        if file.writable:
            session = WriteSession(file, headers, image, bat, bitmaps=bitmaps, clock=clock)
            self._parts = VhdxParts(file, image, bat, bitmaps, session)
        super().__init__(
            file=shown,
            table=bat,
            bitmaps=bitmaps,
            session=session,
            has_parent=parameters.has_parent,
            virtual_bytes=parameters.virtual_bytes,
        )
        self._bat = bat
        self._headers = headers
        self._image = image
        self._replayed = replayed

    def parts(self) -> VhdxParts:
        """Return what the disk is made of. Raises: PermissionError if it is open for reading only."""
        if self._parts is None:
            error = PermissionError(f"{self.path} is open for reading only")
            raise error
        return self._parts

    @property
    def data_write_guid(self) -> uuid.UUID:
        return self._headers.current.data_write_guid

    @property
    def virtual_disk_id(self) -> uuid.UUID:
        """The identity that a guest sees, which a child shares with its parent. Spec: [MS-VHDX] 2.6.2.3."""
        return self._image.parameters.virtual_disk_id

    def identify(self, data_write_guid: uuid.UUID) -> None:
        """Flush, and give the file this DataWriteGuid, durably.

        Before the first change of a session, that change takes it in place of a new one.
        """
        self.parts().session.identify(data_write_guid)

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:
        if data_write_guid is not None and self.writable:
            self.identify(data_write_guid)
        direct = super().direct()
        if self.writable:
            self._reserve_structures()
        return direct

    def _reserve_structures(self) -> None:
        """Give the log and the BAT the blocks that their holes lack, so that no flush fails for want of room.

        A hole is written as the zeros that it reads as. Of a very long BAT, of which little is ever used,
        only the start. Raises: OSError with ENOSPC.
        """
        headers = self._headers.current
        ranges = (
            (headers.log_offset, headers.log_length),
            (self._image.bat.file_offset, min(self._image.bat.length, _RESERVED_BAT_BYTES)),
        )
        zeros = bytes(MIB)
        for start, length in ranges:
            at = start
            for offset, held in [*self._file.data_extents(start, start + length), (start + length, 0)]:
                while at < offset:
                    count = min(offset - at, MIB)
                    self._file.write(memoryview(zeros)[:count], at)
                    at += count
                at = max(at, offset + held)

    def relink(self, linkages: Sequence[uuid.UUID], relative_path: str | None = None) -> None:
        """Make the parent's locator name these identities, one or two, and another path, durably and at once.

        relative_path: as Windows spells it; None keeps the paths. What the guest sees has not changed for
        that, and so the DataWriteGuid stays. What this object knows of the parent stays as it was. Raises:
        FieldOutOfRange where the file has no room for the path.
        """
        session = self.parts().session
        session.identify(self.data_write_guid)
        change = locator_change(
            self._file, self._image.metadata, linkages=linkages, relative_path=relative_path
        )
        session.commit_structures(*change)
        session.clear()

    @property
    def is_merged(self) -> bool:
        """Whether the second identity that its parent may have is its own: the last step of a merge."""
        locator = self._image.locator
        return locator is not None and locator.second_linkage == self.data_write_guid

    def rebase(self, parent: Disk) -> None:
        """Make `parent`, a VHDX, the parent of this differencing disk, durably and at once.

        Close it afterwards.
        """
        if parent.data_write_guid is None:
            raise TypeError("a parent without a DataWriteGuid")
        self.relink([parent.data_write_guid], relative_windows_path(self.path, parent.path))

    @property
    def _keeps_blocks(self) -> bool:
        return self._image.parameters.is_fixed

    def info(self) -> DiskInfo:
        self._bat.check_all()
        header = self._headers.current
        parameters = self._image.parameters
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type=self._type(),
            virtual_bytes=self.virtual_bytes,
            file_bytes=self._file.size(),
            allocated_bytes=len(self._bat.places(has_place)) * self.block_bytes,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
            block_bytes=self.block_bytes,
            creator=self._image.creator,
            disk_id=str(parameters.virtual_disk_id),
            file_write_guid=str(header.file_write_guid),
            data_write_guid=str(header.data_write_guid),
            log="replayed" if self._replayed else "clean",
            parent=self._parent_name(),
        )

    def _type(self) -> str:
        if self._has_parent:
            return "differencing"
        return "fixed" if self._image.parameters.is_fixed else "dynamic"
