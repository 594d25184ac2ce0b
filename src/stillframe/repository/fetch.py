"""Slots fetched ahead: neighbours in one request, opened on threads, the last ones kept.

A slot that is wanted twice while it is under way or kept is read once. What is kept is bounded by its
plain size; what callers hold beyond that is theirs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from stillframe.errors import ObjectMissing, ObjectTruncated, SlotDamaged, StillframeError
from stillframe.repository.jobs import keep_freed_memory
from stillframe.repository.layout import PackName
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places
from stillframe.repository.slots import Chunks
from stillframe.units import KIB, MIB

KEPT_BYTES = 48 * MIB
#: Stored bytes of one request, and what may lie unused between two slots that are read at once.
_REQUEST_BYTES = 4 * MIB
_GAP_BYTES = 64 * KIB

#: A slot that is on its way; its result raises SlotDamaged or StorageError.
Coming = Future[Chunks]
#: A slot, where its bytes are now, and who waits for it.
_Order = tuple[SlotRef, SlotRef, Coming]


class SlotFetcher:
    """Fetches data slots. For several threads. Close it, or use it as a block."""

    def __init__(self, places: Places, threads: int = 2, kept_bytes: int = KEPT_BYTES) -> None:
        keep_freed_memory()
        self._places = places
        self._repository = places.repository
        parameters = places.repository.parameters
        #: How many slots are kept.
        self.most = max(4, kept_bytes // (parameters.slot_chunks * parameters.chunk_bytes))
        self._pool = ThreadPoolExecutor(threads, "fetch")
        self._kept: OrderedDict[tuple[PackName, int], Coming] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads; what is not there yet never comes."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def want(self, places: Iterable[SlotRef]) -> dict[SlotRef, Coming]:
        """Return the slots, on their way; each is fetched once however often it is named."""
        orders: list[tuple[SlotRef, Coming]] = []
        wanted: dict[SlotRef, Coming] = {}
        with self._lock:
            for place in places:
                at = (place.pack, place.slot)
                coming = self._kept.get(at)
                if coming is None:
                    coming = self._kept[at] = Future()
                    orders.append((place, coming))
                else:
                    self._kept.move_to_end(at)
                wanted[place] = coming
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        for request in _requests(self._located(orders)):
            self._pool.submit(partial(self._fetch, request))
        return wanted

    def at_hand(self, place: SlotRef) -> Chunks | None:
        """Return a slot if it is kept and there, else None."""
        at = (place.pack, place.slot)
        with self._lock:
            coming = self._kept.get(at)
            if coming is None:
                return None
            self._kept.move_to_end(at)
        try:
            return coming.result(0)  # one lock, where asking first whether it is there would take three
        except (TimeoutError, StillframeError):
            return None

    def _located(self, orders: Iterable[tuple[SlotRef, Coming]]) -> Iterator[_Order]:
        for place, coming in orders:
            try:
                now = self._places.located(place)
            except (SlotDamaged, ObjectMissing):
                now = place  # it can't be read in one go: `stored` looks everywhere
            except StillframeError as error:
                self._failed(place, coming, error)
                continue
            yield place, now, coming

    def _fetch(self, request: list[_Order]) -> None:
        """Read one request's slots and open them, or hand on what went wrong to all who wait."""
        try:
            begin = request[0][1].offset_bytes
            end = request[-1][1].offset_bytes + request[-1][1].stored_bytes
            try:
                content = memoryview(
                    self._repository.storage.get(request[0][1].pack.key, begin, end - begin))
            except (ObjectMissing, ObjectTruncated):
                content = None
            for place, now, coming in request:
                at = now.offset_bytes - begin
                stored = None if content is None else content[at : at + now.stored_bytes]
                self._open(place, stored, coming)
        except BaseException as error:  # noqa: BLE001 -- raised by whoever waits
            for place, _, coming in request:
                if not coming.done():
                    self._failed(place, coming, error)

    def _failed(self, place: SlotRef, coming: Coming, error: BaseException) -> None:
        """Tell who waits; whoever wants the slot again makes a new attempt."""
        with self._lock:
            self._kept.pop((place.pack, place.slot), None)
        coming.set_exception(error)

    def _open(self, place: SlotRef, stored: memoryview | None, coming: Coming) -> None:
        try:
            coming.set_result(self._opened(place, stored))
        except SlotDamaged as damage:
            self._failed(place, coming, damage)

    def _opened(self, place: SlotRef, stored: memoryview | None) -> Chunks:
        if stored is not None:
            with contextlib.suppress(ValueError):  # another home may have it
                return self._repository.codec.open_chunks(place.pack, place.slot, stored)
        return self._places.chunks(place)


def _requests(orders: Iterable[_Order]) -> Iterator[list[_Order]]:
    """Yield *orders* in groups that lie close together in one pack."""
    group: list[_Order] = []
    for order in sorted(orders, key=lambda order: (order[1].pack, order[1].offset_bytes)):
        now = order[1]
        if group:
            first, last = group[0][1], group[-1][1]
            gap = now.offset_bytes - (last.offset_bytes + last.stored_bytes)
            length = now.offset_bytes + now.stored_bytes - first.offset_bytes
            if now.pack != first.pack or not 0 <= gap <= _GAP_BYTES or length > _REQUEST_BYTES:
                yield group
                group = []
        group.append(order)
    if group:
        yield group
