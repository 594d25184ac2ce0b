"""Mirrors on real servers: changed ranges alone move; who dies anywhere leaves the old or the new one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from lab import forked
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB, assert_equal_images
from lab.proxy import CuttingProxy
from lab.smb import SHARE
from lab.waiting import PATIENCE_S, wait_for
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.errors import ApplyFailed, DestinationBusy, StorageError, StorageRefused
from stillframe.mirror.far_files import FarFiles
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import FarPlace, MirrorPlace
from stillframe.mirror.record import CaptureFacts, FolderState
from stillframe.mirror.update import CopyResult
from stillframe.storage.access import NOBODY, Access
from tests.contract.drivers import Servers
from tests.fault.harness import Place, overlays_left
from tests.unit.mirror_model import BLOCK, UNIT, Disks, stage

MakeGuest = Callable[..., DiskGuest]
CLOCK = SystemClock()
_SIZE_BYTES = 24 * MIB


@dataclass(frozen=True)
class Far:
    """A folder on a server: its address, who may write there, and where it is on this host's disk."""

    address: Callable[[int], str]
    port: int
    access: Access
    root: Path
    settings: dict[str, str] = field(default_factory=dict)

    def place(self, name: str, port: int = 0) -> FarPlace:
        head, question, tail = self.address(port or self.port).partition("?")
        return FarPlace(f"{head}/{name}{question}{tail}", self.access, CLOCK)


def _sftp(servers: Servers, _folder: Path) -> Far:
    place = servers.sftp.place(servers.unused)
    Path(place.path).mkdir(parents=True)

    def address(port: int) -> str:
        query = urlencode({"identity": place.identity, "known_hosts": servers.sftp.known_hosts_for(port)})
        return f"sftp://{place.user}@{place.host}:{port}{place.path}?{query}"

    return Far(address, place.port, NOBODY, Path(place.path))


def _smb(servers: Servers, folder: Path) -> Far:
    place, access = servers.smb.place(servers.unused), servers.smb.access
    root = servers.smb.share / place.folder
    root.mkdir()
    credentials = folder / "credentials"
    credentials.write_text(f"username={access.user}\npassword={access.secret}\n")
    credentials.chmod(0o600)
    return Far(lambda port: f"smb://{place.host}:{port}/{SHARE}/{place.folder}", place.port, access, root,
               {"STILLFRAME_CREDENTIALS_FILE": str(credentials)})


@pytest.fixture(params=[_sftp, _smb], ids=["sftp", "smb"])
def far(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Far:
    made: Far = request.param(servers, tmp_path)
    return made


def _qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", *words, str(path)], check=True, capture_output=True)


def _mirror(place: MirrorPlace, disk: Path, label: str, *, verify: bool = False) -> CopyResult:
    folder = MirrorFolder(place, clock=CLOCK)
    with folder.lock("test"):
        folder.recover()
        update = folder.begin("guest", "uuid")
        with open_reader(file_place(str(disk), "raw"), clock=CLOCK) as reader:
            result = update.copy_disk("vda", reader, source="disk", verify_destination=verify)
        update.publish(CaptureFacts(label, "crash", f"<domain>{label}</domain>"))
        update.finish()
    assert folder.inspect().state is FolderState.WHOLE
    return result


def test_only_what_changed_moves(far: Far, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, _SIZE_BYTES)
    _qemu_io(disk, "write -P 1 0 6M", "write -P 2 9000k 700k", "write -P 3 20M 1M")
    image = far.root / "Guest" / "vda.img"
    assert _mirror(far.place("Guest"), disk, "1").first_copy
    assert image.read_bytes() == disk.read_bytes()
    assert image.stat().st_blocks * 512 < 10 * MIB  # a new image is sparse

    _qemu_io(disk, "write -P 9 512k 64k", "write -z 9000k 192k", "write -P 4 15M 10k")
    place = far.place("Guest")
    second = _mirror(place, disk, "2")
    assert image.read_bytes() == disk.read_bytes()
    assert second.fell_back == ""
    assert second.destination_read_bytes == 0
    # Each changed block as a redo file, and into the image; what the redo file says is read twice.
    changed = second.changed_bytes
    assert 0 < changed <= 8 * 64 * KIB
    assert changed <= place.files.moved.written_bytes <= 2 * changed + 256 * KIB
    assert place.files.moved.read_bytes <= 4 * changed + 512 * KIB

    os.truncate(disk, _SIZE_BYTES + 5 * MIB + 512)
    assert _mirror(far.place("Guest"), disk, "3", verify=True).healed_blocks == 0
    assert image.read_bytes() == disk.read_bytes()
    with image.open("r+b") as file:
        file.write(b"written by somebody else")
    os.utime(image, (1, 1))
    assert _mirror(far.place("Guest"), disk, "4").fell_back
    assert image.read_bytes() == disk.read_bytes()


class DyingFiles(FarFiles):
    """Files of a process that is killed in its *dies_at*-th call that changes something."""

    dies_at = 0
    changes = 0

    def _step(self) -> None:
        self.changes += 1
        if self.dies_at and self.changes >= self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        self._step()
        super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._step()
        super().fsync(fd)

    def rename(self, old: str, new: str) -> None:
        self._step()
        super().rename(old, new)

    def unlink(self, name: str) -> None:
        self._step()
        super().unlink(name)

    def set_mtime(self, name: str, mtime_ns: int) -> None:
        self._step()
        super().set_mtime(name, mtime_ns)


class DyingPlace(FarPlace):
    """A place with such files, for the small disks of the model."""

    threads = 1

    @classmethod
    def at(cls, far: Far, dies_at: int) -> DyingPlace:
        head, question, tail = far.address(far.port).partition("?")
        made = cls(f"{head}/guest{question}{tail}", far.access, CLOCK)
        made.files = DyingFiles(made._server, CLOCK)
        made.files.dies_at = dies_at
        made.make()
        return made


def _run(place: DyingPlace, disks: Disks, label: str) -> None:
    folder = MirrorFolder(place, clock=CLOCK)
    folder.recover()
    update = folder.begin("guest", "uuid-1")
    update.block_size_bytes, update.data_unit_bytes, update.threads = BLOCK, UNIT, 1
    stage(update, disks, random.Random(1))
    update.publish(CaptureFacts(label, "crash", f"<domain>{label}</domain>"))
    update.finish()


def _is_whole(folder: MirrorFolder) -> bool:
    return folder.inspect().state is FolderState.WHOLE


def _held(far: Far) -> Disks:
    return {path.stem: path.read_bytes() for path in (far.root / "guest").glob("*.img")}


def test_a_killed_process_leaves_old_or_new(far: Far) -> None:
    """The crash suite of the model against the real server: killed at every fifth change of one update."""
    old = {"vda": b"a" * BLOCK * 6, "vdb": b"b" * BLOCK * 3}
    new = {"vda": b"a" * BLOCK * 2 + bytes(BLOCK) + b"c" * BLOCK * 4, "vdc": b"d" * BLOCK}
    counting = DyingPlace.at(far, 0)
    _run(counting, old, "old")
    assert isinstance(counting.files, DyingFiles)
    counting.files.changes = 0
    _run(counting, new, "new")
    assert _held(far) == new
    seen = set()
    changes = counting.files.changes
    for at in (*range(1, changes, 5), changes):
        _run(counting, old, "old")
        child = os.fork()
        if not child:
            try:
                _run(DyingPlace.at(far, at), new, "new")
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        folder = MirrorFolder(counting, clock=CLOCK)
        assert not folder.recover().damaged
        # Samba keeps what was removed until it has seen that the other connection is gone.
        wait_for("the mirror is whole", partial(_is_whole, folder), PATIENCE_S)
        found = folder.inspect()
        assert found.record is not None
        seen.add(found.record.captured_at)
        assert _held(far) == (new if found.record.captured_at == "new" else old), at
    assert seen == {"old", "new"}


def test_a_cut_connection_leaves_old_or_new(far: Far, tmp_path: Path) -> None:
    disks = []
    for number in (1, 2):
        disk = tmp_path / f"disk{number}"
        disk.write_bytes(bytes([number]) * 3 * MIB + random.Random(number).randbytes(2 * MIB))
        disks.append(disk)
    image = far.root / "Guest" / "vda.img"
    cut = 0
    for seed in range(4):
        _mirror(far.place("Guest"), disks[0], "old")
        with CuttingProxy(far.port, 64 * KIB, 24 * MIB, seed) as proxy:
            try:
                _mirror(far.place("Guest", proxy.port), disks[1], "new")
            except (StorageError, ApplyFailed, DestinationBusy):
                cut += 1
            # This process lives on, and so would its lock; the process of a command is gone then.
            (far.root / "Guest" / ".stillframe.lock.held").unlink(missing_ok=True)
            folder = MirrorFolder(far.place("Guest"), clock=CLOCK)
            with folder.lock("look"):
                assert not folder.recover().damaged
            found = folder.inspect()
            assert found.record is not None
            assert image.read_bytes() == disks[found.record.captured_at == "new"].read_bytes()
    assert cut > 0


def test_one_writer_at_a_time(far: Far) -> None:
    folder = MirrorFolder(far.place("Guest"), clock=CLOCK)
    held = far.root / "Guest" / ".stillframe.lock.held"
    with folder.lock("first"):
        with pytest.raises(DestinationBusy, match="first"), _second(far):
            pass
        text = held.read_text()
    assert not held.exists()
    dead = text.replace(f"pid {os.getpid()}", "pid 4194303")
    held.write_text(dead)  # of a process of this host that is gone
    with _second(far):
        assert f"pid {os.getpid()}" in held.read_text()
    held.write_text(dead.replace("host ", "host elsewhere-"))
    with pytest.raises(DestinationBusy, match="elsewhere"), _second(far):
        pass


def _second(far: Far) -> AbstractContextManager[None]:
    return MirrorFolder(far.place("Guest"), clock=CLOCK).lock("second")


def _line(place: Place, *words: str) -> list[str]:
    return [sys.executable, "-m", "stillframe", *words, "--state-dir", str(place.state_dir), "--json"]


def _command(far: Far, place: Place, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(_line(place, *words), env={**os.environ, **far.settings},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _called(far: Far, place: Place, *words: str) -> dict[str, Any]:
    done = forked.run(_line(place, *words), timeout_s=PATIENCE_S, env={**os.environ, **far.settings})
    assert done.returncode in (0, 3), done.stdout + done.stderr
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def test_a_guest_is_mirrored_to_a_server(disk_guest: MakeGuest, far: Far, place: Place) -> None:
    """By the command: a first copy, changes, a tool that is killed, recover and status by the address."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    address = far.address(far.port)
    words = ("mirror", guest.name, address, "--quiesce=none", f"--overlay-dir={place.overlays}")
    image = far.root / guest.name / "vda.img"
    moment = image
    for number in (1, 2):
        guest.write("vda", number * MIB, 3 * MIB, 0xA0 + number)
        guest.write_zeroes("vda", 8 * MIB, 200 * KIB)
        guest.flush()
        moment = guest.model("vda").copy_at_moment()
        told = _called(far, place, *words)["guests"][0]
        assert told["disks"][0]["first_copy"] is (number == 1)
        assert_equal_images(image, moment)

    guest.write("vda", 12 * MIB, 4 * MIB, 0xC1)
    guest.flush()
    with _command(far, place, *words, "--limit-rate=1M") as process:
        wait_for("it writes there", (far.root / guest.name / "vda.redo").exists, PATIENCE_S)
        process.send_signal(signal.SIGKILL)
    assert_equal_images(image, moment)
    _called(far, place, "recover", guest.name)
    assert not overlays_left(place)
    assert not list((far.root / guest.name).glob("*.redo"))
    shown = _called(far, place, "status")["mirrors"]
    assert [(each["guest"], each["state"]) for each in shown] == [(guest.name, FolderState.WHOLE.value)]
    assert shown[0]["folder"].startswith(address.partition("?")[0])
    moment = guest.model("vda").copy_at_moment()
    _called(far, place, *words)
    assert_equal_images(image, moment)


def test_a_server_that_refuses_is_said_so(disk_guest: MakeGuest, far: Far, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    address = far.address(far.port)
    if address.startswith("sftp"):
        address = address.partition("&known_hosts=")[0] + "&known_hosts=/dev/null"
    with _command(far, place, "mirror", guest.name, address, "--quiesce=none",
                  f"--overlay-dir={place.overlays}", "--credentials-file=/dev/null") as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == StorageRefused.exit_code, out + err
    assert not overlays_left(place)

