"""The QMP client against a server of the test's own that says what a QEMU says, or what it should not."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError, MonitorBusy
from stillframe.hypervisor import qmp
from stillframe.hypervisor.qmp import QmpLink, still_listens

_GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": []}}\r\n'
#: Answers one request: what to send for it.
Answer = Callable[[int, str], bytes]


def returning(number: int, value: str) -> bytes:
    return f'{{"return": {value}, "id": {number}}}\r\n'.encode()


class Server:
    """A monitor at *path* that greets, takes the capabilities, and then answers by *answer*."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: Answer = lambda number, _command: returning(number, "{}")
        self.greeting = _GREETING
        self.clients = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.clients += 1
            with client, client.makefile("rb") as lines:
                client.sendall(self.greeting)
                for line in lines:
                    request = json.loads(line)
                    known = request["execute"] == "qmp_capabilities"
                    said = returning(request["id"], "{}") if known else self.answer(
                        request["id"], request["execute"])
                    if not said:
                        break
                    client.sendall(said)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "q")
    yield made
    made.close()


@pytest.fixture
def link(server: Server) -> Iterator[QmpLink]:
    made = QmpLink(str(server.path), SystemClock(), answer_s=0.3)
    yield made
    made.release()


def test_an_answer_is_told_from_events_and_from_older_answers(server: Server, link: QmpLink) -> None:
    def answer(number: int, _command: str) -> bytes:
        event = b'{"event": "STOP", "data": {}}\r\n'
        return event + returning(number - 1, '"late"') + event + returning(number, '"now"')

    server.answer = answer
    assert link.execute("query-status") == "now"
    assert link.pid == os.getpid()
    assert link.uri == f"qmp:{server.path}"


def test_what_qemu_refuses(server: Server, link: QmpLink) -> None:
    server.answer = lambda number, _command: (
        f'{{"error": {{"class": "GenericError", "desc": "no such node"}}, "id": {number}}}\n'.encode())
    with pytest.raises(HypervisorError, match="no such node"):
        link.execute("blockdev-del", {"node-name": "x"})
    assert server.clients == 1


@pytest.mark.parametrize("answer", [
    lambda _number, _command: b"",
    lambda _number, _command: b'{"event": "STOP"}\n',
    lambda _number, _command: b"no JSON\n",
    lambda _number, _command: b"[1]\n",
    lambda _number, _command: b"x" * 3000,
], ids=["closed", "silent", "garbage", "no object", "endless"])
def test_an_answer_that_does_not_come(
    server: Server, link: QmpLink, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """Nobody can say whether it was carried out; the next question begins with a new connection."""
    monkeypatch.setattr(qmp, "_ANSWER_LIMIT_BYTES", 2000)
    server.answer = answer
    with pytest.raises(ConnectionLost):
        link.execute("cont")
    server.answer = lambda number, _command: returning(number, "1")
    assert link.execute("query-status") == 1
    assert (server.clients, link.opened) == (2, 2)


def test_a_monitor_that_does_not_greet_is_held_by_another(
    server: Server, link: QmpLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_GREETING_S", 0.1)
    server.greeting = b""
    with pytest.raises(MonitorBusy, match="another client holds the monitor"):
        link.execute("query-status")


def test_a_full_queue_of_clients_is_no_guest_that_ended(tmp_path: Path) -> None:
    """As QEMU listens: a second and a third client wait, and the next one's connection is not taken."""
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening := socket.socket(socket.AF_UNIX))
        listening.bind(path)
        listening.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(path)
        with pytest.raises(MonitorBusy, match="does not take a connection"):
            QmpLink(path, SystemClock()).execute("query-status")


def test_what_is_no_monitor(server: Server, link: QmpLink) -> None:
    server.greeting = b"SSH-2.0\r\n"
    with pytest.raises(GuestUnknown, match="no QMP monitor"):
        link.execute("query-status")
    link.ensure()  # raises nothing: a look will tell


def test_released_and_connected_anew(server: Server, link: QmpLink) -> None:
    link.execute("query-status")
    link.release()
    link.execute("query-status")
    assert (server.clients, link.opened) == (2, 2)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(GuestUnknown, match="No QEMU listens"):
        QmpLink(str(tmp_path / "none"), SystemClock()).execute("query-status")


def test_a_socket_that_was_deleted_below_its_owner(server: Server, link: QmpLink) -> None:
    """QEMU runs: it must not be taken for one that ended."""
    server.path.unlink()
    assert still_listens(str(server.path))
    with pytest.raises(HypervisorError, match="can't be reached there"):
        link.execute("query-status")
    assert not still_listens(f"{server.path}-other")
