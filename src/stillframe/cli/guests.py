"""Doing something with several guests, one after the other: what `mirror` and `backup` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol, TypeVar

from stillframe.capture.method import Method
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_PARTIAL, GuestShutOff, NeedsAttention, StillframeError
from stillframe.hypervisor.domain import all_domains
from stillframe.hypervisor.model import ExcludedDisk, Power
from stillframe.restore.drill_place import is_drilled


class GuestResult(Protocol):
    """What came of a guest, as far as it is told the same way."""

    @property
    def recovered(self) -> tuple[str, ...]:
        """What was done about an earlier run."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the person should know."""
        ...

    @property
    def excluded(self) -> tuple[ExcludedDisk, ...]:
        """The disks that were left out."""
        ...


R = TypeVar("R", bound=GuestResult)


def all_guests(session: Session, options: GuestSettings) -> list[str]:
    """Return the names of all guests that their method can capture, running or not.

    Which of them runs is looked at again when it is a guest's turn. Raises GuestShutOff if there is none.
    """
    found = []
    for domain in all_domains(session.connection):
        if is_drilled(session.state_folder, domain.uuid):
            continue
        if session.settings.of_guest(domain.name, options).skip:
            session.screen.say(f"{domain.name} is left out, as the configuration file says")
            continue
        power, method = domain.power(), for_guest(session.settings, domain.name, options).method
        off = power in (Power.OFF, Power.GONE)
        if method is not Method.AUTO and off is not (method is Method.OFFLINE):
            session.screen.say(f"{domain.name} is {power.value} and is left out, as {method.value} asks for")
        elif power is not Power.GONE:
            found.append(domain.name)
    if not found:
        raise GuestShutOff("There is no guest that could be captured.", "virsh list --all")
    return found


def for_each(
    session: Session, names: Sequence[str], do: Callable[[str], R], show: Callable[[str, R], None],
) -> list[tuple[str, R | StillframeError]]:
    """Do something with each guest and show what came of it; return all of it. A signal ends it cleanly."""
    outcomes: list[tuple[str, R | StillframeError]] = []
    with session.signals_as_stop():
        for name in names:
            try:
                stopped = session.stop()
                if stopped is not None:
                    raise stopped
                result = do(name)
            except StillframeError as error:
                session.complete(error)
                outcomes.append((name, error))
                session.screen.error(error, name)
                continue
            outcomes.append((name, result))
            _show_common(session, name, result)
            show(name, result)
    return outcomes


def body_of(name: str, outcome: GuestResult | StillframeError, **more: object) -> dict[str, object]:
    """Return what came of a guest, for JSON."""
    if isinstance(outcome, StillframeError):
        return {"guest": name, "ok": False, "error": error_body(outcome)}
    return {"guest": name, "ok": True, **more, **asdict(outcome)}  # type: ignore[call-overload]


def exit_code(outcomes: Sequence[R | StillframeError], code_of: Callable[[R], int]) -> int:
    """Return the command's exit code: that of the errors, else the highest that *code_of* gives a result."""
    errors = [each for each in outcomes if isinstance(each, StillframeError)]
    if errors:
        if any(isinstance(error, NeedsAttention) for error in errors):
            return NeedsAttention.exit_code
        # One guest's error is the command's; several guests failing alike, too.
        codes = {error.exit_code for error in errors}
        return codes.pop() if len(errors) == len(outcomes) and len(codes) == 1 else EXIT_PARTIAL
    return max(code_of(each) for each in outcomes if not isinstance(each, StillframeError))


def _show_common(session: Session, name: str, result: GuestResult) -> None:
    for word in result.recovered:
        session.screen.warn(word)
    for warning in result.warnings:
        session.screen.warn(f"{name}: {warning}")
    for excluded in result.excluded:
        session.screen.say(f"{name}: {excluded.target} is left out: {excluded.reason}")
