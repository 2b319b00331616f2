"""Blocks handed to threads: in order, one thread each, and the setting as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.threads import in_parallel

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(three_threads):
    assert list(in_parallel(lambda x: x * x, range(50), device=CPU)) == [x * x for x in range(50)]


def test_each_item_has_one_thread_and_the_setting_is_restored(three_threads):
    found = in_parallel(lambda _: torch.get_num_threads(), range(9), device=CPU)

    assert set(found) == {1}
    assert torch.get_num_threads() == 3


def test_no_more_items_than_threads_and_one_are_taken_ahead(three_threads):
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    for done, _ in enumerate(in_parallel(lambda x: x, items(), device=CPU)):
        assert len(taken) <= done + 1 + 3 + 1


def test_a_failure_reaches_the_caller_and_the_setting_is_restored(three_threads):
    def fail_at_seven(number):
        if number == 7:
            raise ValueError("seven")
        return number

    with pytest.raises(ValueError, match="seven"):
        list(in_parallel(fail_at_seven, range(20), device=CPU))
    assert torch.get_num_threads() == 3


def test_a_caller_that_stops_early_leaves_the_setting_restored(three_threads):
    results = in_parallel(lambda x: x, range(20), device=CPU)
    assert next(results) == 0
    results.close()

    assert torch.get_num_threads() == 3
