"""`stillframe doctor`: can this guest be captured, how, and what is in the way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stillframe.backup.run import refuse_place
from stillframe.capture.choose import method_of, planned
from stillframe.capture.explain import attention
from stillframe.capture.growth import free_bytes
from stillframe.capture.lock import lock_holder
from stillframe.capture.plan import Plan
from stillframe.capture.standing import how_it_stands
from stillframe.cli.find import find_guest
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, Refused, RunInProgress, StillframeError
from stillframe.hypervisor.advice import is_bare
from stillframe.hypervisor.domain import all_domains
from stillframe.hypervisor.guest import Guest
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.opened import read_parameters
from stillframe.storage.address import folder_of
from stillframe.units import size_text

_PROGRAMS = ("qemu-img", "qemu-nbd", "setpriv")


def doctor(session: Session, names: Sequence[str], options: GuestSettings) -> int:
    """Say of each named guest (or of all) whether it can be captured; return the exit code."""
    domains: Sequence[Guest] = [find_guest(session, name) for name in names]
    bare = bool(domains) and all(is_bare(each.connection.uri) for each in domains)
    host = _host(session, without_libvirt=bare)
    folder, unusable = _repository(session, host)
    domains = domains or all_domains(session.connection)
    bodies: list[dict[str, object]] = []
    errors: list[StillframeError] = []
    for domain in domains:
        try:
            bodies.append({"guest": domain.name, "ok": True, **_examine(session, domain, options, folder)})
        except StillframeError as error:
            errors.append(error)
            bodies.append({"guest": domain.name, "ok": False, "error": error_body(error)})
            session.screen.result(f"{domain.name}: can't be captured now.")
            session.screen.result("  " + error.text().replace("\n", "\n  "))
    session.screen.json({"host": host, "guests": bodies})
    if not errors:
        return EXIT_OK if unusable is None else unusable.exit_code
    return errors[0].exit_code if len(bodies) == 1 and unusable is None else EXIT_PARTIAL


def _host(session: Session, *, without_libvirt: bool) -> dict[str, object]:
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    library, qemu = ("", "") if without_libvirt else session.connection.versions()
    versions = f"libvirt {library}, QEMU {qemu}, " if library else ""
    free = free_bytes(str(session.journal.folder))
    session.screen.result(
        f"host: {versions}journal in {session.journal.folder} ({size_text(free)} free)"
    )
    for program in missing:
        session.screen.result(f"host: {program} is missing: apt-get install qemu-utils util-linux")
    return {"libvirt": library, "qemu": qemu, "missing_programs": missing}


def _repository(
    session: Session, host: dict[str, object]
) -> tuple[Path | None, StillframeError | None]:
    """Look at the repository that is configured, if one is; return its folder, or why it can't be used."""
    if session.repository_settings.repository is None:
        return None, None
    try:
        parameters = read_parameters(session.storage)
        snapshots = len(list_snapshots(session.storage))
    except StillframeError as error:
        session.screen.result(f"repository: {session.address} can't be used now.")
        session.screen.result("  " + error.text().replace("\n", "\n  "))
        host["repository"] = {"address": session.address, "error": error_body(error)}
        return None, error
    session.screen.result(f"repository: {session.storage.address} ({snapshots} snapshots)")
    host["repository"] = {
        "address": session.storage.address, "id": parameters.id, "snapshots": snapshots}
    return folder_of(session.address), None


def _examine(
    session: Session, domain: Guest, options: GuestSettings, repository: Path | None,
) -> dict[str, object]:
    holder = lock_holder(session.journal.folder, domain.uuid)
    if holder:
        raise RunInProgress(f"stillframe works on {domain.name}: {holder}.", "stillframe status")
    left = session.journal.open_runs(domain.uuid)
    if left:
        raise Refused(
            f"A run of {domain.name} ended while {left[0].state.value} and was not recovered.",
            f"stillframe recover {domain.name}",
        )
    plan = planned(domain, for_guest(session.settings, domain.name, options), session.tools)
    standing = plan.standing
    problem = None if standing is None else how_it_stands(standing, domain, session.tools)
    if standing is not None and problem is not None:
        raise attention(standing, problem)
    if repository is not None:
        refuse_place(repository, plan)
    method = method_of(plan).value
    session.screen.result(f"{domain.name}: can be captured by the {method} method")
    if standing is not None:
        session.screen.result(
            f"  it stands on the overlays of run {standing.id} by intention, since {standing.captured_at}")
    for line in _plan_lines(plan):
        session.screen.result(f"  {line}")
    return {
        "method": method, "quiesce": plan.quiesce.value, "warnings": plan.warnings,
        "disks": [
            {"target": disk.target, "image": disk.base.text(), "format": disk.base_format,
             "size_bytes": disk.size_bytes, "overlay": disk.overlay_path}
            for disk in plan.disks
        ],
        "excluded": [{"target": each.target, "reason": each.reason} for each in plan.excluded],
        "standing": "" if standing is None else standing.id,
    }


def _plan_lines(plan: Plan) -> list[str]:
    lines = [f"quiesce: {plan.quiesce.value}", *(f"warning: {warning}" for warning in plan.warnings)]
    lines += [
        f"{disk.target}: {disk.base_format} {disk.base.text()}, {size_text(disk.size_bytes)}"
        + (f"; overlay {disk.overlay_path}" if disk.overlay_path else "")
        for disk in plan.disks
    ]
    lines += [f"{each.target}: left out, {each.reason}" for each in plan.excluded]
    lines += [
        f"overlays may grow to {size_text(mark.limit_bytes)} before the copy is given up"
        for mark in plan.watermarks
    ]
    return lines
