"""`stillframe recover`: find what was left, bring the guest back, say what was done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillframe.capture.limits import Limits
from stillframe.capture.lock import domain_lock
from stillframe.capture.recover import domain_of, next_steps, recover_domain
from stillframe.capture.status_file import repair_status_file
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, GuestUnknown, NeedsAttention, StillframeError
from stillframe.hypervisor.domain import Domain, find_domain
from stillframe.mirror.recover import recover_folder

#: Longer than the guard holds a domain whose run was killed in the pivot.
_LOCK_S = 10.0


def recover(session: Session, names: Sequence[str], *, dry_run: bool, repair_status: bool) -> int:
    """Recover the named guests, or all with something left; return the exit code."""
    if repair_status:
        return _repair(session, names)
    domains = _domains(session, names)
    outcomes: dict[str, list[str] | StillframeError] = {}
    with session.signals_as_stop("it ends by itself once the guests are back"):
        for domain in domains:
            outcomes[domain.name] = _guest(session, domain, dry_run=dry_run)
        # Only when all guests are back: a destination may hang.
        for domain, folders in domains.items() if not dry_run else ():
            outcomes[domain.name] = _mirrors(session, outcomes[domain.name], folders)
    for name, outcome in outcomes.items():
        _show(session, name, outcome)
    if not domains:
        session.screen.result("nothing was left by any run")
    session.screen.json(
        {"dry_run": dry_run, "guests": [_body(name, outcome) for name, outcome in outcomes.items()]})
    errors = [each for each in outcomes.values() if isinstance(each, StillframeError)]
    if not errors:
        return EXIT_OK
    if any(isinstance(error, NeedsAttention) for error in errors):
        return NeedsAttention.exit_code
    return errors[0].exit_code if len(errors) == len(outcomes) else EXIT_PARTIAL


def _repair(session: Session, names: Sequence[str]) -> int:
    runs = session.journal.open_runs()
    did = [repair_status_file(name, runs) for name in names]
    for words in did:
        session.screen.result(words)
    session.screen.json({"repaired": did})
    return EXIT_OK


def _guest(session: Session, domain: Domain, *, dry_run: bool) -> list[str] | StillframeError:
    limits = for_guest(session.settings, domain.name, GuestSettings()).limits
    words: list[str] = []
    try:
        # Taken for a dry run too: what a run that is alive will do next is its own decision.
        with domain_lock(session.journal.folder, domain.uuid, domain.name, "recover", session.clock, _LOCK_S):
            if dry_run:
                return _plan(session, domain, limits)
            for each in recover_domain(domain, session.tools, limits):
                words.append(f"recovered run {each.run.id}:")
                words += [f"  {word}" for word in each.words]
    except StillframeError as error:
        return error
    return words


def _mirrors(
    session: Session, outcome: list[str] | StillframeError, folders: set[str]
) -> list[str] | StillframeError:
    if isinstance(outcome, StillframeError):
        return outcome
    try:
        for path in sorted(folders):
            told = recover_folder(Path(path), clock=session.clock, stop=session.stop).words
            outcome += [f"mirror {path}: {told}"] if told else []
    except StillframeError as error:
        return error
    return outcome


def _show(session: Session, name: str, outcome: list[str] | StillframeError) -> None:
    if isinstance(outcome, StillframeError):
        session.screen.error(outcome, name)
        return
    for word in outcome or ["nothing was left"]:
        session.screen.result(f"{name}: {word}")


def _body(name: str, outcome: list[str] | StillframeError) -> dict[str, object]:
    if isinstance(outcome, StillframeError):
        return {"guest": name, "ok": False, "error": error_body(outcome)}
    return {"guest": name, "ok": True, "did": outcome}


def _domains(session: Session, names: Sequence[str]) -> dict[Domain, set[str]]:
    """Return the domains to recover, each with the mirror folders its recent runs wrote to."""
    recent = session.journal.last_runs(100)
    runs = session.journal.open_runs()
    found: dict[str, Domain] = {}
    for name in names:
        try:
            domain = find_domain(session.connection, name)
        except GuestUnknown:
            # Undefined meanwhile, but a run of it may still be open.
            known = [run for run in runs if name in (run.name, run.uuid)]
            if not known:
                raise
            domain = domain_of(session.connection, known[0])
        found[domain.uuid] = domain
    if not names:
        found = {run.uuid: domain_of(session.connection, run) for run in (*recent, *runs)}
    return {
        domain: {run.destination for run in (*recent, *runs) if run.uuid == uuid}
        for uuid, domain in found.items()
    }


def _plan(session: Session, domain: Domain, limits: Limits) -> list[str]:
    return [
        f"run {run.id} ({run.state.value}): would {step.action.value}"
        f"{' on ' + ', '.join(step.targets) if step.targets else ''}, because {step.reason}"
        for run, step in next_steps(domain, session.tools, limits)
    ]
