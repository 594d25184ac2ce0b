"""The configuration file: what is valid, what is not, and who overrides whom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillframe import config
from stillframe.capture.limits import Limits
from stillframe.capture.states import Quiesce
from stillframe.capture.watched import STALL_TIMEOUT_S
from stillframe.config import GuestSettings, Settings, for_guest, read_settings, wishes
from stillframe.config.settings import LEAST_RATE, RepositorySettings
from stillframe.errors import ConfigInvalid
from stillframe.repository.layout import Parameters
from stillframe.units import GIB, MIB

_WHOLE = """
connect = "qemu+ssh://host/system"
state_dir = "/srv/stillframe"

[defaults]
quiesce = "agent"
overlay_dir = "/var/lib/libvirt/overlays"
overlay_limit = "20G"
min_free = "512M"
freeze_timeout = "8s"
agent_timeout = "4"
shutdown_timeout = "3m"
commit_timeout = "2h"

[guests.db]
quiesce = "shutdown"
exclude = ["vdb"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "stillframe.toml"
    path.write_text(text)
    return path


def test_every_key_of_a_file(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, _WHOLE))
    assert (settings.connect, settings.state_dir) == ("qemu+ssh://host/system", "/srv/stillframe")
    found = for_guest(settings, "web", GuestSettings())
    assert found.quiesce is Quiesce.AGENT
    assert found.overlay_folder == Path("/var/lib/libvirt/overlays")
    assert found.exclude == ()
    assert found.limits == Limits(
        freeze_s=8, agent_s=4, shutdown_s=180, commit_s=7200,
        overlay_bytes=20 * GIB, min_free_bytes=512 * MIB,
    )


def test_the_example_at_the_head_of_the_module_is_valid(tmp_path: Path) -> None:
    assert config.__doc__ is not None
    example = config.__doc__.split("\n\n", 1)[1]
    settings = read_settings(written(tmp_path, example))
    of_guest = settings.guests["NAME"].over(settings.defaults)
    shown = {name for name in GuestSettings.__struct_fields__ if getattr(of_guest, name) is not None}
    assert shown == set(GuestSettings.__struct_fields__), "the example shows every key"
    assert wishes(settings.defaults).limits.overlay_bytes == 20 * GIB


def test_nothing_said_means_the_defaults(tmp_path: Path) -> None:
    found = for_guest(read_settings(written(tmp_path, "")), "g", GuestSettings())
    assert (found.quiesce, found.overlay_folder, found.exclude) == (Quiesce.AUTO, None, ())
    assert found.limits == Limits()


def test_a_guests_section_is_over_the_defaults_and_an_option_over_both(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, _WHOLE))
    of_guest = for_guest(settings, "db", GuestSettings())
    assert of_guest.quiesce is Quiesce.SHUTDOWN
    assert of_guest.exclude == ("vdb",)
    emptied = for_guest(settings, "db", GuestSettings(exclude=()))
    assert emptied.exclude == (), "an empty list is something that was said"
    assert of_guest.limits.freeze_s == 8, "what the section does not say comes from the defaults"
    options = GuestSettings(quiesce=Quiesce.NONE, freeze_timeout="1s")
    by_option = for_guest(settings, "db", options)
    assert (by_option.quiesce, by_option.limits.freeze_s, by_option.limits.agent_s) == (Quiesce.NONE, 1, 4)


@pytest.mark.parametrize(("text", "names"), [
    ("[defaults]\nquiesce = \"agent\"\noverlay_limits = \"2G\"\n", "overlay_limits"),
    ("destination = \"/backup\"\n", "destination"),
    ("[guests.db]\nquiesce = \"softly\"\n", r":2: guests\.db\.quiesce: must be one of auto, .*softly"),
    ("[defaults]\nfreeze_timeout = 10\n", r":2: defaults\.freeze_timeout: must be a text"),
    ("[defaults]\nexclude = \"vdb\"\n", r":2: defaults\.exclude: must be a list of texts"),
    ("[defaults]\nexclude = [\"vdb\"]\n", r":2: .*exclude can't stand in \[defaults\]"),
    ("connect = 3\n", r":1: connect: must be a text"),
    ("[defaults]\nquiesce = agent\n", ":2: "),
    ("[defaults\n", ":1: "),
    ("a = 1\na = 2\n", ":2: "),
])
def test_what_is_wrong_is_named_by_its_key_or_its_line(tmp_path: Path, text: str, names: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigInvalid) as caught:
        read_settings(path)
    assert str(path) in caught.value.message
    assert re.search(names, caught.value.message), caught.value.message


@pytest.mark.parametrize(("key", "value"), [
    ("overlay_limit", "much"), ("min_free", "20X"), ("freeze_timeout", "soon"), ("commit_timeout", "1 week"),
])
def test_a_bad_size_or_time_is_named_with_its_key(tmp_path: Path, key: str, value: str) -> None:
    settings = read_settings(written(tmp_path, f"[guests.db]\n{key} = \"{value}\"\n"))
    assert for_guest(settings, "another", GuestSettings()).limits == Limits()
    with pytest.raises(ConfigInvalid) as caught:
        for_guest(settings, "db", GuestSettings())
    assert value in caught.value.message
    assert key.replace("_", "-") in caught.value.message.replace("_", "-")


def test_a_rate_at_which_a_pack_takes_longer_than_a_storage_may_be_silent_is_refused() -> None:
    parameters = Parameters("", "")
    largest_pack_bytes = parameters.pack_bytes + 2 * parameters.slot_chunks * parameters.chunk_bytes
    assert config.rate_of(RepositorySettings(limit_rate="64K")) == LEAST_RATE
    assert largest_pack_bytes / LEAST_RATE < STALL_TIMEOUT_S
    with pytest.raises(ConfigInvalid, match="too slow a rate: '50K'"):
        config.rate_of(RepositorySettings(limit_rate="50K"))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "stillframe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigInvalid, match=str(path)):
        read_settings(path)


def test_a_named_file_must_exist_and_the_default_one_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigInvalid, match="no configuration file"):
        read_settings(tmp_path / "absent.toml")
    monkeypatch.delenv("STILLFRAME_CONFIG", raising=False)
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.toml")
    assert read_settings(None) == Settings()
    monkeypatch.setenv("STILLFRAME_CONFIG", str(written(tmp_path, "connect = \"test:///default\"\n")))
    assert read_settings(None).connect == "test:///default"


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="can't be read"):
        read_settings(tmp_path)
