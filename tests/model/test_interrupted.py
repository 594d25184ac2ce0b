"""Commands that are interrupted by others on the same repository: what they say is true all the same.

Each command runs as often as it has storage operations; right before one of them, another at each time,
somebody else forgets, prunes or backs up from beginning to end. What is not concerned must not fail, nor be
called damaged, nor read otherwise; a snapshot that was forgotten meanwhile is unknown, or read whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from typer.main import get_command

from stillframe.cli import keys as keys_module
from stillframe.cli import session as session_module
from stillframe.cli.main import app
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_OK, RepositoryExists, RepositoryRefused, SnapshotUnknown
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect
from stillframe.repository.drills import drop_drills, record_drill
from stillframe.repository.keyslots import SlotKind, wrap
from stillframe.repository.layout import INIT_CLAIM, KEY_SLOTS, SnapshotName
from stillframe.repository.opened import Repository, Secret, init_repository, key_slots, open_repository
from stillframe.repository.pins import pin, unpin
from stillframe.repository.verify import Level, verify
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage
from tests.model.baton import Inline
from tests.model.real import TINY, SharedHints, content, one_round
from tests.unit.repository_disks import CHEAP, SourceDisk
from tests.unit.repository_snapshots import DAY_S, World, make_snapshot, read_snapshot
from tests.unit.test_drills import DRILL

_CLOCK = SystemClock()
#: `repo.json` allows no smaller packs.
_PARAMETERS = msgspec.structs.replace(TINY, pack_bytes=64 * 1024)
_CHUNKS = 20
_SECRET = "secret"


@dataclass
class Stage:
    """A repository that several use, and what its snapshots must read. *victim* is to be forgotten."""

    repository: Repository
    expected: dict[SnapshotName, bytes]
    victim: SnapshotName
    forgotten: set[SnapshotName] = field(default_factory=set)

    @property
    def storage(self) -> MemoryStorage:
        assert isinstance(self.repository.storage, MemoryStorage)
        return self.repository.storage

    def copy(self) -> Stage:
        return Stage(replace(self.repository, storage=self.storage.copy()), dict(self.expected), self.victim)

    # --- what others do -----------------------------------------------------------------------

    def prunes(self) -> None:
        """Compact whatever can be compacted, and delete what is condemned."""
        collect(self.repository, "beta", _CLOCK, fence_after_s=DAY_S, max_unused=0.0, compact_below=1.0)
        drop_drills(self.storage, dry_run=False)

    def forgets(self) -> None:
        self._forget(self.victim)

    def forgets_another(self) -> None:
        self._forget(next(name for name in sorted(self.expected)
                          if name != self.victim and name not in self.forgotten))

    def backs_up(self) -> None:
        """Add a snapshot that refers to what is there, and to what is new."""
        data = content([*range(4, 4 + _CHUNKS // 2), *range(200, 200 + _CHUNKS // 2)])
        moment = max(name.utc for name in self.expected) + timedelta(hours=1)
        wanted = SnapshotName("alpha", "web", moment, "")
        self.expected[make_snapshot(self.repository, SourceDisk(data), wanted, _CLOCK,
                                    hints=SharedHints({}))] = data

    def unpins(self) -> None:
        unpin(self.storage, self.victim)

    def removes_a_key(self) -> None:
        """Remove the key slot that nobody needs."""
        self.storage.delete([max(listed.key for listed in self.storage.list(KEY_SLOTS))])

    def _forget(self, name: SnapshotName) -> None:
        unpin(self.storage, name)
        forget(self.storage, plan_forget([name]))
        self.forgotten.add(name)

    # --- afterwards ---------------------------------------------------------------------------

    def check(self) -> None:
        """Look whether all that was not forgotten is there, reads back, and is found whole."""
        there = set(list_snapshots(self.storage))
        assert self.expected.keys() - self.forgotten <= there
        for name in there & self.expected.keys():
            assert read_snapshot(self.repository, name) == self.expected[name]
        found = verify(self.repository, _CLOCK, Level.FULL)
        assert found.is_sound, found


@cache
def stage() -> Stage:
    """A repository with three snapshots of a guest and one of another; packs are condemned or half used."""
    world = World(_PARAMETERS)
    made = [world.backup(content(numbers)) for numbers in (
        range(1, 1 + _CHUNKS), range(2, 2 + _CHUNKS), range(4, 4 + _CHUNKS), [*range(100, 100 + _CHUNKS)])]
    world.backup(content(range(50, 50 + _CHUNKS)), "db")
    world.forget(made[0])
    with one_round(True):
        world.prune(0.0, 0.0)
    world.forget(made[1])
    victim = made[3]
    pin(world.repository.storage, victim, "why", _CLOCK)
    drill = msgspec.structs.replace(DRILL, sid=victim.sid, guest="web", host="alpha")
    record_drill(world.repository, victim.utc, drill)
    record_drill(world.repository, victim.utc + timedelta(hours=9),
                 msgspec.structs.replace(drill, sid=made[2].sid))
    # It comes last in a listing, so that commands are opened by the other one.
    while len(list(world.repository.storage.list(KEY_SLOTS))) < 2:
        slot = wrap(world.repository.key, b"other", SlotKind.PASSPHRASE, "", "", CHEAP)
        if all(slot.key > listed.key for listed in world.repository.storage.list(KEY_SLOTS)):
            world.repository.storage.create(slot.key, slot.encode())
    return Stage(world.repository, dict(world.expected), victim)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def body(self) -> Any:
        return json.loads(self.out)


class Calls:
    """Calls stillframe on storages in memory, on this thread alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at: dict[str, Storage] = {}
        (folder / "pass").write_text(_SECRET)
        (folder / "pass").chmod(0o600)
        self._numbers = itertools.count()
        self._app = get_command(app)  # made anew by each call, it would take most of the time

    def new_path(self) -> Path:
        return self.folder / f"out{next(self._numbers)}"

    def __call__(self, *words: str | Path) -> Done:
        environment = {
            "STILLFRAME_CONFIG": "/dev/null", "STILLFRAME_REPOSITORY": "/here",
            "STILLFRAME_PASSPHRASE_FILE": str(self.folder / "pass")}
        line = [*map(str, words), "--state-dir", str(self.folder / "state"), "--json"]
        done = CliRunner().invoke(self._app, line, env=environment, catch_exceptions=False)
        return Done(done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls(tmp_path)

    def storage_of(_settings: object, address: str, *_: object, **_options: object) -> Storage:
        return made.at[address]

    for module in (session_module, keys_module):
        monkeypatch.setattr(module, "storage_of", storage_of)
    for name, module in list(sys.modules.items()):
        if name.startswith("stillframe.") and hasattr(module, "ThreadPoolExecutor"):
            monkeypatch.setattr(module, "ThreadPoolExecutor", Inline)
    return made


#: Runs a command, and looks whether what it said and did is right.
Command = Callable[[Calls, Stage], None]
Disturbance = Callable[[Stage], None]


def interrupted(calls: Calls, command: Command, *disturbances: Disturbance) -> int:
    """Run *command* once for each of its operations, the *disturbances* right before it; return how often.

    With several of them, the first comes before that operation, and the others each before the next one.
    """
    for step in itertools.count():
        playing = stage().copy()
        calls.at["/here"] = playing.storage
        left = _disturb(playing, step, disturbances)
        try:
            command(calls, playing)
            playing.storage.before = None
            playing.check()
        except AssertionError as error:
            raise AssertionError(f"interrupted before operation {step}") from error
        if left:
            return step
    raise AssertionError("unreachable")


def _disturb(playing: Stage, step: int, disturbances: Sequence[Disturbance]) -> list[Disturbance]:
    """Let the first come before operation *step*; return those that did not come yet, which gets shorter."""
    left, passed = list(disturbances), itertools.count()

    def before(_verb: str, _key: str) -> None:
        if next(passed) >= step and left:
            playing.storage.before = None
            left.pop(0)(playing)
            playing.storage.before = before

    playing.storage.before = before
    return left


# --- commands -----------------------------------------------------------------------------------


def _right(done: Done, playing: Stage, name: SnapshotName) -> bool:
    """Return whether it went well; if it did not, then because *name* was forgotten, and it says so."""
    if done.code == SnapshotUnknown.exit_code and name in playing.forgotten:
        return False
    assert done.code == EXIT_OK, done
    return True


def restores(calls: Calls, playing: Stage) -> None:
    to = calls.new_path()
    done = calls("restore", f"{playing.victim.sid}:vda", "--to", to)
    if _right(done, playing, playing.victim):
        assert to.read_bytes() == playing.expected[playing.victim]


def shows(calls: Calls, playing: Stage) -> None:
    done = calls("show", playing.victim.sid)
    if _right(done, playing, playing.victim):
        assert done.body["snapshot"]["id"] == playing.victim.sid


def lists(calls: Calls, playing: Stage) -> None:
    done = calls("list", "--tags")
    assert done.code == EXIT_OK, done
    listed = {each["id"] for each in done.body["snapshots"]}
    kept = (playing.expected.keys() & stage().expected.keys()) - playing.forgotten
    assert {name.sid for name in kept} <= listed


def compares(calls: Calls, playing: Stage) -> None:
    old = next(name for name in sorted(stage().expected) if name.guest == "web" and name != playing.victim)
    done = calls("diff", old.sid, playing.victim.sid)
    name = old if old in playing.forgotten else playing.victim
    if _right(done, playing, name):
        (disk,) = done.body["disks"]
        assert disk["changed_bytes"] == len(playing.expected[playing.victim])


def verifies(level: str) -> Command:
    def verified(calls: Calls, playing: Stage) -> None:
        done = calls("verify", "--level", level)
        assert done.code == EXIT_OK, done
        assert done.body["findings"] == []

    return verified


def prunes(calls: Calls, playing: Stage) -> None:
    done = calls("prune")
    assert done.code == EXIT_OK, done
    plan = done.body["plan"]
    assert plan["missing"] == plan["disbelieved"] == done.body["done"]["damaged"] == []


def would_prune(calls: Calls, playing: Stage) -> None:
    done = calls("prune", "--dry-run")
    assert done.code == EXIT_OK, done


def forgets(calls: Calls, playing: Stage) -> None:
    done = calls("forget", "--keep-last", "1")
    assert done.code == EXIT_OK, done
    dropped = {each["id"] for each in done.body["dropped"]}
    playing.forgotten |= {name for name in playing.expected if name.sid in dropped}


def pins(calls: Calls, playing: Stage) -> None:
    done = calls("pin", playing.victim.sid)
    _right(done, playing, playing.victim)


def lists_keys(calls: Calls, playing: Stage) -> None:
    done = calls("key", "list")
    assert done.code == EXIT_OK, done


def backs_up(calls: Calls, playing: Stage) -> None:
    data = content([*range(4, 4 + _CHUNKS // 2), *range(300, 300 + _CHUNKS // 2)])
    wanted = SnapshotName("alpha", "web", World.moment(50), "")
    playing.expected[make_snapshot(playing.repository, SourceDisk(data), wanted, _CLOCK,
                                   hints=SharedHints({}))] = data


COMMANDS: dict[str, Command] = {
    "restore": restores, "show": shows, "list": lists, "diff": compares,
    "verify structure": verifies("structure"), "verify stored": verifies("stored"),
    "verify full": verifies("full"), "prune": prunes, "prune --dry-run": would_prune, "forget": forgets,
    "pin": pins, "key list": lists_keys, "backup": backs_up,
}


def _then(*each: Disturbance) -> Disturbance:
    def all_of_them(playing: Stage) -> None:
        for one in each:
            one(playing)

    return all_of_them


DISTURBANCES: dict[str, Disturbance] = {
    "forget, prune": _then(Stage.forgets, Stage.prunes), "prune": Stage.prunes, "backup": Stage.backs_up,
    "forget another, prune": _then(Stage.forgets_another, Stage.prunes),
    "backup, forget, prune": _then(Stage.backs_up, Stage.forgets, Stage.prunes),
    "unpin": Stage.unpins, "key remove": Stage.removes_a_key,
}
_FAST = {("show", "unpin"), ("show", "key remove"), ("restore", "prune"), ("prune --dry-run", "backup")}
_PAIRS = [
    pytest.param(command, by, marks=() if is_fast else pytest.mark.slow)
    for command in COMMANDS for by in DISTURBANCES
    for is_fast in [by == "forget, prune" or (command, by) in _FAST]]


@pytest.mark.parametrize(("command", "by"), _PAIRS)
def test_what_is_said_is_true(command: str, by: str, calls: Calls) -> None:
    assert interrupted(calls, COMMANDS[command], DISTURBANCES[by]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("twice", [
    ("forget, prune", "forget another, prune"), ("backup", "forget, prune"), ("prune", "backup"),
], ids=" + ".join)
def test_what_is_said_is_true_after_two(command: str, twice: tuple[str, str], calls: Calls) -> None:
    assert interrupted(calls, COMMANDS[command], *(DISTURBANCES[by] for by in twice)) > 0


# --- what two may not both do -------------------------------------------------------------------


def _made_by_two(step: int) -> tuple[MemoryStorage, list[tuple[Secret, Repository]], bool]:
    """Let another make a repository before operation *step* of one; return whose was made, and if it came."""
    storage, passed, made = MemoryStorage(), itertools.count(), list[tuple[Secret, Repository]]()

    def make(secret: bytes) -> None:
        with contextlib.suppress(RepositoryExists):
            by = Secret(SlotKind.PASSPHRASE, secret)
            made.append((by, init_repository(storage, by, "", _CLOCK, costs=CHEAP)))

    def before(_verb: str, _key: str) -> None:
        if next(passed) == step:
            storage.before = None
            make(b"other")

    storage.before = before
    make(b"one")
    return storage, made, storage.before is None


def test_two_that_make_a_repository_make_one_that_its_secret_opens() -> None:
    for step in itertools.count():
        storage, made, came = _made_by_two(step)
        ((by, repository),) = made
        assert len(list(storage.list(KEY_SLOTS))) == 1
        assert open_repository(storage, by).key.secret == repository.key.secret
        assert INIT_CLAIM not in storage.contents()
        if not came:
            assert step > 1
            return


def test_two_that_remove_the_last_two_key_slots_leave_one(calls: Calls) -> None:
    playing = stage().copy()
    first, second = sorted(slot.id for slot in key_slots(playing.storage))
    calls.at["/here"] = playing.storage

    def before(verb: str, _key: str) -> None:
        if verb == "delete":
            playing.storage.before = None
            assert calls("key", "remove", second).code == EXIT_OK

    playing.storage.before = before
    assert calls("key", "remove", first).code == RepositoryRefused.exit_code
    assert [slot.id for slot in key_slots(playing.storage)] == [first]
