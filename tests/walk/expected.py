"""Which outcomes a run may have, by what is known of the guest: a refusal, and what must be counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stillframe.capture.method import Method
from stillframe.errors import (
    ForeignSnapshot,
    GuestShutOff,
    GuestUnfit,
    NeedsAttention,
    StillframeError,
)
from tests.walk.world import World


def resolved(world: World, method: Method, exclude: str) -> Method:
    """Return what `auto` comes to, by the documentation."""
    if method is not Method.AUTO:
        return method
    if not world.running:
        return Method.OFFLINE
    if world.standing() is not None:
        return Method.STANDING_OVERLAY
    return Method.BITMAP if keepers(world, exclude) else Method.OVERLAY


def keepers(world: World, exclude: str) -> set[str]:
    """Return the disks that can keep a bitmap."""
    return {each for each in world.guest.disks if each != exclude and world.top_format(each) == "qcow2"}


def refusal(world: World, wished: Method, exclude: str) -> type[StillframeError] | None:
    """Return the one error by which the run has to be refused, None if it has to succeed."""
    method = resolved(world, wished, exclude)
    overlays = world.overlays()
    if method in (Method.OFFLINE, Method.BITMAP) and overlays:
        return GuestUnfit
    if method is Method.OFFLINE:
        return GuestUnfit if world.running else None
    if not world.running:
        return GuestShutOff
    if world.their_snapshot:
        return ForeignSnapshot
    if world.theirs_on_top() & set(overlays):
        return NeedsAttention
    if method is Method.STANDING_OVERLAY and exclude in overlays:
        return GuestUnfit
    if method is Method.BITMAP and not keepers(world, exclude):
        return GuestUnfit
    return None


@dataclass
class Counted:
    """Which disks the next run for each destination must read by their changes, if by the same method.

    Nothing is said of the others: they may be read whole.
    """

    _kept: dict[str, dict[str, Method]] = field(default_factory=dict)

    def must(self, where: str, target: str, method: Method) -> bool:
        """Return whether the disk has to be counted. Offline it is by the bitmaps of a run before."""
        kept = self._kept.get(where, {}).get(target)
        return kept is not None and kept is (Method.BITMAP if method is Method.OFFLINE else method)

    def forget(
        self, *, where: str = "", method: Method | None = None, targets: Iterable[str] | None = None
    ) -> None:
        """Nothing is to be expected any more of a destination, a method, or some disks (default: all)."""
        chosen = None if targets is None else set(targets)
        for name, kept in self._kept.items():
            if not where or name == where:
                self._kept[name] = {
                    target: by for target, by in kept.items()
                    if method not in (None, by) or (chosen is not None and target not in chosen)
                }

    def ran(
        self, where: str, method: Method, disks: Iterable[Mapping[str, Any]], keep: set[str]
    ) -> None:
        """Take down that a run for *where* was durable, which told *disks*; *keep* can keep a bitmap."""
        targets = {disk["target"] for disk in disks if not (method is Method.OFFLINE and disk["note"])}
        before = self._kept.get(where, {})
        if method is Method.STANDING_OVERLAY:
            self._kept = {where: dict.fromkeys(targets, method)}  # others count from what is no more
        elif method is Method.BITMAP:
            self._kept[where] = dict.fromkeys(targets & keep, method)
        elif method is Method.OFFLINE:
            self._kept[where] = {target: by for target, by in before.items() if target in targets}
        else:
            self._kept[where] = {}
