"""The one door to other programs.

Every program is started with an argument list (never through a shell), in the C
locale, with a deadline, and with its output bounded. Long-lived helpers are
started so that the kernel ends them when stillframe dies (``setpriv --pdeathsig``):
a qemu-nbd left behind would hold a lock on the image it reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillframe.errors import ProgramFailed, ProgramMissing, ProgramTimedOut

_OUTPUT_LIMIT_BYTES = 64 * 1024 * 1024
_STOP_TIMEOUT_S = 5.0

#: A long-lived program, as running() gives it: for the types of those who take one.
Helper = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Output:
    """What a finished program left: its exit code and both its streams as text."""

    code: int
    stdout: str
    stderr: str


def run(
    command: Sequence[str], *, timeout_s: float, accept: Sequence[int] = (0,), stdin: str = ""
) -> Output:
    """Run *command* to its end and return what it printed.

    Raises ProgramMissing, ProgramTimedOut (the program was killed), or
    ProgramFailed when its exit code is not in *accept*.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, timeout=timeout_s, input=stdin.encode(),
            check=False, env=_environment({}), start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ProgramMissing(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise ProgramTimedOut(" ".join(command), timeout_s) from error
    output = Output(
        done.returncode,
        done.stdout[:_OUTPUT_LIMIT_BYTES].decode(errors="replace"),
        done.stderr[:_OUTPUT_LIMIT_BYTES].decode(errors="replace"),
    )
    if done.returncode not in accept:
        raise ProgramFailed(" ".join(command), done.returncode, output.stderr.strip()[-2000:])
    return output


@contextlib.contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, told: bytes | None = None,
    output: int = subprocess.PIPE, passing: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Keep *command* running for the length of the block, then end it.

    It dies with stillframe even if stillframe is killed. What it is *told* it reads from its standard
    input: the way for what others must not see. Its output can be read from `stdout`, or goes
    into the file open as *output*. It has the descriptors that are *passing*, too, under the same numbers.
    Raises ProgramMissing.
    """
    # Not SIGTERM: a server that is busy answers it late, and holds its locks meanwhile.
    process = _start(["setpriv", "--pdeathsig", "KILL", *command], environment or {},
                     subprocess.DEVNULL if told is None else subprocess.PIPE, output, passing)
    _tell(process, told)
    try:
        yield process
    finally:
        stop(process)


def own_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of stillframe's in a process of its own."""
    # -P: no module of the folder that somebody happens to be in.
    return [sys.executable, "-P", "-m", module, *arguments]


def start_detached(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, told: bytes | None = None,
    output: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start *command* in a session of its own, so that it outlives stillframe.

    Its standard input is a pipe: end of file there tells it that stillframe died, or, if it is *told*
    something, that this was all. *environment*, *told* and *output* are as for `running`.
    Raises ProgramMissing.
    """
    process = _start(command, environment or {}, subprocess.PIPE, output)
    _tell(process, told)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """End *process*: SIGTERM, then SIGKILL after five seconds; always reaped on return."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End *process*, as `stop` does, and all that it has started, but for what left its process group."""
    # Every program here is started with a session, and so a group, of its own.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    stop(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def is_alive(pid: int, started: str) -> bool:
    """Return whether process *pid* is the one that began at *started* (see start_mark)."""
    return bool(started) and start_mark(pid) == started


def start_mark(pid: int) -> str:
    """Return a text that tells process *pid* from any other that had or will have its number.

    It is the boot's ID and the start time in clock ticks; empty when there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    # Field 3 (first after the name) is the state; a zombie holds nothing any more.
    return "" if fields[0] in "ZX" else f"{boot_id()}:{fields[19]}"


def owner_of(pid: int) -> tuple[int, int] | None:
    """Return the user and the group that process *pid* acts as, None if it is gone."""
    # Not the owner of /proc/PID: that is root for a process that changed its user.
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return None
    return int(lines["Uid"].split()[1]), int(lines["Gid"].split()[1])


def process_space() -> str:
    """Return a text that is the same for processes that can see one another by number.

    It is the boot's ID and the namespace of process numbers: a container has one of its own.
    """
    return f"{boot_id()}:{os.stat('/proc/self/ns/pid').st_ino}"


def machine_id() -> str:
    """Return what tells this machine from others over all its boots, "" if it has nothing like that."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def boot_id() -> str:
    """Return a text that tells this boot of the machine from any other."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _start(
    command: Sequence[str], environment: Mapping[str, str], stdin: int, output: int,
    passing: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(command), stdin=stdin, stdout=output, stderr=subprocess.STDOUT,
            env=_environment(environment), start_new_session=True, pass_fds=tuple(passing),
        )
    except FileNotFoundError as error:
        raise ProgramMissing(command[0]) from error


def _tell(process: subprocess.Popen[bytes], told: bytes | None) -> None:
    if told is not None and process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it ended; its output says why
            process.stdin.write(told)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", **extra}
