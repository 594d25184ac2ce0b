"""`stillframe settle`: end the standing state, so that guests are on their own images again."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.capture.journal import RunRecord
from stillframe.capture.lock import domain_lock
from stillframe.capture.recover import recover_domain
from stillframe.capture.standing import (
    first_settle_step,
    past_limit,
    settle,
    settle_past_limit,
    watch_growth,
)
from stillframe.cli.find import find_guest, guest_of
from stillframe.cli.recover import Outcome, exit_code, outcome_body, show_outcome
from stillframe.cli.session import Session
from stillframe.clock import Deadline
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, StillframeError
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.guest import Guest

_LOCK_S = 10.0
#: Between two looks of a watch that no event asks for.
_LOOK_EVERY_S = 60.0
#: So long it takes until a signal ends a watch.
_SIGNAL_S = 0.5


def settle_guests(
    session: Session, names: Sequence[str], options: GuestSettings, *, dry_run: bool, past: bool
) -> int:
    """Settle the named guests, or all that stand on overlays; return the exit code.

    With *past* only those whose overlays have grown past their limit, which *options* may say.
    """
    domains = [find_guest(session, name) for name in names] or [
        guest_of(session, record) for record in session.journal.standing_runs()]
    outcomes = [Outcome(domain.name) for domain in domains]
    with session.signals_as_stop("it ends by itself once the guests are back"):
        for outcome, domain in zip(outcomes, domains, strict=True):
            try:
                _settle(session, outcome, domain, options, dry_run=dry_run, past=past)
            except StillframeError as error:
                outcome.error = error
            show_outcome(session, outcome, "it stands on no overlay" if not past else "no limit is passed")
    if not outcomes:
        session.screen.result("no guest stands on an overlay")
    session.screen.json({"dry_run": dry_run, "guests": [outcome_body(outcome) for outcome in outcomes]})
    return exit_code(outcomes)


def watch(session: Session, options: GuestSettings) -> int:
    """Settle each guest whose overlays grow past their limit, as soon as they do, until a signal comes.

    libvirt tells when a limit is reached; at the latest after a minute all are looked at anyway, since an
    event can be missed, and neither free space nor a new standing guest makes one.
    """
    with session.signals_as_stop("no guest is being changed"):
        while session.stop() is None:
            for record in session.journal.standing_runs():
                outcome = Outcome(record.name)
                try:
                    _watch_one(session, outcome, record, options)
                except StillframeError as error:
                    outcome.error = error
                if outcome.did or outcome.error:
                    show_outcome(session, outcome, "")
                    session.screen.json({"guests": [outcome_body(outcome)]})
            _wait(session)
    return EXIT_OK


def _watch_one(session: Session, outcome: Outcome, record: RunRecord, options: GuestSettings) -> None:
    domain = Domain(session.connection, record.uuid, record.name)
    limits = for_guest(session.settings, record.name, options).limits
    words = past_limit(record, limits)
    if words:
        session.screen.say(f"{record.name}: {words}")
        _settle(session, outcome, domain, options, dry_run=False, past=True)
    elif domain.power().has_qemu:
        watch_growth(domain, record, limits)


def _wait(session: Session) -> None:
    deadline = Deadline(session.clock, _LOOK_EVERY_S)
    while not deadline.passed() and session.stop() is None:
        if session.connection.wait_change(min(_SIGNAL_S, deadline.remaining_s())):
            # A guest whose image is long, but has holes, makes such an event at each write.
            session.clock.pause(_SIGNAL_S)
            return


def _settle(
    session: Session, outcome: Outcome, domain: Guest, options: GuestSettings, *, dry_run: bool, past: bool
) -> None:
    limits = for_guest(session.settings, domain.name, options).limits
    with domain_lock(session.journal.folder, domain.uuid, domain.name, "settle", session.clock, _LOCK_S):
        if dry_run:
            record = session.journal.standing(domain.uuid)
            if record is not None and (not past or past_limit(record, limits)):
                outcome.did.append(_first_step(session, record, domain))
            return
        for each in recover_domain(domain, session.tools, limits):
            outcome.did += each.told
        end = settle_past_limit if past else settle
        settled = end(domain, session.tools, limits)
        if settled is not None:
            outcome.did += [f"settled run {settled.run.id}:", *(f"  {word}" for word in settled.words)]


def _first_step(session: Session, record: RunRecord, domain: Guest) -> str:
    step = first_settle_step(record, domain, session.tools)
    where = f" on {', '.join(step.targets)}" if step.targets else ""
    return f"run {record.id} (standing): would {step.action.value}{where}, because {step.reason}"
