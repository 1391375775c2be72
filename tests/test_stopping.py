"""Asking work to stop: at once, after the piece at hand, or when its time is up."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from qncd_cli import stopping
from qncd_cli.stopping import Stopped


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    monkeypatch.setattr(stopping, "_request", stopping._Request())
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_where_nothing_is_to_be_finished_it_stops_at_once():
    with pytest.raises(Stopped) as stopped:
        stopping.request(signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM
    assert not stopping.wanted()


def test_work_is_let_finish_its_piece():
    with stopping.finishing():
        stopping.check()
        stopping.request(signal.SIGHUP)
        assert stopping.wanted()
        with pytest.raises(Stopped):
            stopping.check()


def test_who_asks_twice_does_not_wait():
    with stopping.finishing():
        stopping.request(signal.SIGINT)
        with pytest.raises(Stopped):
            stopping.request(signal.SIGINT)


WORK = """
import time
from qncd_cli import stopping
stopping.GRACE = 0.01
try:
    with stopping.finishing():
        stopping.request(15)
        time.sleep(60)
except stopping.Stopped as stopped:
    print(stopped.number)
"""


def test_a_piece_that_takes_too_long_is_stopped():
    """In a process of its own: what other tests have loaded may have left this one's handlers a
    stack that is gone (backends/onnx/signal_stack.py)."""
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("15", 0), done.stderr


def test_what_is_written_after_the_piece_has_all_the_time_it_needs():
    with stopping.finishing():
        stopping.request(signal.SIGTERM)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= stopping.GRACE
        assert stopping.wanted()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
