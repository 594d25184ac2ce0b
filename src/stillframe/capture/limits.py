"""The limits of a run: how long each step may take, how much room it may use."""

from __future__ import annotations

from dataclasses import dataclass

from stillframe.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for one guest. Times in seconds, sizes in bytes.

    *freeze_s*: longest time that the guest may be frozen. *agent_s*: longest wait for one
    answer of the guest agent. *shutdown_s*: longest wait for a guest to shut down.
    *commit_s*: longest wait for a commit to converge. *overlay_bytes*: what the
    overlays on one file system may grow to before the copy is given up, None for half of what
    is free there.
    *min_free_bytes*: what must be free in the overlay's file system before a run, and a
    sixteenth of it at all times.
    *standing_bytes*: what a standing overlay may grow to before it is committed early, None for
    *standing_share* of its disk's size.
    """

    freeze_s: float = 10.0
    agent_s: float = 5.0
    shutdown_s: float = 120.0
    commit_s: float = 3600.0
    overlay_bytes: int | None = None
    min_free_bytes: int = GIB
    standing_bytes: int | None = None
    standing_share: float = 0.5

    @property
    def thaw_s(self) -> float:
        """How long a thaw is tried before a person is told; the guard goes on trying."""
        return 2 * self.freeze_s

    @property
    def reserve_bytes(self) -> int:
        """What must stay free in the overlay's file system while the guest writes to it."""
        return max(self.min_free_bytes // 16, 16 * MIB)
