"""`stillframe recover`: find what was left, bring the guest back, say what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stillframe.capture.limits import Limits
from stillframe.capture.lock import domain_lock
from stillframe.capture.recover import next_steps, recover_domain
from stillframe.capture.restoring import RestoringStore, attention
from stillframe.capture.status_file import repair_status_file
from stillframe.cli.find import find_guest, guest_of
from stillframe.cli.places import place_of
from stillframe.cli.recover_boot import booted_ones, recover_booted
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, GuestState, GuestUnknown, NeedsAttention, StillframeError
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.guest import Guest
from stillframe.mirror.recover import recover_folder
from stillframe.restore.claim import Claims
from stillframe.restore.drill_place import clear_left_drills, left_drills
from stillframe.restore.in_place import finish_untorn
from stillframe.restore.whole_guest import forget_defined

#: Longer than the guard holds a domain whose run was killed in the pivot.
_LOCK_S = 10.0


@dataclass
class Outcome:
    """What came of recovering one guest: what was done for it, and what stood in the way."""

    guest: str
    did: list[str] = field(default_factory=list)
    error: StillframeError | None = None


def recover(session: Session, names: Sequence[str], *, dry_run: bool, repair_status: bool) -> int:
    """Recover the named guests, or all with something left; return the exit code."""
    if repair_status:
        return _repair(session, names)
    booted = [(Outcome(record.name), record) for record in booted_ones(session, names)]
    # Of a guest that still reads from a snapshot there is no run: it can't be captured.
    others = [name for name in names if all(name not in (each.name, each.uuid) for _, each in booted)]
    outcomes = [
        (Outcome(domain.name), domain, folders)
        for domain, folders in (_domains(session, others).items() if others or not names else ())
        if all(domain.uuid != each.uuid for _, each in booted)
    ]
    with session.signals_as_stop("it ends by itself once the guests are back"):
        for outcome, domain, _folders in outcomes:
            _guest(session, outcome, domain, dry_run=dry_run)
            for word in standing_words(session, domain.uuid):
                session.screen.result(f"{domain.name}: {word}")
            show_outcome(session, outcome, "nothing was left of a run")
        for outcome, record in booted:
            outcome.did, outcome.error = recover_booted(session, record, dry_run=dry_run, lock_s=_LOCK_S)
            show_outcome(session, outcome, f"it was booted from {record.snapshot}, and all is well")
        # Only when all guests are back: a destination may hang.
        for outcome, _domain, folders in outcomes if not dry_run else ():
            _mirrors(session, outcome, folders)
    drills = [] if names else _drills(session, dry_run=dry_run)
    restores = [] if names else _restores(session, dry_run=dry_run)
    told = [*(outcome for outcome, _, _ in outcomes), *(outcome for outcome, _ in booted)]
    if not told and not drills and not restores:
        session.screen.result("nothing was left by any run")
    session.screen.json({
        "dry_run": dry_run, "guests": [outcome_body(outcome) for outcome in told], "drills": drills,
        "restores": restores})
    return exit_code(told)


def _drills(session: Session, *, dry_run: bool) -> list[str]:
    """Remove what drills left that were killed; return in words what was done."""
    left = left_drills(session.state_folder)
    if dry_run or not left:
        did = [f"would remove what a killed drill left ({made.name})" for made in left]
    else:
        did = clear_left_drills(session.state_folder, session.connection)
    for words in did:
        session.screen.result(words)
    return did


def _restores(session: Session, *, dry_run: bool) -> list[str]:
    """Return in words what restores to new guests were broken off. Those that were over are forgotten."""
    claims = Claims(session.state_folder, session.clock)
    found = []
    for claim in claims.all():
        if claims.holder(claim.name):
            continue
        if not dry_run and forget_defined(claims, claim, session.connection) is None:
            found.append(f"{claim.words()}, but for saying so: {claim.name} is defined")
        else:
            found.append(f"{claim.words()}; to go on: {claim.again()}")
    for words in found:
        session.screen.result(words)
    return found


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return the exit code for what came of several guests."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
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


def _guest(session: Session, outcome: Outcome, domain: Guest, *, dry_run: bool) -> None:
    limits = for_guest(session.settings, domain.name, GuestSettings()).limits
    try:
        # Taken for a dry run too: what a run that is alive will do next is its own decision.
        with domain_lock(
            session.journal.folder, domain.uuid, domain.name, "recover", session.clock, _LOCK_S
        ):
            if dry_run:
                outcome.did += _plan(session, domain, limits)
            else:
                for each in recover_domain(domain, session.tools, limits):
                    outcome.did += each.told
            _restoring(session, outcome, domain, dry_run=dry_run)
    except StillframeError as error:
        outcome.error = error


def _restoring(session: Session, outcome: Outcome, domain: Guest, *, dry_run: bool) -> None:
    """End a restore in place that tore nothing. Raises NeedsAttention for one that must be run again."""
    store = RestoringStore(session.journal.folder)
    found = store.read(domain.uuid)
    if found is None:
        return
    if found.phase.is_torn:
        raise attention(found)
    if not dry_run:
        finish_untorn(found, store, domain)
    can = "would be free" if dry_run else "is free"
    outcome.did.append(f"{found.words()}: the guest {can} to start, its disks are whole")


def standing_words(session: Session, uuid: str) -> list[str]:
    """Return what to say of a guest that stands on overlays by intention; nothing of any other."""
    record = session.journal.standing(uuid)
    if record is None:
        return []
    words = f"it stands on the overlays of run {record.id} by intention, and is left so; to end that"
    return [f"{words}: stillframe settle {record.name}"]


def _mirrors(session: Session, outcome: Outcome, folders: set[str]) -> None:
    if outcome.error is not None:
        return
    try:
        for path in sorted(folders):
            told = recover_folder(place_of(session, path), clock=session.clock, stop=session.stop).words
            if told:
                outcome.did.append(f"mirror {path}: {told}")
                session.screen.result(f"{outcome.guest}: mirror {path}: {told}")
    except StillframeError as error:
        error.guest = GuestState.SAFE
        outcome.error = error
        session.screen.error(error, outcome.guest)


def show_outcome(session: Session, outcome: Outcome, nothing: str) -> None:
    """Tell a person what came of one guest, *nothing* if nothing was done."""
    for word in outcome.did or ([] if outcome.error else [nothing]):
        session.screen.result(f"{outcome.guest}: {word}")
    if outcome.error is not None:
        session.screen.error(outcome.error, outcome.guest)


def outcome_body(outcome: Outcome) -> dict[str, object]:
    """Return what came of one guest, for JSON."""
    body: dict[str, object] = {"guest": outcome.guest, "ok": outcome.error is None, "did": outcome.did}
    return body if outcome.error is None else {**body, "error": error_body(outcome.error)}


def _domains(session: Session, names: Sequence[str]) -> dict[Guest, set[str]]:
    """Return the domains to recover, each with the mirror folders its recent runs wrote to."""
    recent = session.journal.last_runs(100)
    runs = session.journal.open_runs()
    found: dict[str, Guest] = {}
    for name in names:
        try:
            domain = find_guest(session, name)
        except GuestUnknown:
            # Undefined meanwhile, but a run of it may still be open.
            known = [run for run in runs if name in (run.name, run.uuid)]
            if not known:
                raise
            domain = guest_of(session, known[0])
        found[domain.uuid] = domain
    restoring = RestoringStore(session.journal.folder).all()
    for each in restoring:
        if not names or each.name in names or each.uuid in names:
            found[each.uuid] = Domain(session.connection, each.uuid, each.name)
    if not names:
        found |= {run.uuid: guest_of(session, run) for run in (*recent, *runs)}
    return {
        domain: {run.mirror_folder for run in (*recent, *runs) if run.uuid == uuid and run.mirror_folder}
        for uuid, domain in found.items()
    }


def _plan(session: Session, domain: Guest, limits: Limits) -> list[str]:
    return [
        f"run {run.id} ({run.state.value}): would {step.words}"
        f"{' on ' + ', '.join(step.targets) if step.targets else ''}, because {step.reason}"
        for run, step in next_steps(domain, session.tools, limits)
    ]
