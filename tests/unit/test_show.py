"""What the demo prints, and that a broken promise makes it fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lab.show import Show


def test_kept_promises_end_with_0_and_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show({})
    show.promise(True, "water is wet")
    assert show.verdict(["all in all"]) == 0
    assert "all in all" in capsys.readouterr().out


def test_broken_promise_ends_with_1_and_without_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    show = Show({})
    show.promise(False, "water is dry")
    show.promise(True, "water is wet")
    assert show.verdict(["all in all"]) == 1
    said = capsys.readouterr().out
    assert said.count("NOT AS PROMISED: water is dry") == 2
    assert "all in all" not in said
    assert "\033" not in said


def test_command_is_shown_with_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Show({"WORD": "one two"}).run("sh", "-c", "echo $WORD; echo three >&2; exit 3")
    assert (ran.code, ran.said) == (3, "one two\nthree\n")
    assert capsys.readouterr().out.splitlines() == [
        "   $ sh -c 'echo $WORD; echo three >&2; exit 3'", "     one two", "     three"]


def test_stillframe_is_this_checkouts() -> None:
    assert Show({}).ask("stillframe", "version").code == 0


def test_killed_command_is_gone_and_its_words_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    running = Show({}).start(sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        running.end(timeout_s=2)
    assert running.process.returncode == -9
    assert "     up\n" in capsys.readouterr().out
