"""docs/DISASTER.md, done word for word: a machine with the repository and a key file, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from lab.daemons import LibvirtDaemons
from lab.database import check_image
from lab.dbguest import DbGuest
from lab.enter import IMAGES_DIR
from lab.waiting import PATIENCE_S, wait_for
from stillframe.errors import EXIT_FELL_BACK, EXIT_OK
from tests.integration.pages import SERVED, SETTINGS, STATE, clear, commands, run, typing
from tests.integration.test_whole_guest import agent_answers

_REPOSITORY, _KEY = SERVED / "repository", SETTINGS / "key"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def place_for_commands(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give an environment in which `stillframe` is this one, and no setting is made."""
    with typing(tmp_path) as environment:
        yield environment


def test_the_page_is_followed_word_for_word(
    db_guest: Callable[..., DbGuest], daemons: LibvirtDaemons, place_for_commands: dict[str, str],
) -> None:
    guest = db_guest(name="web")
    acknowledged = guest.wait_more_rows(5)
    run(f"stillframe init {_REPOSITORY} --new-key-file {_KEY}", place_for_commands)
    run(f"stillframe backup web --repo {_REPOSITORY} --key-file {_KEY} --min-free 32M", place_for_commands)

    # The fire.
    guest.destroy()
    daemons.remove_all_domains()
    for folder in (STATE, IMAGES_DIR):
        clear(folder)
    assert [path.name for path in _KEY.parent.iterdir()] == [_KEY.name]

    lines = commands("DISASTER.md")
    assert len(lines) >= 7
    for line in lines:
        said = run(line, place_for_commands, EXIT_FELL_BACK if "backup" in line else EXIT_OK)
        if "--start" in line:
            domain = daemons.connect().lookupByName("web")
            wait_for("the guest's agent answers", lambda domain=domain: agent_answers(domain), 180)  # type: ignore[misc]
        if line.startswith("virsh"):
            assert re.search(r"\bweb\s+running\b", said)

    domain = daemons.connect().lookupByName("web")
    domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
    wait_for("the guest is off", lambda: not domain.isActive(), PATIENCE_S)
    (image,) = (path for path in IMAGES_DIR.iterdir() if path.name.startswith("web-vda"))
    check = check_image(image, image.suffix.removeprefix(".").replace("img", "raw"))
    assert check.whole
    assert acknowledged <= check.last
