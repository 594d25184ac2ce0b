"""A walk: steps drawn at random or given, and after each one a look at everything that has to be so.

Whatever was done to the guest before, a run that succeeds gave the disks as they were at its moment, one that
does not is refused by the documented error or was struck by the test, and neither leaves anything behind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from lab.disks import Kind
from lab.images import ImagesDiffer, assert_equal_images
from stillframe.capture.method import Method
from stillframe.errors import (
    EXIT_FELL_BACK,
    EXIT_OK,
    GuestUnfit,
    Interrupted,
    NeedsAttention,
    RunFailed,
)
from tests.walk.command import Command, Ended
from tests.walk.expected import Counted, keepers, refusal, resolved
from tests.walk.steps import Step, next_step, some_writes
from tests.walk.world import Moment, World, remove

#: Behind these steps of the journal the moment of a capture is past.
_MOMENTS = {("snapshot", "done"), ("beginning", "done")}
_WRITES_AT_A_STEP = 0.2
#: What a run may end with when libvirtd or QEMU was killed under it.
_FAILED = range(RunFailed.exit_code, 60)


class Walk:
    """A walk through a world. *history* is what was done, in words that a person can follow."""

    def __init__(self, world: World, seed: int, mutation: str = "-") -> None:
        self.world = world
        self.history: list[str] = []
        self._seed = seed
        self._mutation = mutation
        self._counted = Counted()
        self._moment: Moment = {}

    def at_random(self, steps: int) -> None:
        """Take so many steps, then look at all that was ever made. Raises AssertionError."""
        for number in range(steps):
            # A generator for each step: one that came out otherwise than last time changes no later draw.
            self.take(next_step(self.world, random.Random(f"{self._seed}-{number}")))
        self.finish()

    def take(self, step: Step) -> None:
        """Take one step, and look. Raises AssertionError."""
        self.history.append(f"{len(self.history) + 1:3} {step}")
        getattr(self, f"do_{step.name}")(**step.given)
        self.world.assert_nothing_left()

    def text(self) -> str:
        """Return the history."""
        return "\n".join([f"walk of seed {self._seed}:", *self.history])

    def finish(self) -> None:
        """Bring the guest back onto its own images, and compare the disks and every snapshot there is."""
        world = self.world
        if not world.running:
            self.take(Step("start"))
        for _ in range(2):  # ours may be on theirs, or theirs on ours
            if world.foreign and world.theirs_on_top() == set(world.foreign):
                self.take(Step("commit_theirs", {"writes": ()}))
            if world.cut() and world.has_spoiled_bitmap():
                # It keeps QEMU from making the disk larger, and goes with the overlay that has it.
                self.take(Step("back_up", {"where": "one", "method": "standing-overlay", "exclude": "",
                                           "seed": 0, "whole": False}))
            for target, size_bytes in world.cut().items():
                self.take(Step("resize", {"target": target, "size_bytes": size_bytes}))
            self.take(Step("settle", {"seed": 0}))
        world.assert_disks()
        self.take(Step("end", {"how": "shutdown"}))
        for where, moments in world.moments.items():
            for snapshot, moment in moments.items():
                world.repos[where].assert_restores(snapshot, moment, world.folder)
            assert not moments or world.repos[where].json("verify", "--level", "full")["sound"] is True

    # --- steps of the guest, and of those who look after it ------------------------------------

    def do_write(self, writes: tuple[Any, ...]) -> None:
        self.world.write(writes)

    def do_start(self) -> None:
        self.world.start()
        self.world.assert_disks()

    def do_end(self, how: str) -> None:
        self.world.end(how)
        if how == "kill":
            self._counted.forget(method=Method.BITMAP)
        self.world.assert_disks()

    def do_restart_libvirtd(self, how: str) -> None:
        self.world.restart_libvirtd(how)

    def do_resize(self, target: str, size_bytes: int) -> None:
        if self.world.foreign and self.world.has_spoiled_bitmap():
            said = "not resized: their overlay could not be committed into an image that can't grow"
        else:
            said = self.world.resize(target, size_bytes)
        if said:
            self.history.append(f"      {said}")
        self._counted.forget(targets=[target])

    def do_plug(self, target: str, kind: str, size_bytes: int) -> None:
        self.world.plug(target, Kind[kind], size_bytes)

    def do_unplug(self, target: str) -> None:
        """A disk goes. One that stands on an overlay is missed by every run until it is back."""
        overlay = self.world.overlays().get(target)
        if overlay is None:
            self.world.unplug(target)
            self._counted.forget(targets=[target])
            return
        cut = self.world.cut()
        disk = self.world.detach(target)
        # Of a guest that is off, the disk's overlay is committed all the same: nobody uses it meanwhile.
        settled = EXIT_OK if not self.world.running else NeedsAttention.exit_code
        self._assert_asks(GuestUnfit.exit_code if cut else settled)
        if target not in self.world.overlays() and not self.world.journal.open_runs():
            self.world.attach(target, str(disk.path), disk.image_format, disk)
            self._counted.forget()
            return
        self.world.attach(target, overlay, "qcow2", disk)
        if self.world.journal.open_runs():  # settle has brought the others back
            self._recover()
            self._counted.forget()
            assert not self.world.overlays()

    def do_replace(self, target: str, kind: str) -> None:
        """Another disk is in the place of one. Where that one stood on an overlay, it comes back."""
        size_bytes = self.world.guest.model(target).size_bytes
        if target in self.world.overlays():
            self.do_unplug(target)
            return
        self.world.unplug(target)
        self.world.plug(target, Kind[kind], size_bytes)
        self._counted.forget(targets=[target])

    def do_swap_image(self, target: str, seed: int) -> None:
        self.world.swap_image(target, random.Random(seed))
        self._counted.forget(targets=[target])

    def do_put_theirs_on(self, targets: tuple[str, ...], metadata: bool) -> None:
        self.world.put_theirs_on(targets, metadata=metadata)
        self._counted.forget(method=Method.BITMAP, targets=targets)

    def do_commit_theirs(self, writes: tuple[Any, ...]) -> None:
        self._counted.forget(method=Method.BITMAP, targets=list(self.world.foreign))
        self.world.commit_theirs(lambda: self.world.write(writes))
        self.world.assert_disks()

    # --- steps of stillframe --------------------------------------------------------------------

    def do_back_up(self, where: str, method: str, exclude: str, seed: int, whole: bool) -> None:
        wished = Method(method)
        refused = refusal(self.world, wished, exclude)
        by = resolved(self.world, wished, exclude)
        more = ["--full-read-every", "1ms"] if whole else []
        ended = self._run([*self._capture_words(where, wished, exclude), *more], seed)
        self._note(ended)
        if refused is not None:
            assert ended.code == refused.exit_code, self._said(ended)
            assert not self._new_snapshots(where)
            return
        assert ended.code in (EXIT_OK, EXIT_FELL_BACK), self._said(ended)
        self._assert_result(where, by, ended, exclude)

    def do_back_up_struck(
        self, where: str, method: str, exclude: str, seed: int, victim: str, at: int, then: str
    ) -> None:
        """A run under which something is killed. What it made durable is right; `recover` does the rest."""
        refused = refusal(self.world, Method(method), exclude)
        kept = sorted(self.world.guest.disks)
        ended = self._run(self._capture_words(where, Method(method), exclude), seed, victim, at)
        self._note(ended)
        struck = self._struck
        if refused is not None and ended.code != -9:
            assert ended.code == refused.exit_code or (struck and ended.code in _FAILED), self._said(ended)
        else:
            self._assert_struck(ended, victim)
        self._after_strike(ended, then if struck else "")
        self._counted.forget()
        self._keep_new(where, {target: self._moment[target] for target in kept if target != exclude})
        if ended.code in (EXIT_OK, EXIT_FELL_BACK) and where != "mirror":
            assert ended.guest["snapshot"] in self.world.moments[where]

    def do_settle(self, seed: int) -> None:
        overlays = self.world.overlays()
        asks, cut = bool(self.world.theirs_on_top() & set(overlays)), self.world.cut()
        ended = self._run(["settle", self.world.guest.name], seed)
        self._note(ended)
        if asks or cut:
            assert ended.code == (NeedsAttention if asks else GuestUnfit).exit_code, self._said(ended)
            return
        assert ended.code == EXIT_OK, self._said(ended)
        assert not self.world.overlays()
        if overlays:
            self._counted.forget()
        self.world.assert_disks()

    def do_settle_struck(self, seed: int, victim: str, at: int, then: str) -> None:
        ended = self._run(["settle", self.world.guest.name], seed, victim, at)
        self._note(ended)
        self._assert_struck(ended, victim)
        self._after_strike(ended, then if self._struck else "")
        self._counted.forget()

    def do_recover(self) -> None:
        self._recover()

    def do_forget(self, where: str, number: int, prune: bool) -> None:
        """A snapshot is dropped; the next one is built upon the newest that is left."""
        repo, moments = self.world.repos[where], self.world.moments[where]
        snapshot = list(moments)[number]
        assert repo.call("forget", snapshot).returncode == 0
        if prune:
            done = repo.call("prune")
            assert done.returncode == 0, done.stdout + done.stderr
        if number == len(moments) - 1:
            self._counted.forget(where=where)
        moments.pop(snapshot)

    # --- running a command ----------------------------------------------------------------------

    def _capture_words(self, where: str, method: Method, exclude: str) -> list[str]:
        name = self.world.guest.name
        what = ["mirror", name, str(self.world.place.destination)] if where == "mirror" else ["backup", name]
        return [*what, "--method", method.value, "--quiesce", "none", "--min-free", "32M",
                "--overlay-dir", str(self.world.place.overlays), *(["--exclude", exclude] if exclude else []),
                *([] if where == "mirror" else ["--repo", str(self.world.repos[where].path)])]

    def _run(self, words: Sequence[str], seed: int, victim: str = "", at: int = -1) -> Ended:
        """Run a command, the guest writing at some of its steps; at step *at*, *victim* is killed."""
        self._moment = self.world.moment()
        self._struck = ""

        def at_step(command: Command, number: int, state: str, phase: str) -> None:
            if (state, phase) in _MOMENTS:
                remove(self._moment)
                self._moment = self.world.moment()
            if number == at and victim:
                self._struck = f"{victim} struck at {state}-{phase}"
                self._strike(command, victim)
                return
            chance = random.Random(f"{seed}-{number}")
            if chance.random() < _WRITES_AT_A_STEP and self.world.can_write():
                writes = some_writes(self.world, chance, discards=False)
                self.world.write(writes)
                self.history.append(f"      at {state}-{phase} the guest writes {writes}")

        repo = next(iter(self.world.repos.values()))
        done = Command(
            [*words, "--json", "--state-dir", str(self.world.place.state_dir)], repo.environment(), at_step,
            self._mutation).end()
        if self._struck:
            self.history.append(f"      {self._struck}")
        return done

    def _strike(self, command: Command, victim: str) -> None:
        if victim == "tool":
            command.kill()
        elif victim == "interrupt":
            command.interrupt()
        elif victim == "libvirtd":
            self.world.restart_libvirtd("kill")
        elif self.world.guest.daemons.qemu_pid(self.world.guest.name):
            self.world.end("kill")

    def _assert_struck(self, ended: Ended, victim: str) -> None:
        good = {EXIT_OK, EXIT_FELL_BACK}
        if self._struck and victim == "tool":
            good = {-9}
        elif self._struck and victim == "interrupt":
            good |= {Interrupted.exit_code}
        elif self._struck:
            good |= set(_FAILED) | {NeedsAttention.exit_code}
        assert ended.code in good, self._said(ended)

    def _after_strike(self, ended: Ended, then: str) -> None:
        """Do what came on top of it, and recover; a run that was not killed must have left nothing to do."""
        if ended.code in (-9, NeedsAttention.exit_code):
            if then == "write" and self.world.can_write():
                writes = some_writes(self.world, random.Random(len(self.history)), discards=False)
                self.world.write(writes)
                self.history.append(f"      then the guest writes {writes}")
            elif then == "qemu" and self.world.running:
                self.world.end("kill")
            elif then == "libvirtd":
                self.world.restart_libvirtd("kill")
            self._recover()
        self.world.running = self.world.guest.running()
        self.world.assert_nothing_left()
        self.world.assert_disks()

    def _recover(self) -> None:
        moment = self._moment
        ended = self._run(["recover", self.world.guest.name], len(self.history))
        remove(self._moment)
        self._moment = moment
        self._note(ended)
        if ended.code == NeedsAttention.exit_code and "--repair-status" in ended.out:
            # libvirt's live view is wrong for ever (docs/CAPTURE.md): the documented repair, and again.
            self.history.append("      libvirt's status file is repaired")
            self.world.guest.daemons.stop()
            repaired = self._run(["recover", "--repair-status", self.world.guest.name], 0)
            assert repaired.code == EXIT_OK, self._said(repaired)
            self.world.guest.daemons.start()
            ended = self._run(["recover", self.world.guest.name], 0)
        assert ended.code == EXIT_OK, self._said(ended)

    def _assert_asks(self, settling: int) -> None:
        """No run begins, and settle asks, is refused, or brings all back: it ends with *settling*."""
        running = NeedsAttention if self.world.running else GuestUnfit
        words = self._capture_words("one", Method.AUTO, "")
        for each, code in ((words, running.exit_code), (["settle", self.world.guest.name], settling)):
            ended = self._run(each, 0)
            self._note(ended)
            assert ended.code == code, self._said(ended)

    # --- comparing ------------------------------------------------------------------------------

    def _assert_result(self, where: str, by: Method, ended: Ended, exclude: str) -> None:
        guest, disks = ended.guest, ended.guest["disks"]
        assert {disk["target"] for disk in disks} == set(self._moment) - {exclude}
        assert {disk["method"] for disk in disks} == {by.value}
        for disk in disks:
            target = disk["target"]
            assert disk["audit_differs_at_bytes"] is None, f"{target}: {disk}"
            # A backup says whether a disk fell back, and why in its note; a mirror says why.
            fell_back = disk["fell_back"]
            assert fell_back is not True or disk["note"], f"{target} was read whole for no reason"
            if self._counted.must(where, target, by):
                assert not fell_back, f"{target} had to be read by its changes: {disk}"
        assert guest["fell_back"] is any(bool(disk["fell_back"]) for disk in disks)
        assert ended.code == (EXIT_FELL_BACK if guest["fell_back"] else EXIT_OK)
        self._counted.ran(where, by, disks, keepers(self.world, exclude))
        moment = {disk["target"]: self._moment[disk["target"]] for disk in disks}
        if where == "mirror":
            self.world.mirrored = [moment]
            self._assert_mirror()
        else:
            assert self._keep_new(where, moment) == [guest["snapshot"]]

    def _keep_new(self, where: str, moment: Moment) -> list[str]:
        """Compare what is new in a destination with the moment of the run; return the new snapshots."""
        if where == "mirror":
            self.world.mirrored.append(moment)
            self._assert_mirror()
            return []
        new = self._new_snapshots(where)
        assert len(new) <= 1
        for snapshot in new:
            self.world.repos[where].assert_restores(snapshot, moment, self.world.folder)
            self.world.moments.setdefault(where, {})[snapshot] = moment
        return new

    def _new_snapshots(self, where: str) -> list[str]:
        if where == "mirror":
            return []
        listed = [each["id"] for each in self.world.repos[where].json("list")["snapshots"]]
        return [each for each in listed if each not in self.world.moments.get(where, {})]

    def _assert_mirror(self) -> None:
        """The mirror is the last one that was durable, or that of a run that was struck: never a mixture."""
        world = self.world
        folder = world.place.mirror(world.guest)
        if len(world.mirrored) == 1 and not (folder / "mirror.json").exists():
            world.mirrored.clear()  # the first run of all was struck
            return
        wrong = []
        for moment in reversed(world.mirrored):
            try:
                for target, path in moment.items():
                    assert_equal_images(folder / f"{target}.img", path)
            except (ImagesDiffer, FileNotFoundError) as error:
                wrong.append(str(error))
            else:
                world.mirrored = [moment]
                return
        raise AssertionError(f"the mirror is of no moment that it may be of: {wrong}")

    def _note(self, ended: Ended) -> None:
        words = []
        for each in ended.body.get("guests", ()) if ended.out.strip() else ():
            notes = {disk["target"]: disk["note"] for disk in each.get("disks", ()) if disk.get("note")}
            words.append(json.dumps(notes) if "disks" in each else str(each.get("did") or ""))
            words.append(each.get("error", {}).get("message", ""))
        self.history.append(f"      ended with {ended.code} after {len(ended.steps)} steps "
                            + " ".join(word for word in words if word))

    def _said(self, ended: Ended) -> str:
        return f"ended with {ended.code}: {ended.out}{ended.err}"
