"""`stillframe verify`: whether everything that snapshots need is there, and is what was stored."""

from __future__ import annotations

import sys
from dataclasses import asdict

from stillframe.cli.secret import must_be_asked
from stillframe.cli.session import Session
from stillframe.cli.snapshots import name_body, name_words
from stillframe.errors import EXIT_OK, ConfigInvalid, RepositoryDamaged
from stillframe.repository.opened import read_parameters
from stillframe.repository.verified import Subset
from stillframe.repository.verify import Hurt, Level, Verification, verify_stored
from stillframe.repository.verify import verify as verify_repository
from stillframe.units import size_text

_RANGES_SHOWN = 10


def verify(session: Session, level: str, subset_text: str | None) -> int:
    """Verify, and show what was found; return the exit code: RepositoryDamaged's if anything was."""
    try:
        subset = Subset.parse(subset_text) if subset_text is not None else None
    except ValueError as error:
        raise ConfigInvalid(f"subset is {error}.", "correct the option --subset") from error
    read_parameters(session.storage)
    wanted = Level(level)

    def progress(done: int, total: int) -> None:
        session.screen.bar("verify", done, total)

    if wanted is Level.STORED and must_be_asked(session.repository_settings) and not sys.stdin.isatty():
        session.screen.say("no key: what is stored is checked, which snapshots need it is not looked at")
        found = verify_stored(session.storage, session.clock, subset, progress)
    else:
        found = verify_repository(session.repository, session.clock, wanted, subset, progress)
    _show(session, found)
    session.screen.json(_body(found))
    return EXIT_OK if found.is_sound else RepositoryDamaged.exit_code


def _show(session: Session, found: Verification) -> None:
    say = session.screen.result
    # Without a key nobody looked at the snapshots.
    snapshots = f"{found.snapshots} snapshots, " if found.snapshots else ""
    say(f"{snapshots}{found.packs} packs; checked {found.checked_packs} packs, "
        f"{found.checked_slots} slots, {size_text(found.checked_bytes)} ({found.level.value})")
    for finding in found.findings:
        say(f"damaged: {finding.key}: {finding.why}")
    for name in found.unreadable:
        say(f"unreadable: {name_words(name)}")
    for hurt in found.hurt:
        say(f"hurt: {name_words(hurt.snapshot)}: {hurt.disk}: {_hurt_words(hurt)}")
    for hurt in found.healed:
        say(f"healed: {name_words(hurt.snapshot)}: {hurt.disk}: {size_text(hurt.size_bytes)} stored again")
    if found.is_sound:
        say("all is well")
        return
    if not found.is_complete:
        say("more snapshots may be hurt than are named")
    if any(not hurt.is_tree for hurt in found.hurt):
        say("a backup that sees the same data again heals it; restore --skip-bad gives what is left")


def _hurt_words(hurt: Hurt) -> str:
    ranges = ", ".join(f"{begin}-{end}" for begin, end in hurt.ranges[:_RANGES_SHOWN])
    more = f" and {len(hurt.ranges) - _RANGES_SHOWN} more" if len(hurt.ranges) > _RANGES_SHOWN else ""
    lasting = " (a part of its tree is lost: no backup can heal it)" if hurt.is_tree else ""
    return f"{size_text(hurt.size_bytes)} can't be read, at bytes {ranges}{more}{lasting}"


def _body(found: Verification) -> dict[str, object]:
    return {
        "level": found.level.value, "sound": found.is_sound, "complete": found.is_complete,
        "snapshots": found.snapshots, "packs": found.packs, "checked_packs": found.checked_packs,
        "checked_slots": found.checked_slots, "checked_bytes": found.checked_bytes,
        "findings": [asdict(finding) for finding in found.findings],
        "hurt": [_hurt_body(hurt) for hurt in found.hurt],
        "healed": [_hurt_body(hurt) for hurt in found.healed],
        "unreadable": [name_body(name) for name in found.unreadable],
    }


def _hurt_body(hurt: Hurt) -> dict[str, object]:
    return {
        "snapshot": name_body(hurt.snapshot), "disk": hurt.disk, "size_bytes": hurt.size_bytes,
        "ranges": hurt.ranges, "tree": hurt.is_tree,
    }
