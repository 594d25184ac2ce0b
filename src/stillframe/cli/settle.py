"""`stillframe settle`: end the standing state, so that guests are on their own images again."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.capture.journal import RunRecord
from stillframe.capture.lock import domain_lock
from stillframe.capture.recover import recover_domain
from stillframe.capture.standing import first_settle_step, past_limit, settle, settle_past_limit
from stillframe.cli.find import find_guest, guest_of
from stillframe.cli.recover import Outcome, exit_code, outcome_body, show_outcome
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import StillframeError
from stillframe.hypervisor.guest import Guest

_LOCK_S = 10.0


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
