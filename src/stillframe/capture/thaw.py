"""Thawing a guest for certain.

A freeze that timed out can still happen later, since the guest agent takes its commands in
turn: only an answer given *after* all that tells. So: thaw, ask, until the agent says thawed.
"""

from __future__ import annotations

import contextlib

from stillframe.clock import Clock, Deadline
from stillframe.errors import GuestUnknown, HypervisorError, StillframeError
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Power

_PAUSE_S = 0.2


def thaw_until_verified(domain: Guest, clock: Clock, timeout_s: float, answer_s: float) -> bool:
    """Thaw and ask until the agent says that nothing is frozen; return whether it did in time.

    A guest that is no longer running has nothing frozen. *answer_s* bounds one answer.
    """
    deadline = Deadline(clock, timeout_s)
    while True:
        if _thawed_now(domain, max(1, round(answer_s))):
            with contextlib.suppress(StillframeError):
                domain.restore_agent_timeout()
            return True
        if deadline.passed():
            return False
        clock.pause(_PAUSE_S)


def _thawed_now(domain: Guest, answer_s: int) -> bool:
    try:
        domain.thaw(answer_s)
        return not domain.is_frozen(answer_s)
    except (HypervisorError, GuestUnknown):
        try:
            return domain.power() in (Power.OFF, Power.GONE)
        except StillframeError:
            return False
