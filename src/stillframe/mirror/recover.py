"""Looking at a mirror folder and clearing up in it, when the destination may hang for ever."""

from __future__ import annotations

from pathlib import Path

from stillframe.capture.watched import Stop, Watched
from stillframe.clock import Clock
from stillframe.mirror.folder import MirrorFolder, Recovery
from stillframe.mirror.record import Inspection

_LOOK_TIMEOUT_S = 15.0
_RECOVER_TIMEOUT_S = 24 * 3600.0


def inspect_folder(path: Path, *, clock: Clock) -> Inspection:
    """Return what the mirror folder holds. Raises DestinationLost if it does not answer in 15 s."""
    look = Watched(lambda _watch: MirrorFolder(path, clock=clock).inspect(), clock, "inspect")
    return look.result(lambda: None, stall_timeout_s=_LOOK_TIMEOUT_S, grace_s=0.0)


def recover_folder(path: Path, *, clock: Clock, stop: Stop) -> Recovery:
    """Finish or drop what an earlier update left in the folder; nothing if the folder is not there.

    *stop* is asked all the while, so that a person can end the wait for a destination that
    hangs. Raises what MirrorFolder.lock and MirrorFolder.recover raise, and what *stop* returns.
    """

    def work() -> Recovery:
        if not path.is_dir():
            return Recovery()
        folder = MirrorFolder(path, clock=clock)
        with folder.lock("recover"):
            return folder.recover()

    return Watched(lambda _watch: work(), clock, "recover").result(stop, stall_timeout_s=_RECOVER_TIMEOUT_S)
