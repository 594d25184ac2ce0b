"""Run a command on a machine of its own: this one's files, but Debian's kernel, which has device-mapper.

    python -m lab.machine -- COMMAND...

The machine is a guest, emulated by QEMU. Its root is this machine's, read through virtiofs; what COMMAND
writes goes into the guest's memory and is gone at the end. The output is shown as it comes, and the exit
code is that of COMMAND.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.initramfs import MACHINE, Boot, boot_files
from lab.waiting import PATIENCE_S, wait_for

_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"  # Debian 12: in qemu-system-common
_MEMORY = "3G"
_EXIT = re.compile(rb"^stillframe-exit (\d+)\s*$")
_LOST = 125  # the machine ended before the command did
# In the machine: no cache of the host's is written to, since somebody else may change it at the same time.
_SCRIPT = """\
export PATH={path} PYTHONPATH={python_path} XDG_CACHE_HOME=/var/tmp/cache NO_COLOR=1 TERM=dumb
ip link set lo up
cd {folder}
{command}
echo; echo "stillframe-exit $?"
busybox poweroff -f
"""


def main(arguments: Sequence[str]) -> int:
    """Boot the machine, run the command behind ``--`` there, and return its exit code."""
    if len(arguments) < 2 or arguments[0] != "--":
        print("usage: python -m lab.machine -- COMMAND...", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="stillframe-machine.", dir="/var/tmp") as place:
        folder = Path(place)
        script = folder / "command"
        script.write_text(_SCRIPT.format(
            path=shlex.quote(os.environ["PATH"]), python_path=shlex.quote(os.environ.get("PYTHONPATH", "")),
            folder=shlex.quote(str(Path.cwd())), command=shlex.join(arguments[1:])))
        socket = folder / "root.socket"
        with (folder / "virtiofsd.log").open("wb") as log:
            files = _start([_VIRTIOFSD, f"--socket-path={socket}", "-o", "source=/", "-o", "sandbox=chroot",
                            "-o", "cache=always"], stdout=log, stderr=log)
        try:
            wait_for("virtiofsd listens", socket.exists, PATIENCE_S)
            return _run(boot_files(MACHINE), socket, script)
        finally:
            files.kill()
            files.wait()


def _run(boot: Boot, socket: Path, script: Path) -> int:
    machine = _start([
        "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35",
        "-cpu", "max", "-accel", "tcg,thread=multi", "-smp", str(min(4, os.cpu_count() or 1)),
        "-m", _MEMORY, "-object", f"memory-backend-memfd,id=memory,size={_MEMORY},share=on",
        "-numa", "node,memdev=memory", "-chardev", f"socket,id=root,path={socket}",
        "-device", "vhost-user-fs-pci,chardev=root,tag=host", "-serial", "stdio",
        "-kernel", str(boot.kernel), "-initrd", str(boot.initrd),
        "-append", f"console=ttyS0 panic=1 quiet stillframe.command={script}",
    ], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    code = _LOST
    try:
        assert machine.stdout is not None
        for line in machine.stdout:
            ended = _EXIT.match(line)
            if ended:
                code = int(ended[1])
            else:
                sys.stdout.buffer.write(line.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
    finally:
        machine.kill()
        machine.wait()
    return code


def _start(command: list[str], **streams: object) -> subprocess.Popen[bytes]:
    # The kernel ends it if this process dies.
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], **streams)  # type: ignore[call-overload, no-any-return]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
