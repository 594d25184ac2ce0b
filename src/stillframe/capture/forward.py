"""What the forward halves of all methods share: the journal's record, the freeze, and how a run ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from stillframe.capture.guard import Guard
from stillframe.capture.guard_capture import guarded
from stillframe.capture.journal import Journal, PullRecord, RunRecord, new_run_id
from stillframe.capture.method import Method
from stillframe.capture.plan import Plan
from stillframe.capture.states import BEFORE_RELEASE, Consistency, State
from stillframe.capture.thaw import thaw_until_verified
from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    FreezeFailed,
    GuestState,
    HypervisorError,
    NeedsAttention,
    StillframeError,
)
from stillframe.process import boot_id


class Forward:
    """The forward half of a run, up to the moment. *record* is always what the journal has."""

    method: Method

    def __init__(
        self, plan: Plan, journal: Journal, clock: Clock, say: Callable[[str], None], destination: str,
        stop: Callable[[], StillframeError | None], follows: str = "",
    ) -> None:
        self._plan = plan
        self._domain = plan.domain
        self._journal = journal
        self._clock = clock
        self._say = say
        self._stop = stop
        self._warnings = list(plan.warnings)
        self._frozen_s = 0.0
        run_id = new_run_id(clock, plan.domain.uuid)
        self.record = self._journal.begin(RunRecord(
            id=run_id, uuid=plan.domain.uuid, name=plan.domain.name,
            uri=plan.domain.connection.uri, destination=destination, quiesce=plan.quiesce,
            state=State.PLANNED, began_at=utc_text(clock.now()), pid=os.getpid(),
            boot_id=boot_id(), disks=plan.disks, method=self.method, pull=self._pull_record(run_id),
            follows=follows,
        ))

    def _pull_record(self, _run_id: str) -> PullRecord | None:
        """Return what the method bitmap is going to make; other methods make none of it."""
        return None

    def _take_moment(self) -> None:
        """Take all disks at one moment. The guest may be frozen."""
        raise NotImplementedError

    def _verify_moment(self) -> None:
        """Look whether the moment was taken. Raises SnapshotFailed."""
        raise NotImplementedError

    def release(self) -> None:
        """Write down that the copy is durable."""
        self._enter(State.RELEASED, "the copy is durable")

    def give_up(self, error: BaseException) -> None:
        """Write down that the copy was given up, and why."""
        record = self.record = self._journal.current(self.record)
        if record.state in BEFORE_RELEASE:
            self._enter(State.RELEASED, "given up", given_up=words(error))

    def _enter(self, state: State, detail: str = "", **changes: object) -> None:
        self.record = self._journal.enter(self.record, state, detail, **changes)

    def _done(self, detail: str = "", **changes: object) -> None:
        self.record = self._journal.done(self.record, detail, **changes)

    def _check_stop(self) -> None:
        error = self._stop()
        if error is not None:
            raise error

    def _take_frozen(self) -> Consistency:
        limits = self._plan.limits
        self._check_stop()
        with guarded(
            self._domain, self._journal, self.record.id, limits.freeze_s, self._clock
        ) as guard:
            self._enter(State.FREEZING, freeze_begun=True)
            began_s = self._clock.monotonic_s()
            frozen = self._freeze(guard)
            self._done(f"{frozen} file systems frozen")
            self._take_moment()
            # Thawed first, looked at afterwards: the guest must not wait for our looking.
            consistency = self._thaw(guard, frozen, began_s)
        self._verify_moment()
        return consistency

    def _freeze(self, guard: Guard) -> int:
        self._say("freezing the guest's file systems")
        try:
            return self._domain.freeze(max(1, round(self._plan.limits.freeze_s / 2)))
        except HypervisorError as error:
            # The agent may still carry the freeze out later: only a verified thaw ends this.
            self._say("the freeze failed; thawing")
            if self._verify_thaw(guard):
                raise FreezeFailed(
                    f"The guest agent of {self.record.name} did not freeze in time: {error.message} "
                    "The guest is thawed.",
                    "look at the agent inside the guest; or "
                    + self._plan.wishes.again(self.record.name, "--quiesce none"),
                ) from error
            raise FreezeFailed(
                f"The guest agent of {self.record.name} did not freeze in time and does not answer: "
                "a late freeze may still come, and a guard goes on thawing for an hour.",
                f"stillframe recover {self.record.name}", GuestState.UNKNOWN,
            ) from error

    def _thaw(self, guard: Guard, frozen: int, began_s: float) -> Consistency:
        self._enter(State.THAWING)
        thawed = 0
        with contextlib.suppress(HypervisorError):
            thawed = self._domain.thaw(max(1, round(self._plan.limits.agent_s)))
        frozen_s = self._clock.monotonic_s() - began_s
        if not self._verify_thaw(guard):
            self._warnings.append("the guest agent does not confirm the thaw; a guard goes on trying")
        self._done(f"frozen for {frozen_s:.3f} s, {thawed} file systems thawed")
        self._frozen_s = frozen_s
        if frozen == 0:
            self._warnings.append("the agent froze no file system: the copy is only crash-consistent")
            return Consistency.CRASH
        if thawed == 0 or frozen_s > self._plan.limits.freeze_s:
            # Windows ends a freeze by itself after ten seconds, our guard after its deadline.
            self._warnings.append(
                "the guest was thawed before the capture was over: the copy is only crash-consistent"
            )
            return Consistency.CRASH
        return Consistency.FILESYSTEM

    def _verify_thaw(self, guard: Guard) -> bool:
        limits = self._plan.limits
        if not thaw_until_verified(self._domain, self._clock, limits.thaw_s, limits.agent_s):
            return False
        self.record = self._journal.note(self.record, "thaw verified", thaw_verified=True)
        guard.dismiss()
        return True


Finish = Callable[[RunRecord], RunRecord]


@contextlib.contextmanager
def brought_back(run: Forward, finish: Finish, left_in: GuestState) -> Iterator[None]:
    """Release the run when the block ends, however it ends, and bring the guest back by *finish*.

    Raises what the block raises; NeedsAttention instead when bringing back fails, by default saying that the
    guest is *left_in* that state.
    """
    try:
        yield
    except BaseException as error:
        _end(run, finish, left_in, error)
        if isinstance(error, StillframeError):
            error.guest = GuestState.SAFE
        raise
    _end(run, finish, left_in, None)


def _end(run: Forward, finish: Finish, left_in: GuestState, cause: BaseException | None) -> None:
    """Release the run and bring the guest back; NeedsAttention tells of *cause* as well."""
    try:
        if cause is None:
            run.release()
        else:
            run.give_up(cause)
        run.record = finish(run.record)
    except StillframeError as error:
        failed = f"The run failed: {words(cause)}\nThen, bringing the guest back: " if cause else ""
        next_command = error.next_command or f"stillframe recover {run.record.name}"
        guest = error.guest if isinstance(error, NeedsAttention) else left_in
        raise NeedsAttention(f"{failed}{error.message}", next_command, guest) from (cause or error)


def words(error: BaseException) -> str:
    """Return why a run was given up, for the journal."""
    if isinstance(error, StillframeError):
        return error.message
    return f"{type(error).__name__}: {error}"

