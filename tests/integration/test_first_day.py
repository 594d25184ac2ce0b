"""docs/FIRST-DAY.md, done word for word: a guest, servers for S3 and SFTP, and what systemd would start."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.database import check_image
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.enter import IMAGES_DIR
from lab.s3 import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from stillframe.config.check import all_problems
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, GuestPaused
from tests.contract.drivers import Servers
from tests.integration.pages import SETTINGS, commands, run, typing
from tests.integration.repositories import ROOT

_UNITS = Path("/etc/systemd/system")
_LINK = "/usr/local/bin/stillframe"
_RESTORED = IMAGES_DIR / "restored" / "vda.img"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    with typing(tmp_path) as found:
        yield found
    for unit in _UNITS.iterdir():
        unit.unlink()


@dataclass(frozen=True)
class Systemd:
    """What systemctl would do, as far as a page asks for it: no systemd runs in the lab.

    Units are checked by systemd's own parser; what they start gets as little of an environment as there.
    """

    environment: Mapping[str, str]

    def __call__(self, *words: str) -> None:
        match words:
            case ("daemon-reload",):
                self._verify()
            case ("enable", "--now", *timers):
                for timer in timers:
                    assert "WantedBy=timers.target" in (_UNITS / timer).read_text()
                    assert (_UNITS / timer).with_suffix(".service").exists()
            case ("start", service):
                self.start(service)
            case _:
                pytest.fail(f"nobody knows what systemctl {shlex.join(words)} does")

    def start(self, service: str, code: int = EXIT_OK) -> str:
        """Run what a service runs, one after the other, until one fails; it must come to *code*."""
        unit = (_UNITS / service).read_text()
        fine = {EXIT_OK, *map(int, " ".join(_values(unit, "SuccessExitStatus")).split())}
        plain = {name: value for name, value in self.environment.items() if name in ("PATH", "PYTHONPATH")}
        said, ended = "", EXIT_OK
        for line in _values(unit, "ExecStart(?:Pre)?"):
            program, *words = shlex.split(line.removeprefix("-"))
            assert program == _LINK
            done = subprocess.run(["stillframe", *words], env=plain, capture_output=True, text=True,
                                  check=False, timeout=300, cwd="/", stdin=subprocess.DEVNULL)
            said += done.stdout + done.stderr
            if done.returncode not in fine and not line.startswith("-"):
                ended = done.returncode
                break
        assert said
        assert ended == code, said
        return said

    def _verify(self) -> None:
        """Have systemd's parser read all units; the command is there only where somebody installed it."""
        stillframe = next(Path(folder) / "stillframe" for folder in self.environment["PATH"].split(":"))
        units = sorted(_UNITS.iterdir())
        assert len(units) == 10
        for unit in units:
            unit.write_text(unit.read_text().replace(_LINK, str(stillframe)))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units],
                              capture_output=True, text=True, check=False)
        for unit in units:
            unit.write_text(unit.read_text().replace(str(stillframe), _LINK))
        assert (done.returncode, done.stderr) == (0, "")


def _values(unit: str, name: str) -> list[str]:
    """Return the values of a setting in a unit."""
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


def as_in_the_lab(command: str, servers: Servers) -> str:
    """Return a command of the page with the lab's servers, and who may use them, in place of those named."""
    for theirs, ours in (
        ("s3://backups/host1?endpoint=https://s3.example.net", servers.s3.url("first-day")),
        ("sftp://backup@far.example.net/srv/host1", servers.sftp.url("first-day")),
        ("AKIAIOSFODNN7EXAMPLE", ACCESS_KEY_ID),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", SECRET_ACCESS_KEY),
    ):
        command = re.sub(rf"(--repo )?{re.escape(theirs)}",
                         lambda found, ours=ours: f"--repo '{ours}'" if found[1] else ours, command)  # type: ignore[misc]
    return command


@pytest.mark.slow
def test_the_page_is_followed_word_for_word(
    db_guest: Callable[..., DbGuest], disk_guest: Callable[..., DiskGuest], servers: Servers,
    environment: dict[str, str],
) -> None:
    guest = db_guest(name="web")
    scratch = disk_guest(name="scratch")
    systemctl = Systemd(environment)
    said: dict[str, str] = {}
    acknowledged = 0
    for command in commands("FIRST-DAY.md"):
        if command.startswith("systemctl "):
            systemctl(*shlex.split(command)[1:])
            continue
        if command.startswith("stillframe backup"):
            acknowledged = guest.wait_more_rows(5)
        if command.startswith("rm "):
            assert check_image(_RESTORED, "raw").whole
            assert check_image(_RESTORED, "raw").last >= acknowledged > 0
        said[command] = run(as_in_the_lab(command, servers), environment)

    assert "all is well" in said["stillframe config check"]
    listed = said["stillframe list --tags"].splitlines()
    assert len(listed) == 1
    assert re.search(r" web@.* tags: production$", listed[0])
    assert re.search(r"drilled at .*: passed", said["stillframe show web"])
    assert "pragma integrity_check" in said["stillframe show web"]
    # Of this day's two backups, the service that prunes had dropped the first when they were copied.
    near, far = (_listed(environment, *words) for words in ((), ("--repo", servers.sftp.url("first-day"))))
    assert [each["captured_at"] for each in near] == [each["captured_at"] for each in far]
    assert [each["guest"] for each in near] == ["web"]

    # A night on which one of several guests can't be backed up, and one on which none can.
    settings = SETTINGS / "stillframe.toml"
    settings.write_text(settings.read_text().replace("skip = true", 'quiesce = "none"'))
    guest.domain().suspend()
    assert "error guest-paused" in systemctl.start("stillframe-backup.service", EXIT_PARTIAL)
    assert {each["guest"] for each in _listed(environment)} == {"web", scratch.name}
    scratch.domain().suspend()
    systemctl.start("stillframe-backup.service", GuestPaused.exit_code)
    assert len(_listed(environment)) == 2


def _listed(environment: Mapping[str, str], *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        run(shlex.join(["stillframe", "list", "--json", *words]), environment))["snapshots"]
    return found


def test_the_configuration_of_the_page_is_valid() -> None:
    (written,) = (each for each in commands("FIRST-DAY.md") if "> /etc/stillframe/stillframe.toml" in each)
    text = "\n".join(written.splitlines()[1:-1])
    assert [each.text for each in all_problems(text.encode()) if "can't be read" not in each.text] == []


def test_every_service_has_its_timer_and_its_row() -> None:
    units = {path.name for path in (ROOT / "systemd").iterdir()}
    services = {name for name in units if name.endswith(".service")}
    assert {name.replace(".service", ".timer") for name in services} == units - services
    page = (ROOT / "docs" / "FIRST-DAY.md").read_text()
    rows = dict(re.findall(r"^\| `(stillframe-\w+\.timer)` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == units - services
    for timer, words in rows.items():
        service = (ROOT / "systemd" / timer.replace(".timer", ".service")).read_text()
        for line in _values(service, "ExecStart"):
            assert f"`{line.removeprefix(_LINK + ' ')}" in words, timer
        assert re.search(r"^OnCalendar=.+\n(.*\n)*Persistent=true$",
                         (ROOT / "systemd" / timer).read_text(), re.MULTILINE)
