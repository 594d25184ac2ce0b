"""Share one test run among labs side by side, each with a libvirtd of its own.

    python -m lab.share COUNT LOG-FOLDER [PYTEST-ARGUMENT...]

Every lab runs pytest over the same tests and claims each one just before it runs it, so a lab that is
done with its own takes the next, however fast it or the machine is, and every test is run once. The
first lab's output is seen as it comes; the others' follow, lab by lab, when all are done. The exit code
is the first lab's that failed.

As a pytest plugin (``-p lab.share``, in the labs) it does the claiming.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

#: In a lab that shares: the folder in which tests are claimed, and the lab's number, from 1.
CLAIMS = "STILLFRAME_LAB_CLAIMS"
NUMBER = "STILLFRAME_LAB_NUMBER"

# What may take long comes first, so that no lab begins something long when the others are done: modules that
# are marked `together`, tests with a guest, with a libvirtd. All others stay in their order behind them. A
# guest that boots Linux takes a whole core: every other lab begins with the guests that don't.
_LONG_FIXTURES = ("db_guest", "disk_guest", "session_daemons"), ("disk_guest", "db_guest", "session_daemons")
# A lab runs a part of what it collected, so that a percentage would say nothing.
_PYTEST = (sys.executable, "-m", "pytest", "-p", "lab.share", "-o", "console_output_style=classic",
           "--durations=25", "--durations-min=5")


def claim(folder: Path, test: str) -> bool:
    """Return whether *test* is the caller's to run: for the first who asks in this folder it is."""
    try:
        (folder / hashlib.sha256(test.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def long_first(tests: Sequence[pytest.Item], number: int) -> list[pytest.Item]:
    """Return the tests in the order in which lab *number* claims them."""
    order = _LONG_FIXTURES[(number - 1) % len(_LONG_FIXTURES)]

    def rank(test: pytest.Item) -> int:
        if test.get_closest_marker("together"):
            return -1
        fixtures = getattr(test, "fixturenames", ())
        return next((place for place, name in enumerate(order) if name in fixtures), len(order))

    return sorted(tests, key=rank)


def groups(tests: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Return what is claimed at once, in order: a test, or all of a module that is marked `together`.

    What such a module's tests share (a repository, libguestfs's appliance) takes longer to make than to use.
    """
    found: dict[str, list[pytest.Item]] = {}
    for test in tests:
        module = test.nodeid.partition("::")[0]
        found.setdefault(module if test.get_closest_marker("together") else test.nodeid, []).append(test)
    return found


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests that this lab gets hold of."""
    if session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop says what is to be said
    folder, ordered = Path(os.environ[CLAIMS]), long_first(session.items, int(os.environ[NUMBER]))
    mine = (test for group, tests in groups(ordered).items() if claim(folder, group) for test in tests)
    test = next(mine, None)
    while test is not None:
        # pytest wants to know the next one: what both need of fixtures is kept.
        following = next(mine, None)
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        test = following
    return True


def main(arguments: Sequence[str]) -> int:
    """Run pytest in as many labs as told; return 0 if all went well in each."""
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print("usage: python -m lab.share COUNT LOG-FOLDER [PYTEST-ARGUMENT...]", file=sys.stderr)
        return 2
    count, log_dir = int(arguments[0]), Path(arguments[1])
    log_dir.mkdir(exist_ok=True)
    logs = {number: log_dir / f"lab-{number}.log" for number in range(2, count + 1)}
    print(f"{count} labs side by side. This is lab 1; what others print follows when all are done.",
          flush=True)
    with tempfile.TemporaryDirectory(prefix="stillframe-claims.") as claims:
        codes = _run(count, logs, arguments[2:], {**os.environ, CLAIMS: claims})
    for number, log in logs.items():
        print(f"\nLab {number} ({log}):", flush=True)
        sys.stdout.buffer.write(log.read_bytes())
    print()
    for number, code in enumerate(codes, 1):
        print(f"Lab {number}: " + (f"FAILED, exit code {code}" if code else "all well"), flush=True)
    return next((code for code in codes if code), 0)


def _run(
    count: int, logs: Mapping[int, Path], arguments: Sequence[str], environment: Mapping[str, str]
) -> list[int]:
    """Run all labs to their end; return their exit codes."""
    labs: list[subprocess.Popen[bytes]] = []
    # Ctrl-C reaches the labs' commands by itself, and they end; a signal for this process is passed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _terminate(labs))
    with ExitStack() as stack:
        for number in range(1, count + 1):
            out = stack.enter_context(logs[number].open("wb")) if number in logs else None
            labs.append(subprocess.Popen(
                # However this process ends, its labs end with it.
                ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-m", "lab.enter", "--", *_PYTEST,
                 *arguments],
                stdout=out, stderr=out and subprocess.STDOUT,
                env={**environment, NUMBER: str(number)}))
        return [lab.wait() for lab in labs]


def _terminate(labs: Sequence[subprocess.Popen[bytes]]) -> None:
    for lab in labs:
        lab.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
