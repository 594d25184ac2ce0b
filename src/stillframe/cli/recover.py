"""`stillframe recover`: find what was left, bring the guest back, say what was done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillframe.capture.lock import domain_lock
from stillframe.capture.recover import domain_of, next_steps, recover_domain
from stillframe.capture.status_file import repair_status_file
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, GuestUnknown, StillframeError
from stillframe.hypervisor.domain import Domain, find_domain
from stillframe.mirror.folder import MirrorFolder


def recover(session: Session, names: Sequence[str], *, dry_run: bool, repair_status: bool) -> int:
    """Recover the named guests, or all with something left; return the exit code."""
    if repair_status:
        for name in names:
            session.screen.result(repair_status_file(name))
        return EXIT_OK
    domains = _domains(session, names)
    bodies: list[dict[str, object]] = []
    errors: list[StillframeError] = []
    for domain, folders in domains.items():
        try:
            words = _plan(session, domain) if dry_run else _recover(session, domain, folders)
            bodies.append({"guest": domain.name, "ok": True, "did": words})
            for word in words or ["nothing was left"]:
                session.screen.result(f"{domain.name}: {word}")
        except StillframeError as error:
            errors.append(error)
            bodies.append({"guest": domain.name, "ok": False, "error": error_body(error)})
            session.screen.error(error, domain.name)
    if not domains:
        session.screen.result("nothing was left by any run")
    session.screen.json({"dry_run": dry_run, "guests": bodies})
    if not errors:
        return EXIT_OK
    return errors[0].exit_code if len(errors) == len(bodies) else EXIT_PARTIAL


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


def _plan(session: Session, domain: Domain) -> list[str]:
    limits = for_guest(session.settings, domain.name, GuestSettings()).limits
    return [
        f"run {run.id} ({run.state.value}): would {step.action.value}"
        f"{' on ' + ', '.join(step.targets) if step.targets else ''}, because {step.reason}"
        for run, step in next_steps(domain, session.tools, limits)
    ]


def _recover(session: Session, domain: Domain, folders: set[str]) -> list[str]:
    limits = for_guest(session.settings, domain.name, GuestSettings()).limits
    words: list[str] = []
    with domain_lock(session.journal.folder, domain.uuid, domain.name, "recover"), session.signals_as_stop():
        for each in recover_domain(domain, session.tools, limits):
            words.append(f"recovered run {each.run.id}:")
            words += [f"  {word}" for word in each.words]
        for path in sorted(folders):
            words += _recover_mirror(session, Path(path))
    return words


def _recover_mirror(session: Session, path: Path) -> list[str]:
    if not path.is_dir():
        return []
    folder = MirrorFolder(path, clock=session.clock)
    with folder.lock("recover"):
        told = folder.recover().words
    return [f"mirror {path}: {told}"] if told else []
