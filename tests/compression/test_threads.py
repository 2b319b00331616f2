"""in_parallel: results in order, one thread per item, and the thread setting restored."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.threads import in_parallel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads(set_threads):
    set_threads(3)


def test_results_are_in_the_order_of_the_items():
    assert list(in_parallel(lambda x: x * x, range(50), device=CPU)) == [x * x for x in range(50)]


def test_each_item_has_one_thread_and_the_setting_is_restored():
    found = in_parallel(lambda _: torch.get_num_threads(), range(9), device=CPU)

    assert set(found) == {1}
    assert torch.get_num_threads() == 3


def test_few_items_are_taken_before_their_results_are_used():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    for done, _ in enumerate(in_parallel(lambda x: x, items(), device=CPU)):
        assert len(taken) <= done + 1 + 3 + 1


def test_an_error_reaches_the_caller_and_the_setting_is_restored():
    def fail_at_seven(number):
        if number == 7:
            raise ValueError("seven")
        return number

    with pytest.raises(ValueError, match="seven"):
        list(in_parallel(fail_at_seven, range(20), device=CPU))
    assert torch.get_num_threads() == 3


def test_the_setting_is_restored_if_the_caller_stops_early():
    results = in_parallel(lambda x: x, range(20), device=CPU)
    assert next(results) == 0
    results.close()

    assert torch.get_num_threads() == 3
