"""The door to other programs, with real programs behind it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillframe import process
from stillframe.errors import ProgramFailed, ProgramMissing, ProgramTimedOut

#: Ignores SIGTERM, and says when it does.
_STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def _eventually(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_run_returns_both_streams_and_the_exit_code() -> None:
    output = process.run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=10, accept=(0, 3))
    assert output == process.Output(3, "out\n", "err\n")


def test_an_exit_code_that_is_not_accepted_is_an_error_that_quotes_the_program() -> None:
    with pytest.raises(ProgramFailed, match="no such disk") as caught:
        process.run(["sh", "-c", "echo no such disk >&2; exit 4"], timeout_s=10)
    assert caught.value.status == 4
    assert caught.value.stderr == "no such disk"


def test_success_is_an_error_too_when_it_is_not_accepted() -> None:
    with pytest.raises(ProgramFailed):
        process.run(["true"], timeout_s=10, accept=(1,))


def test_a_missing_program_is_named() -> None:
    with pytest.raises(ProgramMissing, match="no-such-program"):
        process.run(["no-such-program"], timeout_s=10)


def test_a_program_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    before = time.monotonic()
    with pytest.raises(ProgramTimedOut, match="did not end"):
        process.run(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 600"], timeout_s=2)
    assert time.monotonic() - before < 300
    assert process.start_mark(int(pid_file.read_text())) == ""


def test_words_reach_the_program_as_they_are() -> None:
    odd = "two words; $HOME `id` *"
    assert process.run(["printf", "%s", odd], timeout_s=10).stdout == odd


def test_standard_input_reaches_the_program() -> None:
    assert process.run(["cat"], timeout_s=10, stdin="zeile ä\n").stdout == "zeile ä\n"


def test_bytes_that_are_no_text_do_not_break_it() -> None:
    assert process.run(["printf", r"\377"], timeout_s=10).stdout == "\ufffd"


def test_programs_speak_the_c_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert process.run(["sh", "-c", "echo $LC_ALL"], timeout_s=10).stdout == "C\n"


@contextlib.contextmanager
def _detached(command: list[str], **options: Any) -> Iterator[process.Helper]:
    yield process.start_detached(command, **options)


def test_running_ends_the_program_with_the_block() -> None:
    with process.running(["sleep", "60"]) as child:
        assert process.start_mark(child.pid) != ""
    assert child.returncode == -signal.SIGTERM
    assert process.start_mark(child.pid) == ""


def test_running_ends_the_program_when_the_block_fails() -> None:
    with pytest.raises(RuntimeError), process.running(["sleep", "60"]) as child:
        raise RuntimeError
    assert child.returncode == -signal.SIGTERM


def test_running_passes_on_its_environment() -> None:
    with process.running(["sh", "-c", "echo $WORD"], environment={"WORD": "heard"}) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"heard\n"


@pytest.mark.parametrize("start", [process.running, _detached])
def test_a_helper_reads_what_it_is_told_and_writes_where_it_should(start: Any, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, \
            start(["cat"], told=b"the secret", output=log.fileno()) as child:
        assert child.wait(60) == 0  # at the end of file: that was all
        assert child.stdout is None
    assert (tmp_path / "log").read_bytes() == b"the secret"


def test_a_helper_has_the_descriptors_that_are_passed_to_it() -> None:
    source, sink = os.pipe()
    script = f"import os, time; os.write({sink}, b'here\\n'); time.sleep(60)"
    with process.running([sys.executable, "-c", script], passing=(sink,)):
        os.close(sink)
        assert os.read(source, 100) == b"here\n"
    assert os.read(source, 100) == b"", "somebody still has it"
    os.close(source)


def test_a_helper_that_ends_before_it_is_told_is_no_error() -> None:
    with process.running(["true"], told=bytes(1024 * 1024)) as child:
        assert child.wait(60) == 0


def test_stop_kills_what_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", 0.2)
    with process.running(["sh", "-c", _STUBBORN]) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        process.stop(child)
        assert child.returncode == -signal.SIGKILL
        assert child.stdout.closed


def test_stop_may_be_called_twice() -> None:
    with process.running(["true"]) as child:
        child.wait()
        process.stop(child)
        process.stop(child)
    assert child.returncode == 0


def test_a_helper_dies_with_a_stillframe_that_is_killed() -> None:
    source = (
        "import sys, time\n"
        "from stillframe import process\n"
        "with process.running(['sleep', '60']) as child:\n"
        "    while open(f'/proc/{child.pid}/comm').read() != 'sleep\\n':\n"
        "        time.sleep(0.01)\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        mark = process.start_mark(helper)
        assert mark != ""
        parent.kill()
    assert _eventually(lambda: not process.is_alive(helper, mark))


def test_a_detached_helper_outlives_stillframe_and_learns_of_its_end(tmp_path: Path) -> None:
    said = tmp_path / "said"
    source = (
        "import sys, time\n"
        "from stillframe import process\n"
        "script = 'echo up; cat; echo end of file > \"$0\"'\n"
        "child = process.start_detached(['sh', '-c', script, sys.argv[1]])\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source, said], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert os.getsid(helper) == helper
        assert not said.exists()
        parent.kill()
    assert _eventually(lambda: said.exists() and said.read_text() == "end of file\n")


def test_a_detached_helper_that_is_missing_is_named() -> None:
    with pytest.raises(ProgramMissing, match="no-such-program"):
        process.start_detached(["no-such-program"])


def test_a_mark_tells_processes_apart() -> None:
    with process.running(["sleep", "60"]) as child:
        mark = process.start_mark(child.pid)
        assert mark == process.start_mark(child.pid)
        assert mark != process.start_mark(os.getpid())
        assert process.is_alive(child.pid, mark)
        assert not process.is_alive(child.pid, process.start_mark(os.getpid()))
    assert not process.is_alive(child.pid, mark)


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as child:
        assert _eventually(lambda: process.start_mark(child.pid) == "")
        assert Path(f"/proc/{child.pid}").exists()


def test_a_name_with_brackets_does_not_confuse_the_mark(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z (b"
    odd.symlink_to("/usr/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as child:
        assert _eventually(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "a) Z (b\n")
        assert process.start_mark(child.pid).rpartition(":")[2].isdigit()
        child.kill()


def test_no_process_has_no_mark_and_is_never_alive() -> None:
    nobody = 2**22 + 1  # above the largest number that Linux gives
    assert process.start_mark(nobody) == ""
    assert not process.is_alive(nobody, process.start_mark(os.getpid()))


def test_an_empty_mark_is_no_process() -> None:
    assert not process.is_alive(2**22 + 1, "")
