"""The fault table (docs/CAPTURE.md), row by row: what is found, and the one safe step then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillframe.capture.decide import Action, DiskSight, FileSeen, JobSeen, Seen, Sight, decide
from stillframe.capture.journal import RunRecord
from stillframe.capture.states import BEFORE_RELEASE, DiskPhase, State
from stillframe.hypervisor.model import Power
from tests.unit.capture_records import (
    AT,
    off,
    off_disk,
    on_base,
    on_overlay,
    paused,
    run_record,
    running,
)

_TWO = {"vda": DiskPhase.COMMITTING, "vdb": DiskPhase.COMMITTING}


def action(record: RunRecord, sight: Sight) -> Action:
    return decide(record, sight).action


def phase(known: DiskPhase, state: State = State.COMMITTING, **changes: object) -> RunRecord:
    return run_record(state, {"vda": known}, **changes)


# --- The tool is killed -----------------------------------------------------------------------


@pytest.mark.parametrize("state", [state for state in State if state in BEFORE_RELEASE])
def test_a_run_that_died_before_release_is_given_up_before_anything_else(state: State) -> None:
    assert action(run_record(state, freeze_begun=True), running(on_overlay())) is Action.RELEASE


def test_a_frozen_guest_is_thawed_before_anything_else() -> None:
    assert action(run_record(freeze_begun=True), running(on_overlay())) is Action.THAW
    thawed = run_record(freeze_begun=True, thaw_verified=True)
    assert action(thawed, running(on_overlay())) is Action.START_COMMIT


def test_a_guest_whose_agent_never_answers_is_brought_back_and_then_asked_about() -> None:
    record = run_record(freeze_begun=True)
    assert action(record, running(on_overlay(), thaw_hopeless=True)) is Action.START_COMMIT
    nothing_left = on_base(overlay=FileSeen.ABSENT)
    frozen = phase(DiskPhase.ON_BASE, freeze_begun=True)
    assert action(frozen, running(nothing_left, thaw_hopeless=True)) is Action.ASK
    assert action(frozen, paused(nothing_left)) is Action.ASK
    assert action(frozen, off(off_disk(Seen.BASE, overlay=FileSeen.ABSENT))) is Action.FINISH


def test_overlay_files_that_were_never_put_on_go() -> None:
    planned = phase(DiskPhase.PLANNED, State.RELEASED, snapshot_begun=False)
    assert action(planned, running(on_base())) is Action.CONFIRM_BASE
    assert action(planned, off(off_disk(Seen.BASE))) is Action.CONFIRM_BASE
    assert action(phase(DiskPhase.ON_BASE), running(on_base())) is Action.UNLINK
    assert action(phase(DiskPhase.ON_BASE), running(on_base(overlay=FileSeen.ABSENT))) is Action.FINISH


def test_a_killed_run_with_a_live_overlay_commits_it() -> None:
    assert action(run_record(), running(on_overlay())) is Action.START_COMMIT


def test_a_guest_that_is_still_shutting_down_is_waited_for_then_started() -> None:
    record = phase(DiskPhase.PLANNED, State.SHUTTING_DOWN, snapshot_begun=False, shutdown_begun_at=AT)
    assert action(record, running(on_base(), shutdown_pending=True)) is Action.WAIT
    assert action(record, running(on_base(), shutdown_pending=True, waited_out=True)) is Action.RELEASE
    assert action(record, off(off_disk(Seen.BASE))) is Action.RELEASE
    left = off(off_disk(Seen.BASE, overlay=FileSeen.ABSENT))
    down = phase(DiskPhase.ON_BASE, State.CLEANING, shutdown_begun_at=AT)
    assert action(down, left) is Action.START
    assert action(phase(DiskPhase.ON_BASE, State.CLEANING, shutdown_begun_at=AT, start_verified=True), left) \
        is Action.FINISH


# --- libvirtd in the snapshot -----------------------------------------------------------------


def test_libvirtd_killed_before_the_transaction_leaves_an_empty_overlay_and_nodes() -> None:
    record = phase(DiskPhase.PLANNED, State.RELEASED)
    stale = on_base(leaked_nodes=("libvirt-3-format", "libvirt-3-storage"), overlay_empty=True)
    assert action(record, running(stale)) is Action.CONFIRM_BASE
    confirmed = phase(DiskPhase.ON_BASE, State.RELEASED)
    assert action(confirmed, running(stale)) is Action.DROP_NODES
    assert action(confirmed, running(replace(stale, leaked_nodes=()))) is Action.UNLINK


def test_libvirtd_killed_after_the_transaction_is_committed_by_qemu_itself() -> None:
    forgotten = on_overlay(live=Seen.BASE, inactive=Seen.BASE)
    record = phase(DiskPhase.PLANNED, State.RELEASED)
    assert action(record, running(forgotten)) is Action.COMMIT_IN_QEMU
    record = phase(DiskPhase.COMMITTING)
    assert action(record, running(replace(forgotten, job=JobSeen.COMMITTING))) is Action.WAIT
    assert action(record, running(replace(forgotten, job=JobSeen.READY))) is Action.SUSPEND
    assert action(record, paused(replace(forgotten, job=JobSeen.READY))) is Action.FINISH_IN_QEMU


def test_libvirt_lost_qemus_commit_that_had_ended_when_the_tool_died() -> None:
    record = phase(DiskPhase.PIVOTING)
    concluded = on_base(job=JobSeen.READY)
    assert action(record, running(concluded)) is Action.WAIT
    assert action(record, running(concluded, waited_out=True)) is Action.FINISH_IN_QEMU


def test_libvirtd_killed_after_the_transaction_and_then_qemu_dies() -> None:
    record = phase(DiskPhase.PLANNED, State.RELEASED)
    assert action(record, off(off_disk(Seen.BASE))) is Action.COMPARE
    assert action(record, off(off_disk(Seen.BASE, equal=True))) is Action.CONFIRM_BASE
    assert action(record, off(off_disk(Seen.BASE, equal=False))) is Action.COMMIT_OFFLINE
    assert action(record, off(off_disk(Seen.BASE, equal=False, base_newer=True))) is Action.ASK


def test_a_device_whose_times_tell_nothing_is_not_overwritten_while_the_definition_names_it() -> None:
    record = phase(DiskPhase.PLANNED, State.RELEASED)
    assert action(record, off(off_disk(Seen.BASE, equal=False, base_newer=None))) is Action.ASK


@pytest.mark.parametrize("known", [DiskPhase.PLANNED, DiskPhase.OVERLAID])
@pytest.mark.parametrize("inactive", [Seen.BASE, Seen.OVERLAY])
def test_a_guest_started_from_the_stale_base_keeps_its_overlay(known: DiskPhase, inactive: Seen) -> None:
    """Its XML named the base while the overlay held the newer data: unlinking it would lose them."""
    stale = on_base(inactive=inactive, overlay_empty=False)
    decision = decide(phase(known, State.RELEASED), running(stale, waited_out=True))
    assert decision.action is Action.ASK
    assert "writes that the base lacks" in decision.reason


def test_a_guest_started_from_a_half_committed_base_keeps_its_overlay() -> None:
    record = phase(DiskPhase.COMMITTING)
    assert action(record, running(on_base(overlay_empty=False))) is Action.ASK


# --- QEMU dies --------------------------------------------------------------------------------


def test_qemu_dies_while_overlaid() -> None:
    assert action(run_record(), off(off_disk(Seen.OVERLAY))) is Action.COMMIT_OFFLINE
    record = phase(DiskPhase.COMMITTING)
    assert action(record, off(off_disk(Seen.OVERLAY, equal=True))) is Action.POINT_TO_BASE
    assert action(record, off(off_disk(Seen.BASE, equal=True))) is Action.CONFIRM_BASE


def test_the_guest_was_started_again_on_its_overlay_meanwhile() -> None:
    assert action(run_record(), running(on_overlay())) is Action.START_COMMIT


def test_qemu_dies_in_the_commit_and_the_half_written_base_is_never_used() -> None:
    record = phase(DiskPhase.COMMITTING)
    half = off_disk(Seen.OVERLAY, base_intact=False, base_newer=True)
    assert action(record, off(half)) is Action.COMMIT_OFFLINE
    assert action(record, running(on_overlay(base_intact=False, base_newer=True))) is Action.START_COMMIT
    redefined = off_disk(Seen.BASE, base_intact=False, base_newer=True, equal=False)
    assert action(record, off(redefined)) is Action.ASK


def test_one_disk_pivoted_and_another_ready_when_qemu_dies() -> None:
    record = run_record(State.PIVOTING, {"vda": DiskPhase.ON_BASE, "vdb": DiskPhase.COMMITTING})
    decision = decide(record, off(off_disk(Seen.BASE), off_disk(Seen.OVERLAY, "vdb")))
    assert (decision.action, decision.targets) == (Action.COMMIT_OFFLINE, ("vdb",))
    decision = decide(record, running(on_base(), on_overlay("vdb")))
    assert (decision.action, decision.targets) == (Action.START_COMMIT, ("vdb",))


def test_a_pivoted_disk_is_confirmed_before_another_is_committed_again() -> None:
    record = run_record(State.PIVOTING, {"vda": DiskPhase.PIVOTING, "vdb": DiskPhase.PIVOTING})
    decision = decide(record, running(on_base(), on_overlay("vdb")))
    assert (decision.action, decision.targets) == (Action.CONFIRM_BASE, ("vda",))


def test_no_disk_is_changed_before_it_is_certain_that_all_can_be() -> None:
    record = run_record(State.RELEASED, {"vda": DiskPhase.OVERLAID, "vdb": DiskPhase.PIVOTING})
    decision = decide(record, off(off_disk(Seen.OVERLAY), off_disk(Seen.OVERLAY, "vdb", equal=False)))
    assert (decision.action, decision.targets) == (Action.ASK, ("vdb",))


# --- libvirtd in commit and pivot -------------------------------------------------------------


def test_libvirtd_killed_in_the_commit_and_its_job_is_adopted() -> None:
    record = run_record(State.COMMITTING, _TWO)
    job, ready = JobSeen.COMMITTING, JobSeen.READY
    assert action(record, running(on_overlay(job=job), on_overlay("vdb", job=ready))) is Action.WAIT
    both = (on_overlay(job=ready), on_overlay("vdb", job=ready))
    assert action(record, running(*both)) is Action.SUSPEND
    assert action(record, paused(*both)) is Action.PIVOT
    assert decide(record, paused(*both)).targets == ("vda", "vdb")


def test_one_disk_whose_commit_ended_without_a_pivot_is_committed_anew() -> None:
    record = run_record(State.COMMITTING, _TWO)
    decision = decide(record, running(on_overlay(job=JobSeen.READY), on_overlay("vdb")))
    assert (decision.action, decision.targets) == (Action.START_COMMIT, ("vdb",))


def test_a_commit_that_libvirt_has_lost_is_cancelled_after_a_while() -> None:
    stray = on_overlay(job=JobSeen.STRAY)
    assert action(phase(DiskPhase.COMMITTING), running(stray)) is Action.WAIT
    assert action(phase(DiskPhase.COMMITTING), running(stray, waited_out=True)) is Action.END_STRAY_JOB


def test_libvirtd_killed_in_the_pivot_heals_while_qemu_lives() -> None:
    record = phase(DiskPhase.PIVOTING, State.PIVOTING, suspended=True)
    behind = on_base(inactive=Seen.OVERLAY)
    assert action(record, paused(behind)) is Action.WAIT
    assert action(record, paused(behind, waited_out=True)) is Action.POINT_TO_BASE
    assert action(record, paused(on_base())) is Action.CONFIRM_BASE
    confirmed = phase(DiskPhase.ON_BASE, State.PIVOTING, suspended=True)
    assert action(confirmed, paused(on_base())) is Action.RESUME
    assert action(confirmed, running(on_base())) is Action.UNLINK


def test_the_live_xml_never_catches_up_and_the_guest_goes_on_once_its_definition_is_right() -> None:
    record = phase(DiskPhase.PIVOTING, State.PIVOTING, suspended=True)
    behind = on_base(live=Seen.OVERLAY, inactive=Seen.OVERLAY)
    assert action(record, paused(behind, waited_out=True)) is Action.POINT_TO_BASE
    behind = on_base(live=Seen.OVERLAY)
    assert action(record, paused(behind, waited_out=True)) is Action.CONFIRM_BASE
    confirmed = phase(DiskPhase.ON_BASE, State.PIVOTING, suspended=True)
    assert action(confirmed, paused(behind, waited_out=True)) is Action.RESUME
    decision = decide(confirmed, running(behind, waited_out=True))
    assert decision.action is Action.ASK
    assert "live view" in decision.reason


@pytest.mark.parametrize("inactive", [Seen.BASE, Seen.OVERLAY])
def test_libvirtd_killed_in_the_pivot_and_then_qemu_dies(inactive: Seen) -> None:
    record = phase(DiskPhase.PIVOTING, State.PIVOTING)
    assert action(record, off(off_disk(inactive))) is Action.COMPARE
    same = Action.POINT_TO_BASE if inactive is Seen.OVERLAY else Action.CONFIRM_BASE
    assert action(record, off(off_disk(inactive, equal=True))) is same
    assert action(record, off(off_disk(inactive, equal=False))) is Action.ASK


@pytest.mark.parametrize("state", State)
def test_a_guest_that_libvirt_takes_for_shut_off_while_qemu_runs_is_left_alone(state: State) -> None:
    decision = decide(run_record(state), Sight(Power.HIDDEN, (off_disk(Seen.OVERLAY),)))
    assert decision.action is Action.ASK
    assert "its QEMU still runs" in decision.reason


# --- No space ---------------------------------------------------------------------------------


def test_no_space_on_the_overlay_is_committed_while_paused_then_resumed() -> None:
    def stopped(disk: DiskSight) -> Sight:
        return Sight(Power.PAUSED_ON_IO_ERROR, (disk,))

    assert action(run_record(), stopped(on_overlay())) is Action.START_COMMIT
    record = phase(DiskPhase.COMMITTING)
    assert action(record, stopped(on_overlay(job=JobSeen.READY))) is Action.PIVOT
    assert action(phase(DiskPhase.PIVOTING), stopped(on_base())) is Action.CONFIRM_BASE
    assert action(phase(DiskPhase.ON_BASE), stopped(on_base())) is Action.RESUME


def test_no_space_on_the_base_fails_the_job_and_it_is_tried_again() -> None:
    failed = on_overlay(base_intact=False, base_newer=True)
    assert action(phase(DiskPhase.COMMITTING), running(failed)) is Action.START_COMMIT


# --- Things that people do --------------------------------------------------------------------


def test_a_base_that_changed_under_the_overlay_is_never_merged() -> None:
    assert action(run_record(), running(on_overlay(base_intact=False))) is Action.ASK
    assert action(run_record(), off(off_disk(Seen.OVERLAY, base_intact=False))) is Action.COMPARE
    differ = off_disk(Seen.OVERLAY, base_intact=False, equal=False)
    assert action(run_record(), off(differ)) is Action.ASK


def test_a_base_that_was_replaced_is_never_written_to() -> None:
    for disk in (off_disk(Seen.OVERLAY, base_present=False), off_disk(Seen.BASE, base_present=False)):
        assert action(phase(DiskPhase.COMMITTING), off(disk)) is Action.ASK
    gone = Sight(Power.GONE, (off_disk(Seen.UNKNOWN, base_present=False),))
    assert action(phase(DiskPhase.COMMITTING), gone) is Action.ASK


@pytest.mark.parametrize("file", [FileSeen.ABSENT, FileSeen.OTHER])
def test_an_overlay_that_was_deleted_or_swapped_while_in_use_is_asked_about(file: FileSeen) -> None:
    assert action(run_record(), running(on_overlay(overlay=file))) is Action.ASK
    assert action(run_record(), off(off_disk(Seen.OVERLAY, overlay=file))) is Action.ASK


def test_the_overlay_came_back_after_the_base_was_confirmed() -> None:
    record = phase(DiskPhase.ON_BASE)
    assert action(record, off(off_disk(Seen.OVERLAY))) is Action.ASK
    for job in (JobSeen.NONE, JobSeen.READY):
        assert action(record, running(on_overlay(job=job))) is Action.ASK
    assert action(record, running(on_overlay(live=Seen.BASE))) is Action.ASK


def test_a_foreign_job_stops_us_only_where_something_of_ours_is_left() -> None:
    record = phase(DiskPhase.ON_BASE)
    assert action(record, running(on_base(job=JobSeen.FOREIGN))) is Action.ASK
    assert action(record, running(on_base(job=JobSeen.FOREIGN, overlay=FileSeen.ABSENT))) is Action.FINISH


def test_an_overlay_upon_ours_and_another_image_are_asked_about() -> None:
    assert action(run_record(), running(on_overlay(qemu=Seen.UNDER))) is Action.ASK
    assert action(run_record(), running(on_base(live=Seen.OTHER))) is Action.ASK


def test_an_overlay_in_another_guests_chain_stays() -> None:
    assert action(phase(DiskPhase.ON_BASE), running(on_base(named_by="clone"))) is Action.ASK


def test_a_managed_save_is_not_pulled_from_under() -> None:
    assert action(run_record(), off(off_disk(Seen.OVERLAY), managed_save=True)) is Action.ASK
    nothing_left = off_disk(Seen.BASE, overlay=FileSeen.ABSENT)
    assert action(run_record(), off(nothing_left, managed_save=True)) is Action.FINISH


def test_a_guest_that_was_undefined_still_gets_its_writes_into_its_base() -> None:
    gone = Sight(Power.GONE, (off_disk(Seen.UNKNOWN),))
    assert action(run_record(), gone) is Action.COMMIT_OFFLINE
    assert action(phase(DiskPhase.COMMITTING), replace(gone, disks=(off_disk(Seen.UNKNOWN, equal=True),))) \
        is Action.CONFIRM_BASE


def test_a_guest_that_stillframe_suspended_goes_on_before_a_person_is_asked() -> None:
    record = phase(DiskPhase.COMMITTING, State.SUSPENDING, suspended=True)
    foreign = on_overlay(job=JobSeen.FOREIGN)
    assert action(record, paused(foreign)) is Action.RESUME
    assert action(phase(DiskPhase.COMMITTING, State.RESUMING), running(foreign)) is Action.ASK
    assert action(phase(DiskPhase.COMMITTING), paused(foreign)) is Action.ASK
