"""One update of a mirror: copy every disk, publish, finish; or abandon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.block.reader import DiskReader
from stillframe.capture.plan import FULL_READ_EVERY_S
from stillframe.capture.watched import GRACE_S, STALL_TIMEOUT_S, Stop, Watch, Watched
from stillframe.clock import Clock
from stillframe.errors import ApplyFailed, DestinationFull, DestinationLost, StillframeError, StorageError
from stillframe.mirror.apply import Unfinishable, drop, finish
from stillframe.mirror.blockmap import BLOCK_SIZE_BYTES
from stillframe.mirror.copy import THREADS
from stillframe.mirror.files import Files
from stillframe.mirror.layout import (
    DOMAIN_STAGED,
    NEXT,
    check_target,
    image_targets,
    write_file,
    write_record,
)
from stillframe.mirror.record import (
    WHOLE,
    CaptureFacts,
    DiskRecord,
    Inspection,
    MirrorRecord,
)
from stillframe.mirror.stage import CopyProgress, CopyResult, DiskStage
from stillframe.mirror.trouble import destination_errors
from stillframe.mirror.units import DATA_UNIT_BYTES

__all__ = ["CopyProgress", "CopyResult", "Report", "Update", "never"]

_T = TypeVar("_T")


Report = Callable[[CopyProgress], None]


def never() -> StillframeError | None:
    """Be the stop token that never stops."""
    return None


class Update:
    """An update that is being made. Made by MirrorFolder.begin, under its lock.

    Every method that touches the destination does so in a thread of its own: when *stop* says
    so, or when nothing moved for `stall_timeout_s`, the method raises within ten seconds even
    if the destination hangs for ever. `hung` is then true and the destination is not touched
    again by this object: the next run's recover() clears up.
    """

    def __init__(
        self, path: str, files: Files, clock: Clock, guest: str, uuid: str, found: Inspection
    ) -> None:
        self.hung = False
        self.published = False
        self.stall_timeout_s = STALL_TIMEOUT_S
        self.block_size_bytes = BLOCK_SIZE_BYTES
        self.data_unit_bytes = DATA_UNIT_BYTES
        self.threads = THREADS
        self._path = path
        self._files = files
        self._clock = clock
        self._guest = guest
        self._uuid = uuid
        self._found = found
        self._generation = os.urandom(16)
        self._disks: dict[str, DiskRecord] = {}

    @property
    def anchor(self) -> Anchor | None:
        """What the mirror as it is left in the guest to count from, None if nothing."""
        record = self._found.record
        if record is None or record.state != WHOLE:
            return None
        return record.anchor or None

    def copy_disk(  # noqa: PLR0913 -- each is said by name
        self, target: str, reader: DiskReader, *, source: str, stop: Stop = never,
        report: Report | None = None, verify_destination: bool = False, method: str = "", note: str = "",
        fell_back: bool = False, full_read_every_s: float = FULL_READ_EVERY_S,
    ) -> CopyResult:
        """Stage what makes the mirror of *target* equal to *reader*'s disk.

        Where *reader* knows what changed since `anchor`, only that is read, unless *verify_destination* or a
        last whole read longer ago than *full_read_every_s* asks for all of it, or the audit finds that it is
        wrong. The mirror's images are not changed. *stop* is asked every 0.1 s; an error it returns is
        raised. Raises CopyFailed (read side), DestinationFull, DestinationLost.
        """
        job = DiskStage(self._files, self._clock, self._found, check_target(target), reader, self._generation)
        job.block_size = self.block_size_bytes
        job.data_unit_bytes = self.data_unit_bytes
        job.threads = self.threads
        job.verify = verify_destination
        job.source = source
        job.method = method
        job.note = note
        job.fell_back = fell_back
        job.full_read_every_s = full_read_every_s

        def look() -> None:
            if report is not None:
                report(job.progress())

        disk, result = self._watched(job.run, stop, f"copy-{target}", look)
        self._disks[target] = disk
        look()
        return result

    def publish(self, facts: CaptureFacts, *, stop: Stop = never) -> MirrorRecord:
        """Make the update durable: the commit point.

        Disks of the old mirror that were not copied in this update leave it (their images stay,
        renamed). When this returns, a crash at any time ends in the new mirror; when it raises,
        the old one stays (call abandon).
        """
        def work(watch: Watch) -> MirrorRecord:
            files = self._files
            assert self._disks, "nothing was copied"
            write_file(files, DOMAIN_STAGED, facts.domain_xml.encode())
            files.fsync_folder()
            watch.tick()
            there = image_targets(files.names())
            record = MirrorRecord(
                generation=self._generation.hex(), guest=self._guest, uuid=self._uuid,
                captured_at=facts.captured_at, consistency=facts.consistency,
                disks=tuple(self._disks.values()),
                removed=tuple(target for target in there if target not in self._disks),
                anchor=facts.anchor or msgspec.UNSET,
            )
            watch.tick()
            write_record(files, NEXT, record)
            return record

        record = self._watched(work, stop, "publish")
        self.published = True
        return record

    def finish(self, *, stop: Stop = never) -> MirrorRecord:
        """Write the published update into the images. Can be repeated, also by recover().

        Raises ApplyFailed: the update is still durable, as redo files; recover() tries again.
        """
        assert self.published
        try:
            return self._watched(
                lambda watch: finish(self._files, self._clock, watch.tick), stop, "finish")
        except (DestinationLost, DestinationFull, StorageError, Unfinishable) as error:
            cause = error.__cause__
            why = (cause.strerror or "") if isinstance(cause, OSError) else str(error)
            raise ApplyFailed(
                f"The new mirror is durable in {self._path}, but could not be written into the images: {why}",
                f"df -h {self._path}; then run the command again: it goes on where this one ended",
            ) from error

    def abandon(self) -> None:
        """Drop what was staged; the old mirror stays. Never raises; does nothing when hung or published."""
        if self.published or self.hung:
            return
        with contextlib.suppress(Exception):
            self._watched(lambda _: drop(self._files), never, "abandon", stall_timeout_s=GRACE_S)

    def _watched(
        self, work: Callable[[Watch], _T], stop: Stop, name: str,
        each_look: Callable[[], None] | None = None, *, stall_timeout_s: float | None = None,
    ) -> _T:
        if self.hung:
            raise DestinationLost(
                f"The destination {self._path} hangs; nothing more is done there in this run.",
                "check the share (dmesg, df), then run the command again")
        watched = Watched(work, self._clock, name)
        try:
            with destination_errors(self._path, begun=True):
                return watched.result(
                    stop, each_look=each_look, stall_timeout_s=stall_timeout_s or self.stall_timeout_s)
        finally:
            self.hung = watched.watch.hung
