"""A proxy on loopback between a client and a real server that harms what passes through it.

with HttpProxy(server.port, Chances(cut_request=0.1, lost_reply=0.1), seed=1) as proxy:
storage = S3Storage(BUCKET, "folder", replace(server.access, endpoint=proxy.endpoint))

What happens to which request is drawn from *seed*, in the order in which requests come. `met` says how often
each harm was done.
"""

from __future__ import annotations

import contextlib
import email.utils
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

_PATIENCE_S = 30.0
_BLOCK_BYTES = 64 * 1024
_CONDITION = re.compile(rb"\r\n(?:if-none-match|authorization):[^\r]*", re.IGNORECASE)
_DATES = re.compile(rb"(\r\n(?:date|last-modified): )([^\r]*)", re.IGNORECASE)
_LENGTH = re.compile(rb"(\r\ncontent-length: )\d+", re.IGNORECASE)
_BUSY_BODY = b"<Error><Code>SlowDown</Code></Error>"
_BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
         b"Content-Length: %d\r\n\r\n%s" % (len(_BUSY_BODY), _BUSY_BODY))


@dataclass(frozen=True, slots=True)
class Chances:
    """How likely each harm is, 0 to 1.

    *cut_request*: half of it reaches the server. *lost_reply*: it is carried out, and nothing comes back.
    *cut_reply*: half of the reply comes back. *busy*: it is answered with 503 and not sent on. *late*: the
    reply takes a moment. *twice*: a request that reads is sent on twice; *written_twice*: one that writes.
    What comes back is the second reply. *short*: the first half of what a GET is answered with is said to be
    all of it.
    """

    cut_request: float = 0.0
    lost_reply: float = 0.0
    cut_reply: float = 0.0
    busy: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    written_twice: float = 0.0
    short: float = 0.0

    def drawn(self, chance: random.Random) -> str:
        """Return the name of a harm, "" for none."""
        at = chance.random()
        for name, likely in asdict(self).items():
            at -= likely
            if at < 0:
                return str(name)
        return ""


class _Proxy:
    """Takes connections within the block, each in a thread of its own."""

    def __init__(self, server_port: int, seed: int) -> None:
        self._server_port = server_port
        self._chance = random.Random(seed)
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listening.getsockname()[1])
        self._taking = threading.Thread(target=self._take, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._taking.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake the thread that waits for the next connection.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._taking.join(_PATIENCE_S)

    def _take(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve_quietly, args=(client,), daemon=True).start()

    def _serve_quietly(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(_PATIENCE_S)
            self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def _server(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._server_port), _PATIENCE_S)


class HttpProxy(_Proxy):
    """Knows requests and replies of HTTP. After a reply the client's connection is closed.

    What *asked* and *answered* return is sent on in place of each request and each reply.
    """

    def __init__(
        self, server_port: int, chances: Chances, seed: int = 0, *,
        asked: Callable[[bytes], bytes] = bytes, answered: Callable[[bytes], bytes] = bytes,
    ) -> None:
        super().__init__(server_port, seed)
        self.chances = chances
        self._asked = asked
        self._answered = answered

    @property
    def endpoint(self) -> str:
        """The address that stands for the server's."""
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, client: socket.socket) -> None:
        request = _request(client)
        with self._lock:
            harm = self.chances.drawn(self._chance)
            if harm == ("written_twice" if request.startswith((b"GET ", b"HEAD ")) else "twice"):
                harm = ""
            self.met[harm] += 1
        if harm == "busy":
            client.sendall(_BUSY)
            return
        if harm == "cut_request":
            with self._server() as server:
                server.sendall(request[: len(request) // 2])
            return
        reply = self._reply(request)
        if harm in ("twice", "written_twice"):
            reply = self._reply(request)
        if harm == "late":
            time.sleep(0.05)
        if harm == "short" and request.startswith(b"GET "):
            reply = _shortened(reply)
        if harm != "lost_reply":
            client.sendall(reply[: len(reply) // 2] if harm == "cut_reply" else reply)

    def _reply(self, request: bytes) -> bytes:
        with self._server() as server:
            server.sendall(self._asked(request))
            return self._answered(b"".join(iter(lambda: server.recv(_BLOCK_BYTES), b"")))


class CuttingProxy(_Proxy):
    """Ends each connection after so many bytes, both ways taken together, drawn from *least* to *most*."""

    def __init__(self, server_port: int, least_bytes: int, most_bytes: int, seed: int = 0) -> None:
        super().__init__(server_port, seed)
        self._range = least_bytes, most_bytes

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            left = [self._chance.randrange(*self._range)]
        with self._server() as server:
            back = threading.Thread(target=self._pump, args=(server, client, left), daemon=True)
            back.start()
            self._pump(client, server, left)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK_BYTES):
                with self._lock:
                    sent = block[: left[0]]
                    left[0] -= len(sent)
                    if not left[0]:
                        self.met["cut"] += 1
                sink.sendall(sent)
                if len(sent) < len(block) or not left[0]:
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def unconditional(request: bytes) -> bytes:
    """Return a request without its condition, as servers take it that do not know If-None-Match.

    It is not signed any more, since the condition was.
    """
    return _CONDITION.sub(b"", request)


def hours_ahead(hours: float) -> Callable[[bytes], bytes]:
    """Return what makes a reply one of a server whose clock is so much ahead (or, below 0, behind)."""
    def moved(found: re.Match[bytes]) -> bytes:
        at_s = email.utils.parsedate_to_datetime(found[2].decode()).timestamp() + hours * 3600
        return found[1] + email.utils.formatdate(at_s, usegmt=True).encode()

    def answered(reply: bytes) -> bytes:
        head, end, content = reply.partition(b"\r\n\r\n")
        return _DATES.sub(moved, head) + end + content

    return answered


def _shortened(reply: bytes) -> bytes:
    """Return a reply with half of its content, which is said to be all."""
    head, end, content = reply.partition(b"\r\n\r\n")
    half = content[:len(content) // 2]
    return _LENGTH.sub(rb"\g<1>%d" % len(half), head) + end + half


def _request(client: socket.socket) -> bytes:
    """Return a whole request, which asks for the connection to be closed behind the reply.

    That header is none of those that S3 signs.
    """
    content = b""
    while b"\r\n\r\n" not in content:
        content += _some(client)
    head, _, body = content.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    length = next((int(line.partition(b":")[2]) for line in lines
                   if line.lower().startswith(b"content-length:")), 0)
    parts, missing = [body], length - len(body)
    while missing > 0:
        parts.append(_some(client))
        missing -= len(parts[-1])
    return b"\r\n".join([*lines, b"Connection: close", b"", b"".join(parts)])


def _some(client: socket.socket) -> bytes:
    block = client.recv(_BLOCK_BYTES)
    if not block:
        raise ConnectionError("the client went away")
    return block
