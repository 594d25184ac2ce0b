"""What libvirt says that it can do for a domain."""

from __future__ import annotations

import pytest

from stillframe.hypervisor.backup_xml import machine_of, tells_backup


@pytest.mark.parametrize(("feature", "told"), [
    ("<backup supported='yes'/>", True), ("<backup supported='no'/>", False),
    ("<gic supported='yes'/>", False),
])
def test_only_a_yes_counts(feature: str, told: bool) -> None:
    text = f"<domainCapabilities><path>/q</path><features>{feature}</features></domainCapabilities>"
    assert tells_backup(text) is told


def test_what_is_asked_about_is_the_domains_own_machine() -> None:
    assert machine_of(
        "<domain type='qemu'><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>"
        "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>"
    ) == ("/usr/bin/qemu-system-x86_64", "x86_64", "pc-q35-7.2", "qemu")
