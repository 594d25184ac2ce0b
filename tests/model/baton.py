"""Threads that take turns: one holds the baton, and hands it on before each storage operation.

Who goes next is drawn from a seeded generator, so a schedule can be run again. Any actor may die at any
operation; it then dies at every further one too, as a killed process does nothing any more.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from stillframe.errors import StorageLost
from stillframe.storage.model import Content, Listed, Stat, Storage
from stillframe.storage.wrappers import Wrapper

#: A run takes a fraction of a second in memory, and some on a server.
_PATIENCE_S = 120.0


class Crash(BaseException):
    """The actor was killed."""


@dataclass(eq=False)
class Actor:
    """One process. *error* is what ended it, if it was not a crash."""

    name: str
    work: Callable[[], None]
    turn: threading.Lock = field(default_factory=threading.Lock)
    crashed: bool = False
    ended: bool = False
    error: BaseException | None = None


class Baton:
    """Runs actors, one at a time. *stays* is how likely an actor goes on; *crashes*, how likely it dies."""

    def __init__(self, chance: random.Random, stays: float, crashes: float) -> None:
        self._chance = chance
        self._stays = stays
        self._crashes = crashes
        self._running: list[Actor] = []
        self._done = threading.Event()
        self.current: Actor | None = None
        self.steps = 0

    def run(self, actors: list[Actor]) -> None:
        """Run all actors to their ends."""
        self._running = list(actors)
        threads = [threading.Thread(target=self._live, args=(actor,), name=actor.name) for actor in actors]
        for actor, thread in zip(actors, threads, strict=True):
            actor.turn.acquire()
            thread.start()
        self._hand_on()
        if not self._done.wait(_PATIENCE_S):
            raise TimeoutError(f"stuck at {self.current}")
        for thread in threads:
            thread.join()
        self.current = None

    def step(self, verb: str, key: str) -> None:
        """Let others go first, or the actor die here: called before each operation."""
        del verb, key
        me = self.current
        if me is None:
            return
        self.steps += 1
        if me.crashed or self._chance.random() < self._crashes:
            me.crashed = True
            raise Crash
        if self._chance.random() >= self._stays:
            self._hand_on()
            me.turn.acquire()

    def _hand_on(self) -> None:
        following = self._chance.choice(self._running)
        self.current = following
        following.turn.release()

    def _live(self, actor: Actor) -> None:
        actor.turn.acquire()
        try:
            actor.work()
        except Crash:
            pass
        except BaseException as error:  # noqa: BLE001 -- looked at when all have ended
            actor.error = error
        actor.ended = True
        self._running.remove(actor)
        if self._running:
            self._hand_on()
        else:
            self._done.set()


class Stepped(Wrapper):
    """Each operation on *inner* is a step of *baton*; a delete is one for each key."""

    def __init__(self, inner: Storage, baton: Baton) -> None:
        super().__init__(inner)
        self._baton = baton

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        self._baton.step("get", key)
        return self._inner.get(key, offset_bytes, length_bytes)

    def create(self, key: str, content: Content) -> None:
        self._baton.step("create", key)
        self._inner.create(key, content)

    def replace(self, key: str, content: Content) -> None:
        self._baton.step("replace", key)
        self._inner.replace(key, content)

    def list(self, prefix: str) -> Iterator[Listed]:
        self._baton.step("list", prefix)
        return self._inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._baton.step("delete", key)
            self._inner.delete([key])

    def stat(self, key: str) -> Stat:
        self._baton.step("stat", key)
        return self._inner.stat(key)

    def now(self) -> datetime:
        self._baton.step("now", "")
        return self._inner.now()


class LossyStorage(Wrapper):
    """What is created is created, but now and then the reply is lost, or it is carried out twice."""

    def __init__(self, inner: Storage, chance: random.Random, loses: float, twice: float) -> None:
        super().__init__(inner)
        self._chance = chance
        self._loses = loses
        self._twice = twice

    def create(self, key: str, content: Content) -> None:
        self._inner.create(key, content)
        harm = self._chance.random()
        if harm < self._loses:
            raise StorageLost("The reply was lost.")
        if harm < self._loses + self._twice:
            self._inner.create(key, content)


class Inline(Executor):
    """A pool that does the work at once, on the caller's own thread: no schedule is left to the machine."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 -- raised by whoever takes the result
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing runs."""
