"""Timings: fair turns, honest summaries, and limits on their time."""

from __future__ import annotations

import pytest

from benchmarks.timing import Clock, Effort, medians, summary

SMALL = Effort(evicting_bytes=1 << 10, streamed_bytes=1 << 16)


class FakeTime:
    """A clock that work moves forward by a known time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def act() -> None:
            self.now += seconds

        return act


def test_contenders_take_turns_in_random_and_then_in_reversed_order():
    clock, called = Clock(effort=SMALL), []
    work = {name: lambda name=name: called.append(name) for name in "abc"}
    turns = [clock.turn(work) for _ in range(40)]
    assert all(set(turn) == set("abc") and min(turn.values()) > 0 for turn in turns)
    orders = [tuple(called[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(order) == list("abc") for order in orders)
    assert all(a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    assert len(set(orders[::2])) > 3


def test_seconds_are_those_of_each_contender():
    time = FakeTime()
    clock = Clock(effort=SMALL, now=time)
    assert clock.turn({"a": time.work(1), "b": time.work(3)}) == {"a": 1, "b": 3}
    assert clock.timed(lambda: (time.work(2)(), "result")[1]) == ("result", 2)


def test_every_repeat_has_new_contenders_and_preparing_them_is_not_timed():
    time = FakeTime()
    clock, prepared = Clock(repeats=3, effort=SMALL, now=time), []

    def prepare():
        prepared.append(len(prepared) + 1)
        time.now += 100
        return {"a": time.work(prepared[-1])}

    assert clock.compare(prepare) == {"a": summary([1, 2, 3])}
    assert prepared == [1, 2, 3]


def test_contender_that_is_too_slow_gets_one_turn_if_it_may_be_dropped():
    time = FakeTime()
    clock = Clock(repeats=3, effort=SMALL, now=time)
    seconds = {"eager": 1, "batched_mm": 4.1, "grouped_mm": 3.9, "shared": 100}
    work = {name: time.work(taken) for name, taken in seconds.items()}
    found = clock.compare(lambda: work, may_drop=("eager", "batched_mm", "grouped_mm"))
    counts = {name: len(each["all"]) for name, each in found.items()}
    assert counts == {"eager": 3, "batched_mm": 1, "grouped_mm": 3, "shared": 3}
    assert medians(found) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("repeats", "seconds", "made"), [(4, 1e9, 4), (9, 0, 3), (2, 0, 2), (9, 3.5, 4)]
)
def test_repeats_end_in_time_but_not_before_three(repeats, seconds, made):
    time = FakeTime()
    count = 0
    for number in Clock(repeats=repeats, seconds=seconds, effort=SMALL, now=time).repeats():
        assert number == count
        count += 1
        time.now += 1
    assert count == made


def test_memory_speed_counts_bytes_that_are_read_and_written():
    class CountingClock(Clock):
        turns = iter([dict.fromkeys(("sum", "dot", "copy"), 0.1), {"sum": 4, "dot": 2, "copy": 8}])

        def turn(self, contenders):
            for act in contenders.values():
                act()
            return next(self.turns)

    size = SMALL.streamed_bytes
    assert CountingClock(effort=SMALL).memory_speed(repeats=1) == {
        "read": size / 2,
        "copy": size / 8,
    }


def test_summary_has_the_median_and_the_spread():
    assert summary([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "least": 1.0,
        "most": 3.0,
        "all": [3.0, 1.0, 2.0],
    }
