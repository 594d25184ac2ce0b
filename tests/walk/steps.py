"""The steps of a walk, and how the next one is drawn. A step is data, so that it can be read and repeated."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lab.disks import Kind
from lab.images import KIB, MIB
from stillframe.capture.method import Method
from tests.walk.expected import refusal
from tests.walk.world import FIRST_DISKS, PLUGGED, World, Write

_SECTOR_BYTES = 512
_CLUSTER_BYTES = 64 * KIB
_LEAST_BYTES, _MOST_BYTES = 8 * MIB, 20 * MIB
#: A run has about so many steps in its journal.
_RUN_STEPS = 24
DESTINATIONS = ("one", "two", "mirror")
VICTIMS = ("tool", "tool", "tool", "libvirtd", "qemu", "interrupt")


@dataclass(frozen=True)
class Step:
    """What is done next: the name of a method of Walk, and what it is called with."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return it as it is written down."""
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


def next_step(world: World, chance: random.Random) -> Step:
    """Draw a step that is possible now."""
    draws = [(weight, draw) for weight, possible, draw in _TABLE if possible(world)]
    (draw,) = chance.choices([draw for _, draw in draws], [weight for weight, _ in draws])
    return draw(world, chance)


def some_writes(world: World, chance: random.Random, *, discards: bool) -> tuple[Write, ...]:
    """Draw what the guest writes: small and large, aligned or not; zeroes, discards; often over old data."""
    kinds = ["write", "write", "write", "zero", "unmap", *(["discard"] if discards else [])]
    return tuple(_some_write(world, chance, chance.choice(kinds)) for _ in range(chance.randint(1, 6)))


def _some_write(world: World, chance: random.Random, what: str) -> Write:
    target = chance.choice(sorted(world.guest.disks))
    grain = _CLUSTER_BYTES if what == "discard" else _SECTOR_BYTES
    room = world.guest.model(target).size_bytes // grain
    length = chance.randint(1, 6) if what == "discard" else chance.choice([1, 8, 64, 128, 200, 1000])
    # The first MiBs hold data from the start, and the end is where a resize has happened.
    begin = chance.choice([chance.randrange(room), chance.randrange(room // 8), room - length])
    begin = min(begin, room - length)
    return what, target, begin * grain, length * grain, chance.randint(1, 255) if what == "write" else 0


# --- drawing ------------------------------------------------------------------------------------


def _write(world: World, chance: random.Random) -> Step:
    return Step("write", {"writes": some_writes(world, chance, discards=True)})


def _run(world: World, chance: random.Random) -> dict[str, Any]:
    where = chance.choice(DESTINATIONS)
    exclude = chance.choice(sorted(world.guest.disks)) if where != "mirror" and chance.random() < 0.1 else ""
    # What is refused is soon told; most draws are of what is not.
    fit = [method for method in Method if refusal(world, method, exclude) is None]
    method = chance.choice(fit if fit and chance.random() < 0.8 else list(Method))
    return {"where": where, "method": method.value, "exclude": exclude, "seed": chance.randrange(1 << 30)}


def _back_up(world: World, chance: random.Random) -> Step:
    return Step("back_up", {**_run(world, chance), "whole": chance.random() < 0.05})


def _struck(chance: random.Random) -> dict[str, Any]:
    return {"victim": chance.choice(VICTIMS), "at": chance.randrange(_RUN_STEPS),
            "then": chance.choice(["", "", "write", "qemu", "libvirtd"])}


def _back_up_struck(world: World, chance: random.Random) -> Step:
    return Step("back_up_struck", {**_run(world, chance), **_struck(chance)})


def _settle(world: World, chance: random.Random) -> Step:
    return Step("settle", {"seed": chance.randrange(1 << 30)})


def _settle_struck(world: World, chance: random.Random) -> Step:
    return Step("settle_struck", {"seed": chance.randrange(1 << 30), **_struck(chance)})


def _restart_libvirtd(world: World, chance: random.Random) -> Step:
    return Step("restart_libvirtd", {"how": chance.choice(["kill", "terminate"])})


def _end(world: World, chance: random.Random) -> Step:
    return Step("end", {"how": chance.choice(["kill", "kill", "destroy", "shutdown"])})


def _resize(world: World, chance: random.Random) -> Step:
    target = chance.choice(sorted(world.guest.disks))
    size = world.guest.model(target).size_bytes + chance.randint(-2 * MIB // 4096, 3 * MIB // 4096) * 4096
    return Step("resize", {"target": target, "size_bytes": min(max(size, _LEAST_BYTES), _MOST_BYTES)})


def _plug(world: World, chance: random.Random) -> Step:
    target = chance.choice([each for each in PLUGGED if each not in world.guest.disks])
    kind = chance.choice([Kind.QCOW2, Kind.RAW, Kind.CHAIN])
    return Step("plug", {"target": target, "kind": kind.name, "size_bytes": chance.randint(8, 12) * MIB})


def _plugged(world: World) -> list[str]:
    return [each for each in PLUGGED if each in world.guest.disks and each not in world.foreign]


def _unplug(world: World, chance: random.Random) -> Step:
    return Step("unplug", {"target": chance.choice(_plugged(world))})


def _replace(world: World, chance: random.Random) -> Step:
    return Step("replace", {"target": chance.choice(_plugged(world)),
                            "kind": chance.choice([Kind.QCOW2, Kind.RAW]).name})


def _swap_image(world: World, chance: random.Random) -> Step:
    return Step("swap_image", {"target": chance.choice(_swappable(world)), "seed": chance.randrange(1 << 30)})


def _swappable(world: World) -> list[str]:
    return [target for target in sorted(world.guest.disks) if target not in world.foreign
            and world.guest.disks[target].spec.kind is not Kind.CHAIN]


def _put_theirs_on(world: World, chance: random.Random) -> Step:
    targets = sorted(world.guest.disks)
    return Step("put_theirs_on", {
        "targets": tuple(sorted(chance.sample(targets, chance.randint(1, len(targets))))),
        "metadata": chance.random() < 0.3})


def _commit_theirs(world: World, chance: random.Random) -> Step:
    return Step("commit_theirs", {"writes": some_writes(world, chance, discards=False)})


def _forget(world: World, chance: random.Random) -> Step:
    where = chance.choice([where for where in ("one", "two") if world.moments.get(where)])
    return Step("forget", {"where": where, "number": chance.randrange(len(world.moments[where])),
                           "prune": chance.random() < 0.5})


def _bare(name: str) -> Callable[[World, random.Random], Step]:
    return lambda _world, _chance: Step(name)


def _always(_world: World) -> bool:
    return True


def _runs(world: World) -> bool:
    return world.running


def _is_off(world: World) -> bool:
    return not world.running


def _can_be_plugged(world: World) -> bool:
    # Whether libvirt takes a disk under somebody's snapshot is not what this is about.
    return not world.foreign and len(world.guest.disks) < len(FIRST_DISKS) + len(PLUGGED)


def _can_be_unplugged(world: World) -> bool:
    return not world.foreign and bool(_plugged(world))


def _is_in_the_way(world: World) -> bool:
    """Return whether something keeps the guest from being settled."""
    return bool(world.theirs_on_top() & set(world.overlays())) or bool(world.cut())


#: How often, when, and what.
_TABLE: tuple[tuple[float, Callable[[World], bool], Callable[[World, random.Random], Step]], ...] = (
    (7, _runs, _write),
    (9, _always, _back_up),
    (3, _always, _back_up_struck),
    (1, _always, _settle),
    (1, lambda world: bool(world.overlays()) and not _is_in_the_way(world), _settle_struck),
    (0.5, _always, _bare("recover")),
    (1.5, _always, _restart_libvirtd),
    (2, _runs, _end),
    (8, _is_off, _bare("start")),
    (1.5, _runs, _resize),
    (1.5, _can_be_plugged, _plug),
    (1, _can_be_unplugged, _unplug),
    (1, _can_be_unplugged, _replace),
    (1, lambda world: not world.running and not world.overlays() and bool(_swappable(world)), _swap_image),
    (1.5, lambda world: world.running and not world.foreign, _put_theirs_on),
    (5, lambda world: world.running and bool(world.foreign) and world.theirs_on_top() == set(world.foreign),
     _commit_theirs),
    (1, lambda world: any(world.moments.values()), _forget),
)
