"""`stillframe forget` and `stillframe prune`: drop snapshots, then give back what only they needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import typer

from stillframe.cli.options import seconds_of
from stillframe.cli.session import Session
from stillframe.cli.snapshots import name_body, name_words, short_id
from stillframe.config import GuestSettings, Settings, policy_of
from stillframe.errors import EXIT_OK, ConfigInvalid, RepositoryDamaged, SnapshotPinned, SnapshotUnknown
from stillframe.repository.catalog import display_name, list_snapshots, plan_forget, resolve_all
from stillframe.repository.catalog import forget as forget_snapshots
from stillframe.repository.collect import collect, plan_collection
from stillframe.repository.collection import Collected, CollectionPlan
from stillframe.repository.damaged import damaged_snapshots
from stillframe.repository.drills import drop_drills
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import read_parameters
from stillframe.repository.pins import pinned
from stillframe.repository.snapshots import read_tags
from stillframe.retention import Policy, Verdict, judge
from stillframe.units import parse_share, size_text


@dataclass(frozen=True)
class Rules:
    """Which snapshots to keep, as options say it, and among which. Without any, the file's rules count."""

    given: GuestSettings
    guest: str | None
    tag: str | None

    def policies(self, settings: Settings) -> Callable[[str], Policy]:
        """Return what gives a guest's rules. Raises ConfigInvalid, BadParameter if there is none at all."""
        if self.given != GuestSettings():
            given = policy_of(self.given)
            return lambda _guest: given
        if all(policy_of(each).says_nothing for each in (settings.defaults, *settings.guests.values())):
            raise typer.BadParameter("name the snapshots to drop, or rules for those to keep: --keep-…, or "
                                     "keep_… in the configuration file")
        return lambda guest: policy_of(settings.of_guest(guest, GuestSettings()))


def forget(session: Session, texts: Sequence[str], rules: Rules, *, dry_run: bool) -> int:
    """Drop the named snapshots, or those that no rule keeps; return the exit code."""
    policies = None if texts else rules.policies(session.settings)
    read_parameters(session.storage)
    known = list_snapshots(session.storage)
    found = _named(session, known, texts) if policies is None else _judged(session, known, rules, policies)
    verdicts = [_kept_if_booted(verdict, session) for verdict in found]
    plan = plan_forget(verdict.snapshot for verdict in verdicts if not verdict.keep)
    for verdict in verdicts:
        word = "keep" if verdict.keep else ("would drop" if dry_run else "drop")
        session.screen.result(f"{word:<10}  {name_words(verdict.snapshot)}  ({', '.join(verdict.reasons)})")
    dropped = 0 if dry_run else forget_snapshots(session.storage, plan)
    if dropped:
        session.screen.say(f"dropped {dropped}; their space comes back with: "
                           f"stillframe prune --repo {session.storage.address}")
    session.screen.json({
        "dry_run": dry_run,
        **{word: [{**name_body(each.snapshot), "reasons": each.reasons}
                  for each in verdicts if each.keep is keep]
           for word, keep in (("kept", True), ("dropped", False))},
    })
    return EXIT_OK


def prune(session: Session, fence_after: str, compact_below: str, *, dry_run: bool) -> int:
    """Delete what no snapshot needs, or say what would be; return the exit code."""
    fence_after_s = seconds_of("fence_after", fence_after)
    try:
        below = parse_share(compact_below)
    except ValueError as error:
        raise ConfigInvalid(f"compact_below is {error}.", "correct the option --compact-below") from error
    if dry_run:
        plan = plan_collection(
            session.repository, session.clock, fence_after_s=fence_after_s, compact_below=below)
        _show_plan(session, plan)
        drills = _drop_drills(session, dry_run=True)
        session.screen.json({"dry_run": True, "plan": _plan_body(plan), "old_drills": drills})
        return _exit_code(plan)

    def shown(plan: CollectionPlan) -> bool:
        _show_plan(session, plan)
        return True

    done = collect(
        session.repository, session.host, session.clock, fence_after_s=fence_after_s, compact_below=below,
        approve=shown)
    _show_done(session, done)
    plan = done.plans[0]
    drills = _drop_drills(session, dry_run=False)
    session.screen.json({
        "dry_run": False, "plan": _plan_body(plan), "done": _done_body(done), "old_drills": drills})
    return RepositoryDamaged.exit_code if done.damaged else _exit_code(plan)


def _drop_drills(session: Session, *, dry_run: bool) -> int:
    """Delete records of drills whose snapshot is gone; return how many there are."""
    count = drop_drills(session.storage, dry_run=dry_run)
    if count:
        session.screen.result(
            f"{'to delete' if dry_run else 'deleted'}: {count} records of drills whose snapshots are gone")
    return count


def _named(
    session: Session, known: list[SnapshotName], texts: Sequence[str],
) -> list[Verdict[SnapshotName]]:
    pins = pinned(session.storage)
    named = resolve_all(known, texts)
    for name in named:
        if name.sid in pins:
            raise SnapshotPinned(f"{display_name(name)} is pinned.",
                                 f"stillframe unpin {short_id(name.sid)} --repo REPO")
    return [Verdict(name, keep=False, reasons=("named",)) for name in named]


def _judged(
    session: Session, known: list[SnapshotName], rules: Rules, policies: Callable[[str], Policy],
) -> list[Verdict[SnapshotName]]:
    subject = [name for name in known if rules.guest in (None, name.guest)]
    if rules.guest is not None and not subject:
        raise SnapshotUnknown(f"There is no snapshot of {rules.guest}.",
                              f"stillframe list --repo {session.storage.address}")
    if rules.tag is not None:
        tags = read_tags(session.near_repository, subject)
        subject = [name for name in subject if rules.tag in tags.get(name.sid, ())]
    damaged = damaged_snapshots(session.storage, lambda: session.repository, subject)
    # Last of all: what is pinned while rules are looked at should be kept.
    pins, now = pinned(session.storage), session.storage.now()
    return [
        verdict for guest in sorted({name.guest for name in subject})
        for verdict in judge(
            (name for name in subject if name.guest == guest), policies(guest), now, pins, damaged)]


def _kept_if_booted(verdict: Verdict[SnapshotName], session: Session) -> Verdict[SnapshotName]:
    """Return the verdict, or one that keeps a snapshot that a guest of this host reads from."""
    guest = next((each.name for each in session.boot_store.known() if each.sid == verdict.snapshot.sid), "")
    return verdict if verdict.keep or not guest else Verdict(
        verdict.snapshot, keep=True, reasons=(f"{guest} runs from it: stillframe land {guest}",))


def _exit_code(plan: CollectionPlan) -> int:
    return RepositoryDamaged.exit_code if plan.missing or plan.disbelieved else EXIT_OK


def _show_plan(session: Session, plan: CollectionPlan) -> None:
    say = session.screen.result
    say(f"{plan.snapshots} snapshots need {size_text(plan.live_bytes)} of the "
        f"{size_text(plan.repository_bytes)} that are stored")
    for record in plan.fenced:
        say(f"dead: the run {record.sid[:12]} of {record.host}, begun at {record.began_at}")
    if plan.deleted:
        say(f"to delete: {len(plan.deleted)} packs, {size_text(plan.deleted_bytes)}")
    if plan.condemned:
        say(f"to condemn: {len(plan.condemned)} packs that nothing needs, {size_text(plan.condemned_bytes)}")
    if plan.taken_back:
        say(f"to take back: {len(plan.taken_back)} condemned packs that are needed after all")
    if plan.compacted:
        say(f"to copy together: {len(plan.compacted)} packs, to free {size_text(plan.compaction_gain_bytes)}")
    if plan.mended:
        say("to write down anew: where slots were moved to; the latest generation leaves some of it out")
    if plan.is_empty:
        say("nothing to do")
    for pack in plan.missing:
        session.screen.warn(f"the pack {pack.text} is needed and not there; verify names the snapshots")
    for pack in plan.disbelieved:
        session.screen.warn(
            f"the pack {pack.text} does not have what a generation says was moved there, and nothing is "
            "deleted by that: it is damaged, or somebody who has the key wrote that generation")


def _show_done(session: Session, done: Collected) -> None:
    say = session.screen.result
    if done.lost_race:
        say("another prune or copy was first, so this one stopped and deleted nothing more: run it again")
    if done.deleted_packs:
        say(f"deleted {done.deleted_packs} packs, {size_text(done.deleted_bytes)}")
    if done.copied_bytes:
        say(f"copied {size_text(done.copied_bytes)} together")
    for each in done.waiting:
        say(f"{each.packs} packs ({size_text(each.size_bytes)}) wait for the run {each.sid[:12]} of "
            f"{each.host}, begun at {each.since}")
    for pack, slot in done.damaged:
        session.screen.warn(f"slot {slot} of the pack {pack.text} is damaged and was left where it is")


def _plan_body(plan: CollectionPlan) -> dict[str, object]:
    return {
        "generation": plan.generation, "snapshots": plan.snapshots,
        "repository_bytes": plan.repository_bytes, "live_bytes": plan.live_bytes,
        "unused_bytes": plan.unused_bytes, "deleted_bytes": plan.deleted_bytes,
        "condemned_bytes": plan.condemned_bytes, "compaction_gain_bytes": plan.compaction_gain_bytes,
        "fenced": [record.sid for record in plan.fenced],
        "deleted": [fate.pack.text for fate in plan.deleted],
        "condemned": [fate.pack.text for fate in plan.condemned],
        "taken_back": [fate.pack.text for fate in plan.taken_back],
        "compacted": [each.pack.text for each in plan.compacted],
        "missing": [pack.text for pack in plan.missing],
        "disbelieved": [pack.text for pack in plan.disbelieved], "mended": plan.mended,
    }


def _done_body(done: Collected) -> dict[str, object]:
    return {
        "rounds": len(done.plans), "lost_race": done.lost_race, "deleted_packs": done.deleted_packs,
        "deleted_bytes": done.deleted_bytes, "condemned_packs": done.condemned_packs,
        "copied_bytes": done.copied_bytes, "fenced": [record.sid for record in done.fenced],
        "waiting": [asdict(each) for each in done.waiting],
        "damaged": [{"pack": pack.text, "slot": slot} for pack, slot in done.damaged],
    }
