"""Python commands in processes of their own that need not start Python first.

    forked.run([sys.executable, "-m", "stillframe", "status"], env=..., cwd=...)

What most of a short command's time goes into is the interpreter's start and the imports. Here a server (the
standard library's `forkserver`) has done both and forks for each command: a process with a PID,
environment, folder and output of its own, that is stopped and killed like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lab.preloaded"])


class _Inherited:
    """A file descriptor that goes to the child with the arguments."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._fd),)


def _received(duplicate: Any) -> int:
    fd: int = duplicate.detach()
    return fd


class Forked:
    """A command that runs. Its output and errors go to the given file descriptors.

    A descriptor *passing* goes to it, too: the number that it has there is the command's first word.
    """

    def __init__(
        self, command: Sequence[str], *, output: int, errors: int, env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None, passing: int | None = None,
    ) -> None:
        python, option, module, *words = command
        assert (python, option) == (sys.executable, "-m"), f"not a Python module: {command}"
        # daemon: it ends with pytest, should a test leave it behind.
        self._process = _CONTEXT.Process(target=_run, daemon=True, args=(
            module, words, dict(os.environ if env is None else env), str(cwd or os.getcwd()),
            _Inherited(output), _Inherited(errors), None if passing is None else _Inherited(passing)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end."""
        self._process.kill()
        self._process.join()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Return the exit code, negative for a signal. Raises TimeoutExpired; it is killed then."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout_s)
        return self._process.exitcode


def run(
    command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what came of it. Raises TimeoutExpired."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        running = Forked(command, output=output.fileno(), errors=errors.fileno(), env=env, cwd=cwd)
        code = running.wait(timeout_s)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, output.read(), errors.read())


def _run(
    module: str, words: Sequence[str], env: Mapping[str, str], cwd: str, output: int, errors: int,
    passed: int | None,
) -> None:
    """Become the command, in the child."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *([] if passed is None else [str(passed)]), *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
