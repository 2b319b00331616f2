"""Seconds by stage: each second counts once, whatever stages are inside each other."""

from __future__ import annotations

import threading
import time

import pytest

from resmoe_dist.compression.stages import record_stages, stage


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time; tests move it."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def test_seconds_of_an_inner_stage_are_not_counted_for_the_outer_one(clock):
    with record_stages() as seconds, stage("encode"):
        clock.now = 1
        with stage("center"):
            clock.now = 3
            with stage("threshold"):
                clock.now = 4
        with stage("threshold"):
            clock.now = 9
        clock.now = 16
    assert seconds == {"encode": 1 + 7, "center": 2, "threshold": 1 + 5}


def test_stages_that_follow_each_other_add_up(clock):
    with record_stages() as seconds:
        for taken in (1, 2, 4):
            with stage("read"):
                clock.now += taken
            clock.now += 100
    assert seconds == {"read": 7}


def test_decorated_function_counts_every_call(clock):
    @stage("write")
    def write(taken):
        clock.now += taken
        return taken

    with record_stages() as seconds:
        assert (write(1), write(2)) == (1, 2)
    assert write(4) == 4
    assert seconds == {"write": 3}


def test_stage_that_fails_counts_and_ends(clock):
    with record_stages() as seconds, stage("encode"):
        with pytest.raises(ValueError, match="damaged"), stage("read"):
            clock.now = 5
            raise ValueError("damaged")
        clock.now = 7
    assert seconds == {"read": 5, "encode": 2}


def test_stages_in_other_threads_count_beside_each_other(clock):
    def work():
        with stage("read"):
            entered.wait(10)
            leave.wait(10)

    entered, leave = threading.Barrier(3), threading.Barrier(3)
    with record_stages() as seconds, stage("encode"):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        entered.wait(10)
        clock.now = 3
        leave.wait(10)
        for thread in threads:
            thread.join()
    assert seconds == {"read": 6, "encode": 3}


def test_one_recorder_at_a_time():
    with record_stages(), pytest.raises(AssertionError, match="already"), record_stages():
        pass
    with record_stages() as seconds:
        assert seconds == {}
