"""Bytes in, the same things out, and anything else refused: packs, slots, nodes, objects, key slots."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe.errors import KeyWrong, RepositoryDamaged, RepositoryNewer, RepositoryUnknown
from stillframe.repository.crypto import PLAIN, ZSTD, DomainKey, packed, unpacked
from stillframe.repository.keyslots import (
    Kdf,
    SlotKind,
    decode_slot,
    new_recovery_key,
    recovery_secret,
    unwrap,
    wrap,
)
from stillframe.repository.layout import (
    FORMAT_VERSION,
    PackKind,
    PackName,
    Parameters,
    SnapshotName,
    decode_parameters,
    generation_key,
    generation_number,
    new_sid,
    pack_name,
    session_id,
    session_key,
    snapshot_name,
)
from stillframe.repository.manifest import TOMBSTONE_BYTES, is_tombstone, tombstone
from stillframe.repository.nodes import (
    ChunkRef,
    decode_inner,
    decode_leaf,
    encode_inner,
    encode_leaf,
    leaf_slots,
)
from stillframe.repository.pack import PackBuilder, SlotRef, footer_of, read_footer
from stillframe.repository.slots import SlotCodec
from stillframe.storage.memory import MemoryStorage

_CHEAP = Kdf("", memory_kib=64, iterations=1, lanes=1)
_SMALL = Parameters(id="00" * 16, created_at="now", chunk_bytes=4096, slot_chunks=4)
_SIDS = st.binary(min_size=16, max_size=16)
_U32 = st.integers(0, 2**32 - 1)


def _refs(kind: PackKind) -> st.SearchStrategy[SlotRef]:
    names = st.builds(PackName, st.just(kind.value), _SIDS, _U32)
    return st.builds(SlotRef, names, _U32, _U32, _U32)


_ENTRIES = st.lists(
    st.one_of(st.none(), st.builds(ChunkRef, st.binary(min_size=32, max_size=32), _refs(PackKind.DATA),
                                   st.integers(0, 255))),
    min_size=8, max_size=8)


def _name(kind: PackKind = PackKind.DATA, number: int = 0) -> PackName:
    return PackName(kind.value, secrets.token_bytes(16), number)


# --- names -----------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
       st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
       st.datetimes(datetime(2000, 1, 1), datetime(2999, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
@example("host", "guest", datetime(2026, 11, 24, 15, 14, tzinfo=UTC))
def test_a_snapshot_is_named_after_any_host_guest_and_moment(host: str, guest: str, moment: datetime) -> None:
    name = SnapshotName(host, guest, moment, new_sid())
    assert snapshot_name(name.key) == name
    assert all(part.isascii() and part not in (".", "..") and part for part in name.key.split("/"))


@pytest.mark.parametrize("text", ["..", ".", ".hidden", "a/b", "a b", "ü", "%2E", "~"])
def test_odd_names_stay_one_part_of_a_key(text: str) -> None:
    key = SnapshotName(text, text, datetime(2026, 1, 1, tzinfo=UTC), new_sid()).key
    assert key.count("/") == 4
    assert not any(part.startswith(".") for part in key.split("/"))
    assert snapshot_name(key).guest == text


def test_names_of_packs_sessions_and_generations() -> None:
    name = _name(PackKind.TREE, 123)
    assert pack_name(name.key) == pack_name(name.text) == name
    sid = new_sid()
    assert session_id(session_key(sid)) == sid
    assert generation_number(generation_key(7)) == 7
    assert sorted([generation_key(10), generation_key(9)]) == [generation_key(9), generation_key(10)]
    for read in (pack_name, session_id, generation_number, snapshot_name):
        with pytest.raises(ValueError, match="not a"):
            read("main/x/1")


@pytest.mark.parametrize(("size_bytes", "height"), [
    (0, 0), (1, 0), (64 * 65536, 0), (64 * 65536 + 1, 1), (64 * 64 * 65536, 1), (2**40, 3),
])
def test_height_of_a_tree(size_bytes: int, height: int) -> None:
    assert Parameters(id="", created_at="").height(size_bytes) == height


def test_a_repository_says_what_it_is() -> None:
    parameters = Parameters(id="ab" * 16, created_at="2026-11-24T15:00:00.000000Z")
    content = parameters.encode()
    assert msgspec.structs.replace(decode_parameters(content, "/repo"), digest="") == parameters
    with pytest.raises(RepositoryUnknown):
        decode_parameters(b'{"name": "something else"}', "/repo")
    with pytest.raises(RepositoryDamaged):
        decode_parameters(content[:-5], "/repo")
    newer = msgspec.json.encode(msgspec.structs.replace(parameters, version=FORMAT_VERSION + 1))
    with pytest.raises(RepositoryNewer):
        decode_parameters(newer, "/repo")
    odd = msgspec.structs.replace(parameters, chunk_bytes=65537).encode()
    for damaged in (odd, content.replace(b"15:00", b"16:00"), content.replace(b"abab", b"ab\xe4b")):
        with pytest.raises(RepositoryDamaged):
            decode_parameters(damaged, "/repo")


# --- sealing ---------------------------------------------------------------------------------------------


def test_a_sealed_object_opens_only_under_its_own_name_and_key() -> None:
    key = DomainKey.new()
    sealed = key.seal_object("main/m/a", b"content" * 100)
    assert key.open_object("main/m/a", sealed) == b"content" * 100
    assert len(sealed) < 200, "it was compressed"
    assert key.seal_object("main/m/a", b"content" * 100) != sealed, "each sealing has a key of its own"
    with pytest.raises(RepositoryDamaged):
        key.open_object("main/m/b", sealed)
    with pytest.raises(RepositoryDamaged):
        DomainKey.new().open_object("main/m/a", sealed)


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_of_a_sealed_object_is_found(place: int, bit: int) -> None:
    key = DomainKey(bytes(32))
    sealed = bytearray(key.seal_object("name", b"some content"))
    sealed[place % len(sealed)] ^= 1 << bit
    with pytest.raises((RepositoryDamaged, RepositoryNewer)):
        key.open_object("name", bytes(sealed))


@given(st.binary(max_size=2000))
def test_compression_gives_back_the_content(content: bytes) -> None:
    codec, body = packed(content)
    assert len(body) <= len(content)
    assert unpacked(codec, body, len(content)) == content


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    content = secrets.token_bytes(4096)
    assert packed(content) == (PLAIN, content)
    assert packed(bytes(4096))[0] == ZSTD
    for codec, body in ((ZSTD, b"no frame"), (7, content), (ZSTD, bytes(packed(bytes(9000))[1]))):
        with pytest.raises(ValueError, match=r"."):
            unpacked(codec, body, 8192)


def test_a_slot_opens_only_as_itself() -> None:
    codec = SlotCodec(DomainKey.new(), _SMALL)
    pack, ids = _name(), [secrets.token_bytes(32) for _ in range(3)]
    body = b"".join(bytes((number,)) * 4096 for number in range(3))
    sealed = codec.seal_chunks(pack, 5, ids, body)
    opened = codec.open_chunks(pack, 5, sealed)
    assert opened.ids == tuple(ids)
    assert [bytes(opened.chunk(number)) for number in range(3)] == [body[:4096], body[4096:8192], body[8192:]]
    others = [(pack, 4), (PackName(pack.kind, pack.sid, 1), 5), (PackName("t", pack.sid, 0), 5), (_name(), 5)]
    for birth, slot in others:
        with pytest.raises(ValueError, match="not what was stored"):
            codec.open_chunks(birth, slot, sealed)
    for place in range(0, len(sealed), 7):
        flipped = bytearray(sealed)
        flipped[place] ^= 1
        with pytest.raises(ValueError, match="not what was stored"):
            codec.open_chunks(pack, 5, flipped)


def test_a_slot_that_lies_about_its_chunks_is_refused() -> None:
    key = DomainKey.new()
    codec, pack = SlotCodec(key, _SMALL), _name()
    for content in (bytes((PLAIN, 2)) + bytes(64) + bytes(4096), bytes((PLAIN, 5)) + bytes(160 + 5 * 4096),
                    bytes((PLAIN, 0))):
        with pytest.raises(ValueError, match="does not hold what it says"):
            codec.open_chunks(pack, 0, key.seal_slot(pack, 0, content))


# --- packs -----------------------------------------------------------------------------------------------


def _pack() -> tuple[PackName, bytes, list[SlotRef], list[bytes]]:
    name = _name()
    builder = PackBuilder(name)
    stored = [secrets.token_bytes(100 + number) for number in range(5)]
    refs = [builder.add(content, 4096) for content in stored]
    return name, bytes(builder.finished()), refs, stored


def test_a_pack_says_where_its_slots_are() -> None:
    name, pack, refs, stored = _pack()
    storage = MemoryStorage()
    storage.create(name.key, pack)
    rows = read_footer(storage, name, len(pack))
    assert rows == footer_of(name, pack)
    for number, (row, ref) in enumerate(zip(rows, refs, strict=True)):
        assert (row.birth, row.slot, row.plain_bytes) == (name, number, 4096)
        assert (row.offset_bytes, row.stored_bytes) == (ref.offset_bytes, ref.stored_bytes)
        content = pack[row.offset_bytes : row.offset_bytes + row.stored_bytes]
        assert content == stored[number]
        assert row.is_intact(content)
        assert not row.is_intact(content[:-1] + bytes((content[-1] ^ 1,)))


def test_a_moved_slot_keeps_its_birth() -> None:
    name, pack, _, stored = _pack()
    rows = footer_of(name, pack)
    builder = PackBuilder(_name(number=7))
    builder.add_moved(rows[3], stored[3])
    moved = footer_of(builder.name, builder.finished())
    assert [(row.birth, row.slot, row.digest) for row in moved] == [(name, 3, rows[3].digest)]


def test_a_long_footer_is_read_whole() -> None:
    builder = PackBuilder(_name())
    for _ in range(2000):
        builder.add(b"x" * 20, 20)
    pack, storage = bytes(builder.finished()), MemoryStorage()
    storage.create(builder.name.key, pack)
    assert len(read_footer(storage, builder.name, len(pack))) == 2000


def test_any_damage_to_head_footer_or_end_of_a_pack_is_found() -> None:
    name, pack, refs, _ = _pack()
    body = range(refs[0].offset_bytes, refs[-1].offset_bytes + refs[-1].stored_bytes)
    for place in range(len(pack)):
        if place in body:
            continue
        flipped = bytearray(pack)
        flipped[place] ^= 4
        with pytest.raises((RepositoryDamaged, RepositoryNewer)):
            footer_of(name, flipped)
    for length in range(0, len(pack), 13):
        with pytest.raises(RepositoryDamaged):
            footer_of(name, pack[:length])
    with pytest.raises(RepositoryDamaged, match="another pack"):
        footer_of(_name(), pack)


# --- nodes -----------------------------------------------------------------------------------------------


@given(_ENTRIES)
def test_a_leaf_comes_back(entries: list[ChunkRef | None]) -> None:
    node = encode_leaf(entries)
    assert list(decode_leaf(node, 8).entries) == entries
    assert set(leaf_slots(node, 8)) == {entry.place for entry in entries if entry is not None}


@given(st.lists(st.one_of(st.none(), _refs(PackKind.TREE)), min_size=8, max_size=8))
def test_an_inner_node_comes_back(children: list[SlotRef | None]) -> None:
    assert list(decode_inner(encode_inner(3, children), 3, 8).children) == children


@given(_ENTRIES, st.data())
def test_a_node_of_another_sort_or_length_is_refused(
    entries: list[ChunkRef | None], data: st.DataObject
) -> None:
    node = encode_leaf(entries)
    cut = data.draw(st.integers(0, len(node) - 1))
    for wrong in (node[:cut], node + b"\0", encode_inner(1, [None] * 8)):
        with pytest.raises(ValueError, match=r"."):
            decode_leaf(wrong, 8)
    with pytest.raises(ValueError, match=r"."):
        decode_leaf(node, 16)
    with pytest.raises(ValueError, match=r"."):
        decode_inner(encode_inner(1, [None] * 8), 2, 8)


# --- keys ------------------------------------------------------------------------------------------------


def test_a_key_slot_opens_with_its_secret_only() -> None:
    key = DomainKey.new()
    slot = wrap(key, b"correct horse", SlotKind.PASSPHRASE, "me", "now", _CHEAP)
    stored = decode_slot(slot.key, slot.encode())
    assert unwrap(stored, b"correct horse").secret == key.secret
    with pytest.raises(KeyWrong):
        unwrap(stored, b"wrong")
    with pytest.raises(KeyWrong):
        unwrap(msgspec.structs.replace(stored, label="somebody else"), b"correct horse")
    assert key.secret not in slot.encode()


def test_a_damaged_or_newer_key_slot_is_told_from_a_wrong_secret() -> None:
    slot = wrap(DomainKey.new(), b"x", SlotKind.PASSPHRASE, "", "now", _CHEAP)
    with pytest.raises(RepositoryDamaged):
        decode_slot(slot.key, slot.encode()[:-3])
    with pytest.raises(RepositoryDamaged):
        unwrap(msgspec.structs.replace(slot, wrapped="???"), b"x")
    greedy = msgspec.structs.replace(slot, kdf=msgspec.structs.replace(slot.kdf, memory_kib=2**40))
    with pytest.raises(RepositoryDamaged):
        unwrap(greedy, b"x")
    newer = msgspec.json.encode(msgspec.structs.replace(slot, version=FORMAT_VERSION + 1))
    with pytest.raises(RepositoryNewer):
        decode_slot(slot.key, newer)


def test_a_recovery_key_may_be_typed_carelessly() -> None:
    text = new_recovery_key()
    assert recovery_secret(text) == recovery_secret(f" {text.lower().replace('-', ' ')}\n")
    assert recovery_secret(text) == recovery_secret(text.replace("O", "0").replace("I", "1"))
    assert len(recovery_secret(text)) == 52
    assert new_recovery_key() != text


def test_a_tombstone_is_told_from_a_manifest_by_its_size() -> None:
    assert len(tombstone(new_sid())) == TOMBSTONE_BYTES
    assert is_tombstone(TOMBSTONE_BYTES)
    assert len(DomainKey.new().seal_object("k", b'{"version":1}')) != TOMBSTONE_BYTES
