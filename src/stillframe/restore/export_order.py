"""What a server of an export is told by who starts it: all that it needs to open the repository.

It goes through a pipe, the server's standard input: the key is on no command line, in no environment
and in no file.
"""

from __future__ import annotations

import msgspec

from stillframe.repository.crypto import DomainKey
from stillframe.repository.manifest import Content
from stillframe.repository.opened import Repository, read_parameters
from stillframe.repository.slots import SlotCodec
from stillframe.storage.access import NOBODY, Access
from stillframe.storage.address import open_storage
from stillframe.units import MIB

CACHE_BYTES = 256 * MIB
PATIENCE_S = 15.0


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk to serve, *content* of the repository at *address*, which *key* opens.

    *access* is who we are to the repository's server.
    *name* is the export's. A read that fails is tried again for *patience_s*. *trace* is the path of a
    file with what is read first ("" for none): see export_trace.py. *outlives*: who started the
    server may end before it.
    """

    address: str
    access: Access = NOBODY
    key: bytes
    name: str
    content: Content
    cache_bytes: int = CACHE_BYTES
    patience_s: float = PATIENCE_S
    trace: str = ""
    outlives: bool = False

    def encode(self) -> bytes:
        """Return the order as the server reads it."""
        return msgspec.json.encode(self)

    def open(self) -> Repository:
        """Open the repository. Raises RepositoryUnknown, RepositoryNewer, StorageError."""
        storage = open_storage(self.address, self.access)
        parameters, key = read_parameters(storage), DomainKey(self.key)
        return Repository(storage, parameters, key, SlotCodec(key, parameters))


def decode_order(told: bytes) -> Order:
    """Return the order. Raises msgspec.DecodeError."""
    return msgspec.json.decode(told, type=Order)


def order_for(repository: Repository, name: str, content: Content) -> Order:
    """Return the order to serve *content* of an open repository as *name*."""
    return Order(address=repository.address, access=repository.access, key=repository.key.secret, name=name,
                 content=Content(size_bytes=content.size_bytes, root=content.root))
