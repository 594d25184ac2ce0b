"""What `files` hears of its worker."""

from __future__ import annotations

import socket

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import Interrupted
from stillframe.restore.appliance import Appliance, Person
from stillframe.restore.appliance_wire import Wire


def test_a_stop_is_heard_while_one_piece_comes_right_after_the_other() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        worker = Wire(its)
        for _ in range(3):
            worker.send(b"x" * 1000)
        worker.send(b"")
        stops = iter([None, None, Interrupted("Ended.", "run it again")])
        person = Person(print, print, None, lambda: next(stops))
        data = Appliance(Wire(ours), person, SystemClock(), 5.0).data()
        with pytest.raises(Interrupted):
            data.read()
