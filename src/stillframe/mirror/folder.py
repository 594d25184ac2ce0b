"""The folder that holds one guest's mirror, and what may be found in it after a crash.

(format and protocol in prose: to come)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe.clock import Clock
from stillframe.mirror.record import Inspection
from stillframe.mirror.update import Update


@dataclass(frozen=True, slots=True)
class Recovery:
    """What recover() did. `words` is one sentence for people; empty when nothing was to do."""

    words: str = ""
    finished: bool = False
    dropped: bool = False
    damaged: bool = False


class MirrorFolder:
    """DEST/GUEST. Any method may raise DestinationLost, DestinationFull or DestinationUnwritable."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self.path = path
        self._clock = clock

    def inspect(self) -> Inspection:
        """Look, without the lock and without changing anything."""
        raise NotImplementedError

    @contextlib.contextmanager
    def lock(self, holder: str) -> Iterator[None]:
        """Hold the folder for the length of the block; makes DEST/GUEST if it is not there.

        DEST itself must exist (it may be a share that is not mounted): DestinationUnwritable
        otherwise. Raises DestinationBusy naming the holder, DestinationForeign when the folder
        holds what stillframe did not write (nothing is changed then).
        """
        raise NotImplementedError
        yield

    def recover(self) -> Recovery:
        """Finish a published update, or drop what an unpublished one left. Needs the lock.

        Can be repeated. Raises ApplyFailed when the images can't be written; the update is
        still durable then.
        """
        raise NotImplementedError

    def begin(self, guest: str, uuid: str) -> Update:
        """Begin an update. Needs the lock, and recover() called before.

        Raises DestinationForeign when the folder holds a mirror of another guest (UUID).
        """
        raise NotImplementedError
