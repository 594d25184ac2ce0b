"""Checking many packs on threads, keeping what was found, and when each was checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from stillframe.clock import Clock
from stillframe.repository.check import CheckContent, Checked, check_pack
from stillframe.repository.heal import record_bad
from stillframe.repository.jobs import InOrder
from stillframe.repository.layout import PackName
from stillframe.repository.verified import read_verified, write_verified
from stillframe.storage.model import Storage

_THREADS = 2
_AHEAD = 4
_SAVE_AFTER_S = 60.0
_NAMED_MOST = 8

#: Called with the bytes of packs that were checked, and of all that are to be.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """An object that is missing, or not what was stored. *is_mended*: it hurts no snapshot (any more)."""

    key: str
    why: str
    is_mended: bool = False


class Scrub:
    """One verification's packs. For one thread, which has others work for it."""

    def __init__(self, storage: Storage, clock: Clock, progress: Progress) -> None:
        self._storage = storage
        self._clock = clock
        self._progress = progress
        self._saved_at_s = clock.monotonic_s()
        self._expected_bytes = 0
        self.verified = read_verified(storage)
        self.packs = 0
        self.slots = 0
        self.size_bytes = 0
        #: Bad slots by birth, with what is wrong with the last one.
        self.bad: dict[PackName, int] = {}
        self._why: dict[PackName, str] = {}
        #: Packs as they are stored: gone since they were listed; without a footer; without any fault.
        self.vanished: list[PackName] = []
        self.unreadable: list[PackName] = []
        self.sound: set[PackName] = set()
        self._findings: list[tuple[Finding, frozenset[tuple[PackName, int]]]] = []

    def expect(self, size_bytes: int) -> None:
        """Say how much is to be checked, for the progress."""
        self._expected_bytes = size_bytes

    def run(self, packs: Iterable[tuple[PackName, int]], check_content: CheckContent | None) -> None:
        """Check packs (with their sizes). What comes of one doesn't keep others from being checked."""
        with ThreadPoolExecutor(_THREADS, "verify") as pool:
            jobs: InOrder[PackName, Checked] = InOrder(pool, _AHEAD)
            try:
                for pack, size_bytes in packs:
                    if jobs.full:
                        self._take(jobs, full=check_content is not None)
                    jobs.put(pack, partial(check_pack, self._storage, pack, size_bytes, check_content))
                while jobs:
                    self._take(jobs, full=check_content is not None)
            finally:
                jobs.drop()

    def record(self) -> None:
        """Write down what is bad. Raises StorageError."""
        for pack in self.unreadable:
            record_bad(self._storage, pack, None, self._why[pack], self._clock.now())
        for pack, slots in self.bad.items():
            record_bad(self._storage, pack, slots, self._why[pack], self._clock.now())

    def findings(self, lost: Collection[tuple[PackName, int]] | None = None) -> Iterator[Finding]:
        """Yield what was found. *lost* are the slots for want of which a snapshot can't be read, if known."""
        for finding, slots in self._findings:
            is_mended = lost is not None and bool(slots) and not any(slot in lost for slot in slots)
            yield replace(finding, is_mended=is_mended)

    def save(self, there: Iterable[PackName]) -> None:
        """Write down when packs were verified; *there* are those that exist. Raises StorageError."""
        if self.packs:
            self.verified.forget_all_but(there)
            write_verified(self._storage, self.verified)

    def _take(self, jobs: InOrder[PackName, Checked], *, full: bool) -> None:
        pack, found = jobs.take()
        if found.is_gone:
            self.vanished.append(pack)
            return
        self.packs += 1
        self.slots += found.slots
        self.size_bytes += found.size_bytes
        self._note(found)
        self.verified.note([pack], self._clock.now(), full=full)
        self._progress(self.size_bytes, max(self._expected_bytes, self.size_bytes))
        if self._clock.monotonic_s() - self._saved_at_s > _SAVE_AFTER_S:
            self._saved_at_s = self._clock.monotonic_s()
            write_verified(self._storage, self.verified)

    def _note(self, found: Checked) -> None:
        if found.why:
            self._findings.append((Finding(found.pack.key, found.why), frozenset()))
        if found.unreadable:
            self.unreadable.append(found.pack)
            self._why[found.pack] = found.why
        reasons: dict[str, list[tuple[PackName, int]]] = {}
        for birth, slot, why in found.bad:
            self.bad[birth] = self.bad.get(birth, 0) | 1 << slot
            self._why[birth] = why
            reasons.setdefault(why, []).append((birth, slot))
        for why, slots in reasons.items():
            words = f"{named([slot for _, slot in slots])}: {why}"
            self._findings.append((Finding(found.pack.key, words), frozenset(slots)))
        if not found.why and not found.bad:
            self.sound.add(found.pack)


def named(slots: Sequence[int] | Iterator[int]) -> str:
    """Return numbers of slots for people: ``slots 3, 7``."""
    every = [str(slot) for slot in slots]
    more = f" and {len(every) - _NAMED_MOST} more" if len(every) > _NAMED_MOST else ""
    return f"slot{'s' if len(every) > 1 else ''} {', '.join(every[:_NAMED_MOST])}{more}"
