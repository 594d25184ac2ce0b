"""The command as a user or a timer calls it, where no libvirt answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import forked
from stillframe import __version__
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.cli import main as main_module
from stillframe.cli.session import Common, Session
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_USAGE, ConfigInvalid, NeedsAttention, NoHypervisor, StateFolderUnusable
from tests.unit.capture_records import run_record

_ROOT = Path(__file__).parents[2]
_NOWHERE = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Call stillframe with a state folder of its own and no libvirt."""

    def run(*arguments: str, common: bool = True) -> subprocess.CompletedProcess[str]:
        options = ["--connect", _NOWHERE, "--state-dir", str(tmp_path / "state")] if common else []
        return forked.run([sys.executable, "-m", "stillframe", *arguments, *options], timeout_s=120,
                          cwd=tmp_path, env=environment)

    (tmp_path / "none.toml").touch()
    environment = {
        **os.environ, "PYTHONPATH": str(_ROOT / "src"), "COLUMNS": "200",
        "STILLFRAME_CONFIG": str(tmp_path / "none.toml"),
    }
    return run


def body(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The one JSON object that is all there is on standard output."""
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    error = body(done)["error"]
    assert isinstance(error, dict)
    return error


# --- Usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ("mirror",), ("mirror", "only-one"), ("mirror", "--all", "guest", "folder"), ("no-such-command",),
    ("mirror", "g", "d", "--quiesce", "softly"), ("doctor", "--no-such-option"), ("version", "extra"),
])
def test_a_call_that_makes_no_sense_shows_its_usage(call: Call, arguments: tuple[str, ...]) -> None:
    done = call(*arguments, common=False)
    assert done.returncode == EXIT_USAGE
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_no_command_shows_the_help(call: Call) -> None:
    done = call(common=False)
    assert done.returncode == EXIT_USAGE
    assert "Commands:" in done.stdout + done.stderr


def test_help_names_every_command(call: Call) -> None:
    done = call("--help", common=False)
    assert done.returncode == 0
    for command in ("mirror", "doctor", "recover", "status", "version"):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(("command", "options"), [
    ("mirror", ["--all", "--quiesce", "--overlay-dir", "--overlay-limit", "--min-free", "--exclude",
                "--verify-destination", "--freeze-timeout", "--agent-timeout", "--shutdown-timeout",
                "--commit-timeout"]),
    ("recover", ["--dry-run", "--repair-status"]), ("doctor", []), ("status", []),
])
def test_help_of_a_command_names_its_options(call: Call, command: str, options: list[str]) -> None:
    done = call(command, "--help", common=False)
    assert done.returncode == 0
    for option in (*options, "--connect", "--state-dir", "--config", "--json", "--quiet"):
        assert option in done.stdout


def test_version(call: Call) -> None:
    done = call("version", common=False)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


# --- Without libvirt --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ("doctor",), ("doctor", "g"), ("recover", "g"), ("mirror", "--all", "d"),
])
def test_without_libvirt_the_command_says_so(call: Call, arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.returncode == NoHypervisor.exit_code
    assert done.stdout == ""
    assert _NOWHERE in done.stderr
    assert "The guest was not touched." in done.stderr
    assert "Next: systemctl status libvirtd" in done.stderr
    assert "(error no-hypervisor; see docs/ERRORS.md)" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_error_as_json(call: Call) -> None:
    done = call("doctor", "--json")
    assert done.returncode == NoHypervisor.exit_code
    error = error_of(done)
    assert set(error) == {"code", "exit_code", "message", "guest", "next_command", "retry"}
    assert (error["code"], error["exit_code"]) == ("no-hypervisor", NoHypervisor.exit_code)
    assert (error["guest"], error["retry"]) == ("untouched", True)


def test_the_error_of_one_guest_among_several_as_json(call: Call) -> None:
    done = call("mirror", "a", "b", "dest", "--json")
    assert done.returncode == NoHypervisor.exit_code, "both failed alike"
    guests = body(done)["guests"]
    assert isinstance(guests, list)
    assert [(each["guest"], each["ok"], each["error"]["code"]) for each in guests] == [
        ("a", False, "no-hypervisor"), ("b", False, "no-hypervisor")]


def test_nothing_is_made_at_the_destination_without_libvirt(call: Call, tmp_path: Path) -> None:
    call("mirror", "g", "dest")
    assert not (tmp_path / "dest").exists()


def test_recover_needs_no_libvirt_where_nothing_was_left(call: Call) -> None:
    done = call("recover", "--json")
    assert done.returncode == 0
    assert body(done) == {"dry_run": False, "guests": [], "drills": [], "restores": []}
    assert "nothing was left" in call("recover").stdout


def test_a_run_that_was_left_open_makes_status_fail_and_names_it(call: Call, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", SystemClock())
    journal.begin(run_record(State.COPYING))
    journal.close()
    done = call("status")
    assert done.returncode == NeedsAttention.exit_code
    assert "stillframe recover g" in done.stdout
    runs = body(call("status", "--json"))["open_runs"]
    assert isinstance(runs, list)
    assert [(run["guest"], run["state"], run["running"]) for run in runs] == [("g", "copying", False)]


def test_recover_of_an_open_run_without_libvirt_leaves_it_open(call: Call, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state", SystemClock())
    record = journal.begin(run_record(State.COPYING))
    assert call("recover").returncode == NoHypervisor.exit_code
    assert call("recover", "--dry-run").returncode == NoHypervisor.exit_code
    assert journal.open_runs() == [record]


def test_status_without_libvirt_shows_the_journal_and_says_what_it_does_not_know(call: Call) -> None:
    done = call("status")
    assert done.returncode == NoHypervisor.exit_code
    assert "warning: which guests stand on overlays is not known" in done.stderr
    assert body(call("status", "--json"))["libvirt_error"]


# --- Files ------------------------------------------------------------------------------------


def test_a_configuration_that_is_not_valid(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_text("[defaults]\noverlay_limits = '2G'\n")
    # The options say all that status needs, and doctor would fail for lack of libvirt.
    for command in ("status", "doctor"):
        done = call(command, "--config", str(config), "--json")
        assert done.returncode == ConfigInvalid.exit_code
        assert error_of(done)["code"] == "config-invalid"
        assert "overlay_limits" in str(error_of(done)["message"])
        assert "bad.toml" in done.stderr


def test_a_configuration_that_is_not_there(call: Call, tmp_path: Path) -> None:
    done = call("doctor", "--config", str(tmp_path / "absent.toml"), common=False)
    assert done.returncode == ConfigInvalid.exit_code
    assert "absent.toml" in done.stderr


def test_a_state_folder_that_cant_be_used(call: Call, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    done = call("status", "--json")
    assert done.returncode == StateFolderUnusable.exit_code
    assert error_of(done)["code"] == "state-folder-unusable"


# --- Bugs -------------------------------------------------------------------------------------


class PanicError(BaseException):
    """As pyo3 raises it where a library in Rust panics."""


@pytest.mark.parametrize("kind", [RuntimeError, PanicError])
def test_a_bug_shows_no_traceback_but_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[BaseException],
) -> None:
    def broken() -> None:
        raise kind("a bug")

    monkeypatch.setattr(main_module, "app", broken)
    with pytest.raises(SystemExit) as caught:
        main_module.main()
    assert caught.value.code == 1
    shown = capsys.readouterr().err
    assert f"{kind.__name__}: a bug" in shown
    assert "stillframe recover" in shown
    assert "Traceback" not in shown


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    program = tmp_path / "hangs.py"
    program.write_text(
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from stillframe.cli import main\n"
        "main._LAST_WAIT_S = 0.1\n"
        "def app():\n"
        "    ThreadPoolExecutor(1).submit(threading.Event().wait)\n"
        "    print('a result')\n"
        "    sys.exit(42)\n"
        "main.app = app\n"
        "main.main()\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(_ROOT / "src")})
    assert (done.returncode, done.stdout) == (42, "a result\n"), done.stderr


def test_a_state_folder_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = Common(connect=None, state_dir=Path("state"), config=None, as_json=False, quiet=True)
    assert Session(common).state_folder == tmp_path / "state"
