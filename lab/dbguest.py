"""A guest with a database that is written to all the time, and that says which rows are durable.

It is Debian's cloud kernel with a small initramfs (`lab.initramfs`, `guest-init.sh`). On vda is an
ext4 file system with an SQLite database; every committed row is acknowledged on the serial console
after its commit, so whatever was acknowledged before a moment must be in a backup of that moment.
As a *counter guest* it has no file system: it writes a counter to vda, then to vdb, for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import libvirt
import libvirt_qemu

from lab.daemons import LibvirtDaemons
from lab.database import CheckResult, make_file_system
from lab.disks import Disk, DiskSpec
from lab.enter import SOCKETS_DIR
from lab.guest import Guest
from lab.images import MIB, run
from lab.initramfs import boot_files
from lab.waiting import PATIENCE_S, TooLate, wait_for

_BOOT_DIR = Path("/var/lib/libvirt/boot")
# An emulated boot is the most that many tests wait for: without what guards against others on the processor,
# self-tests of ciphers, and waiting for entropy it takes a tenth to a third less.
_CMDLINE = ("console=ttyS0 panic=1 quiet mitigations=off cryptomgr.notests random.trust_cpu=on "
            "no_timer_check audit=0")
_MEMORY_MIB = 256
_BOOT_TIMEOUT_S = 180.0
_TAIL_BYTES = 4096
_ACK = re.compile(rb"ACK (\d+)\r?\n")
_CHECK = re.compile(r"CHECK \S+ integrity=(\S+) rows=(\d+) min=(\d+) max=(\d+)")


class DbGuest(Guest):
    """A guest that writes rows (or counters) and acknowledges them; see the module's text.

    `disks` are one disk for the database, or two for *counter*; their content is made by the lab.
    There are *pause_s* between its rows; with 0 they are written as fast as the machine can. While a test
    waits for something else, a guest that takes a whole core keeps it and all other labs waiting longer.
    """

    def __init__(
        self, daemons: LibvirtDaemons, folder: Path, name: str, disks: Sequence[DiskSpec] = (),
        *, counter: bool = False, agent: bool = True, transient: bool = False, payload_bytes: int = 256,
        pause_s: float = 0.1,
    ) -> None:
        super().__init__(daemons, folder, name, transient=transient)
        self.counter = counter
        self.console_path = self.folder / "console.log"
        self._agent = agent
        self._rows = f"stillframe.payload={payload_bytes}"
        if pause_s:
            self._rows += f" stillframe.pause={pause_s}"
        self._command_numbers = itertools.count(1)
        self._boot_count = 0
        if not disks:
            disks = [DiskSpec(target, size_bytes=16 * MIB) for target in ("vda", "vdb")] if counter \
                else [DiskSpec(size_bytes=256 * MIB)]
        for spec in disks:
            self.disks[spec.target] = Disk(self._with_content(spec), self.folder, name)

    @property
    def command_socket(self) -> Path:
        """Return the host's end of the guest's command port."""
        return SOCKETS_DIR / f"{self.name}.commands"

    def _open_command_socket(self) -> Path:
        """Return the command port's socket: for a restored guest libvirt chose its path."""
        if self.command_socket.exists():
            return self.command_socket
        channels = ET.fromstring(self.domain().XMLDesc()).iterfind("devices/channel")
        sources = (each.find("source") for each in channels
                   if each.find("target[@name='stillframe.lab.0']") is not None)
        return next(Path(source.get("path", "")) for source in sources if source is not None)

    def xml(self) -> str:
        """See Guest."""
        kernel, initrd = _boot_in_reach()
        mode = "stillframe.counter=1" if self.counter else self._rows
        agent = ("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
                 if self._agent else "")
        return (
            f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"<name>{self.name}</name><memory unit='MiB'>{_MEMORY_MIB}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel>"
            f"<initrd>{initrd}</initrd><cmdline>{_CMDLINE} {mode}</cmdline></os>"
            f"<features><acpi/></features><cpu mode='custom'><model>qemu64</model></cpu>"
            f"<on_crash>destroy</on_crash>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>"
            f"<controller type='usb' model='none'/><memballoon model='none'/>"
            f"{''.join(disk.xml() for disk in self.disks.values())}"
            f"<serial type='file'><source path='{self.console_path}' append='on'/><target port='0'/></serial>"
            f"{agent}<channel type='unix'><source mode='bind' path='{self.command_socket}'/>"
            f"<target type='virtio' name='stillframe.lab.0'/></channel>"
            f"</devices>{self.monitor.commandline_xml()}</domain>"
        )

    def console(self) -> str:
        """Return everything that the guest printed so far, over all its boots."""
        if not self.console_path.exists():
            return ""
        return self.console_path.read_text(errors="replace")

    def acknowledged(self) -> int:
        """Return the last row (or counter) that the guest said is durable, 0 when none."""
        with contextlib.suppress(FileNotFoundError), self.console_path.open("rb") as file:
            size = file.seek(0, 2)
            # Kernel messages between two rows may be longer than a tail: then the whole is looked at.
            for begin in (max(0, size - _TAIL_BYTES), 0):
                file.seek(begin)
                if found := _ACK.findall(file.read()):
                    return int(found[-1])
        return 0

    def wait_acknowledged(self, number: int, timeout_s: float = PATIENCE_S) -> int:
        """Wait until row *number* is acknowledged; return the last one that is."""
        wait_for(f"{self.name} acknowledges {number}", lambda: self.acknowledged() >= number, timeout_s)
        return self.acknowledged()

    def wait_more_rows(self, count: int = 1, timeout_s: float = PATIENCE_S) -> int:
        """Wait until the guest got *count* rows further from now: it runs and can write."""
        return self.wait_acknowledged(self.acknowledged() + count, timeout_s)

    def start(self) -> None:
        """See Guest."""
        self.expect_boot()
        super().start()

    def expect_boot(self) -> None:
        """Note that somebody is about to start the guest: `wait_ready` waits for that boot."""
        self._boot_count = self.console().count("READY")

    def wait_ready(self, timeout_s: float = _BOOT_TIMEOUT_S) -> None:
        """Wait until the guest that was started booted, writes, and (if it has one) its agent answers."""
        try:
            wait_for(f"{self.name} boots", lambda: self.console().count("READY") > self._boot_count,
                     timeout_s)
            self.wait_more_rows(timeout_s=timeout_s)
            if self._agent:
                wait_for(f"{self.name}'s agent answers", self.agent_answers, timeout_s)
        except TooLate as late:
            raise TooLate(f"{late}\nconsole:\n{self.console()[-2000:]}") from late

    def agent_answers(self, timeout_s: int = 5) -> bool:
        """Return whether the guest agent answers a ping."""
        try:
            self.agent_command("guest-ping", timeout_s)
        except libvirt.libvirtError:
            return False
        return True

    def agent_command(self, command: str, timeout_s: int = 30) -> object:
        """Send a command to the guest agent by libvirt and return its answer. Raises libvirtError."""
        answer = libvirt_qemu.qemuAgentCommand(self.domain(), json.dumps({"execute": command}), timeout_s, 0)
        return json.loads(answer)["return"]

    def freeze_status(self) -> str:
        """Return what the agent says: ``frozen`` or ``thawed``."""
        return str(self.agent_command("guest-fsfreeze-status"))

    def stop_agent(self) -> None:
        """Make the agent hang (SIGSTOP in the guest)."""
        self.command("AGENT-STOP")

    def continue_agent(self) -> None:
        """Let a hanging agent go on; it then does what it was sent meanwhile."""
        self.command("AGENT-CONT")

    def kill_agent(self) -> None:
        """Kill the agent in the guest for good."""
        self.command("AGENT-KILL")

    def power_off(self, timeout_s: float = PATIENCE_S) -> None:
        """Shut the guest down in an orderly way, without the agent; return when it is off."""
        self.command("POWEROFF")
        wait_for(f"{self.name} is off", lambda: not self.running(), timeout_s)

    def command(self, text: str, timeout_s: float = PATIENCE_S) -> None:
        """Have the guest's command loop carry out *text*; return when it said that it did."""
        number = f"{self._boot_count}-{next(self._command_numbers)}"
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout_s)
            link.connect(str(self._open_command_socket()))
            link.sendall(f"{number} {text}\n".encode())
            wait_for(f"{self.name} carries out {text}",
                     lambda: f"DONE {number} 0" in self.console(), timeout_s)

    def _with_content(self, spec: DiskSpec) -> DiskSpec:
        if self.counter or spec.content:
            return replace(spec, filled=False)
        content = self.folder / f"{spec.target}.content"
        make_file_system(content, spec.size_bytes)
        return replace(spec, content=content)


def read_counter(raw: Path) -> int:
    """Return the counter that a counter guest wrote into a raw image, 0 when none."""
    with raw.open("rb") as file:
        return int(file.read(512).strip(b"\0 ") or b"0")


def boot_and_check(image: Path, image_format: str, timeout_s: float = _BOOT_TIMEOUT_S) -> CheckResult:
    """Boot a guest from *image* that looks whether the database in it is whole.

    `lab.database.check_image` is the cheap way; this one shows that the image boots. The image itself is not
    written to: the guest gets an overlay that is thrown away. Works without libvirt. Raises TooLate (with
    the console) when the guest does not say anything useful in time.
    """
    boot = boot_files()
    with tempfile.TemporaryDirectory(prefix="stillframe-check.", dir="/var/tmp") as place:
        console, overlay = Path(place) / "console.log", Path(place) / "overlay.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image.resolve(), "-F", image_format, overlay)
        machine = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-machine", "q35,accel=tcg",
             "-cpu", "qemu64", "-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot",
             "-kernel", str(boot.kernel), "-initrd", str(boot.initrd),
             "-append", f"{_CMDLINE} stillframe.check=1", "-serial", f"file:{console}",
             "-drive", f"file={overlay},format=qcow2,if=virtio,cache=unsafe"],
            stdin=subprocess.DEVNULL)
        try:
            machine.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            machine.kill()
            machine.wait()
        said = console.read_text(errors="replace") if console.exists() else ""
    found = _CHECK.search(said)
    if found is None:
        raise TooLate(f"started from {image}, no report within {timeout_s:g} s:\n{said[-2000:]}")
    word, rows, first, last = found.groups()
    return CheckResult(word, int(rows), int(first), int(last))


def _boot_in_reach() -> tuple[Path, Path]:
    """Copy kernel and initramfs to where QEMU's user can read them; return their paths there."""
    boot = boot_files()
    _BOOT_DIR.mkdir(mode=0o711, exist_ok=True)
    kernel, initrd = _BOOT_DIR / boot.kernel.name, _BOOT_DIR / boot.initrd.name
    for source, place in ((boot.kernel, kernel), (boot.initrd, initrd)):
        if not place.exists():
            shutil.copy(source, place)
            place.chmod(0o644)
    return kernel, initrd
