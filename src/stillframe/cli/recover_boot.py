"""What `stillframe recover` does for guests that were booted from a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

from stillframe.capture.lock import domain_lock
from stillframe.cli.boot import tools_of
from stillframe.cli.session import Session
from stillframe.errors import StillframeError
from stillframe.restore.boot_decide import BootStep
from stillframe.restore.boot_record import BootRecord, BootState
from stillframe.restore.boot_steps import BootWay


def booted_ones(session: Session, names: Sequence[str]) -> list[BootRecord]:
    """Return the booted guests that are named, or all."""
    return [each for each in session.boot_store.all()
            if not names or each.name in names or each.uuid in names]


def recover_booted(
    session: Session, record: BootRecord, *, dry_run: bool, lock_s: float,
) -> tuple[list[str], StillframeError | None]:
    """Take a booted guest where it should be; return what was done, and what stood in the way."""
    way = BootWay(None, tools_of(session))
    try:
        with domain_lock(
            session.boot_store.state_folder, record.uuid, record.name, "recover", session.clock, lock_s
        ):
            way.record = session.boot_store.current(record)
            if way.is_over():
                return [], None
            if dry_run:
                step = way.decide()
                return ([] if step.step is BootStep.NOTHING else
                        [f"would {step.step.value}, because {step.reason}"]), None
            way.settle()
    except StillframeError as error:
        return way.did, error
    if not way.is_over() and way.known.state is BootState.LANDING:
        way.did.append(f"it has not landed yet: stillframe land {record.name}")
    return way.did, None
