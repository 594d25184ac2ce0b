"""A QEMU that the test starts itself, without libvirt and without an operating system in it."""

from __future__ import annotations

import contextlib
import enum
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.disks import Disk, DiskSpec, remove_folder
from lab.enter import SOCKETS_DIR
from lab.images import to_raw
from lab.monitor import MonitorFailed, SideMonitor
from lab.waiting import PATIENCE_S, wait_for
from lab.written import WrittenDisks


class Attach(enum.Enum):
    """How a disk is given to QEMU on its command line. Each names it in another way."""

    NODE_AND_ID = "-blockdev, and a -device with an ID"
    NODE = "-blockdev with the disk's name, and a -device without an ID"
    DRIVE = "-drive with an ID, whose nodes nobody named"


class BareQemu(WrittenDisks):
    """A guest of 32 MiB. *address* names it to stillframe; *uuid* may be left out, as people do."""

    def __init__(
        self, folder: Path, name: str, disks: Sequence[DiskSpec] = (DiskSpec(),), *, uuid: str = "",
        attach: Sequence[Attach] = (Attach.NODE_AND_ID, Attach.DRIVE), options: Sequence[str] = (),
        io_thread: bool = False,
    ) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir(mode=0o755)
        super().__init__(self.folder / "qemu.log")
        self._log.touch()
        self.socket = SOCKETS_DIR / f"{name}-stillframe.qmp"
        self.address = f"qmp:{self.socket}"
        self.monitor = SideMonitor(name)
        self.disks = {spec.target: Disk(spec, self.folder, name) for spec in disks}
        self._attach = {spec.target: attach[at % len(attach)] for at, spec in enumerate(disks)}
        self._uuid = uuid
        self._options = list(options)
        self._driver = "virtio-blk-pci" + (",iothread=io" if io_thread else "")
        self._options += ["-object", "iothread,id=io"] if io_thread else []
        self._process: subprocess.Popen[bytes] | None = None
        self._devices: dict[str, str] = {}
        self._reads = 0

    @property
    def pid(self) -> int:
        """Return the process of the QEMU that was started last."""
        assert self._process is not None
        return self._process.pid

    def command(self) -> list[str]:
        """Return QEMU's command line."""
        words = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-display", "none", "-nodefaults",
                 "-m", "32", "-name", self.name, *(["-uuid", self._uuid] if self._uuid else []),
                 "-qmp", f"unix:{self.monitor.path},server=on,wait=off",
                 "-qmp", f"unix:{self.socket},server=on,wait=off", *self._options]
        for target, disk in self.disks.items():
            words += _attached(target, disk, self._attach[target], self._driver)
        return words

    def start(self) -> None:
        """Start QEMU by its command line, which names the guest's own images."""
        for path in (self.monitor.path, self.socket):
            path.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
        wait_for(f"QEMU {self.name}", self._is_up, PATIENCE_S)
        named = {str(disk.path): target for target, disk in self.disks.items()}
        for found in self.monitor.execute("query-block"):
            file = found.get("inserted", {}).get("file")
            if file in named:
                self._devices[named[file]] = found["qdev"]

    def running(self) -> bool:
        """See WrittenDisks."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End QEMU as a power cut does."""
        self._end(signal.SIGKILL)

    def quit(self) -> None:
        """End QEMU in an orderly way: it closes its images."""
        self._end(signal.SIGTERM)

    def remove(self) -> None:
        """End QEMU and delete everything that belongs to the guest."""
        self.kill()
        for disk in self.disks.values():
            disk.remove()
        remove_folder(self.folder)

    def device(self, target: str) -> str:
        """See WrittenDisks."""
        return self._devices[target]

    def top(self, target: str) -> str:
        """Return the file that QEMU writes the disk to, or the one that its command line names."""
        if not self.running():
            return str(self.disks[target].path)
        device = self._devices[target]
        found = next(each for each in self.monitor.execute("query-block") if each.get("qdev") == device)
        return str(found["inserted"]["file"])

    def read_disk(self, target: str, to: Path | None = None) -> Path:
        """See WrittenDisks. Read through the image that is in use, its chain included."""
        self._reads += 1
        top = self.top(target)
        own = self.disks[target].image_format if top == str(self.disks[target].path) else "qcow2"
        raw = to or self.folder / f"{target}.read-{self._reads}.raw"
        return to_raw(top, own, raw, shared=self.running())

    def _is_up(self) -> bool:
        assert self.running(), self._log.read_text()
        if not self.socket.exists():
            return False
        with contextlib.suppress(MonitorFailed):
            return bool(self.monitor.execute("query-status")["running"])
        return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)


def _attached(target: str, disk: Disk, how: Attach, driver: str) -> list[str]:
    device = f"{driver},drive="
    if how is Attach.DRIVE:
        drive = f"file={disk.path},format={disk.image_format},if=none,id={target},discard=unmap"
        return ["-drive", drive, "-device", f"{device}{target}"]
    node = target if how is Attach.NODE else f"{target}-node"
    protocol = "host_device" if str(disk.path).startswith("/dev/") else "file"
    words = ["-blockdev", f"driver={protocol},node-name={node}-file,filename={disk.path},discard=unmap",
             "-blockdev", f"driver={disk.image_format},node-name={node},file={node}-file,discard=unmap"]
    return [*words, "-device", f"{device}{node}" + (f",id={target}" if how is Attach.NODE_AND_ID else "")]
