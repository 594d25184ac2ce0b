"""One update of a mirror: copy every disk, publish, finish; or abandon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillframe.block.reader import DiskReader
from stillframe.errors import StillframeError
from stillframe.mirror.record import CaptureFacts, MirrorRecord


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far the copy of one disk is. `total_bytes` is the data there is to read."""

    target: str
    done_bytes: int
    total_bytes: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What copying one disk came to.

    `changed_bytes` is what differs from the old mirror (all data on a first copy);
    `written_bytes` what was written to the destination for it, map and redo headers included.
    `healed_blocks`: the destination differed though the map said equal. `fell_back` says why the
    map was not believed ("" if it was, or on a first copy).
    """

    target: str
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    changed_bytes: int
    written_bytes: int
    destination_read_bytes: int
    healed_blocks: int
    seconds: float
    first_copy: bool
    fell_back: str


Stop = Callable[[], StillframeError | None]
Report = Callable[[CopyProgress], None]


def never() -> StillframeError | None:
    """The stop token that never stops."""
    return None


class Update:
    """An update that is being made. Made by MirrorFolder.begin, under its lock.

    Every method that touches the destination does so in a thread of its own: when *stop* says
    so, or when nothing moved for `stall_timeout_s`, the method raises within ten seconds even
    if the destination hangs for ever. `hung` is then true and the destination is not touched
    again by this object: the next run's recover() clears up.
    """

    hung: bool = False

    def copy_disk(
        self, target: str, reader: DiskReader, *, source: str, stop: Stop = never,
        report: Report | None = None, verify_destination: bool = False,
    ) -> CopyResult:
        """Stage what makes the mirror of *target* equal to *reader*'s disk.

        The mirror's images are not changed. *stop* is asked at least every 4 MiB and every
        0.2 s; an error it returns is raised. Raises CopyFailed (read side), DestinationFull,
        DestinationLost.
        """
        raise NotImplementedError

    def publish(self, facts: CaptureFacts, *, stop: Stop = never) -> MirrorRecord:
        """Make the update durable: the commit point.

        Disks of the old mirror that were not copied in this update leave it (their images stay,
        renamed). When this returns, a crash at any time ends in the new mirror; when it raises,
        the old one stays (call abandon).
        """
        raise NotImplementedError

    def finish(self, *, stop: Stop = never) -> MirrorRecord:
        """Write the published update into the images. Can be repeated, also by recover().

        Raises ApplyFailed: the update is still durable, as redo files; recover() tries again.
        """
        raise NotImplementedError

    def abandon(self) -> None:
        """Drop what was staged; the old mirror stays. Never raises; does nothing when hung."""
        raise NotImplementedError
