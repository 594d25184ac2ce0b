"""What is kept of a checkpoint beside the copy that it belongs to, so that a later run can count from it.

libvirt's own XML, which defines the checkpoint again where libvirt lost it. Of a guest without libvirt,
whose checkpoints are the bitmaps and nothing else, the same facts as a JSON object:

    {"about": {"disk0": "…"}, "name": "stillframe-…", "places": {"disk0": "file:/images/a.qcow2"}}

*places* says which image each disk with a bitmap stood on.
"""

from __future__ import annotations

import msgspec

from stillframe.hypervisor.backup_xml import read_checkpoint_xml
from stillframe.hypervisor.model import Checkpoint


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    places: dict[str, str]
    about: dict[str, str]


def read_checkpoint(text: str) -> Checkpoint | None:
    """Return what *text* says of a checkpoint, None if it says nothing of any."""
    if not text.startswith("{"):
        return read_checkpoint_xml(text)
    try:
        note = msgspec.json.decode(text, type=_Note)
    except msgspec.DecodeError:
        return None
    return Checkpoint(note.name, tuple(note.places), note.places, note.about)


def checkpoint_note(checkpoint: Checkpoint) -> str:
    """Return what read_checkpoint understands."""
    kept = {target: checkpoint.places[target] for target in checkpoint.targets}
    note = _Note(name=checkpoint.name, places=kept, about=dict(checkpoint.about))
    return msgspec.json.encode(note, order="deterministic").decode()
