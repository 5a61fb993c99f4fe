"""map_ahead: order, bounded work in advance, cancellation and exceptions."""

import threading
import time

import pytest

from fasttrain.data.map_ahead import map_ahead


def test_results_are_in_order_and_computed_a_bounded_number_ahead() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    results = []
    for result in map_ahead(work, range(20), workers=3, depth=4):
        results.append(result)
        assert len(started) <= len(results) + 4
    assert results == [item * item for item in range(20)]


def test_closing_cancels_queued_calls() -> None:
    started: list[int] = []
    may_finish = threading.Event()

    def work(item: int) -> int:
        started.append(item)
        if item:
            may_finish.wait()
        return item

    results = map_ahead(work, range(100), workers=1, depth=8)
    assert next(results) == 0
    threading.Timer(0.05, may_finish.set).start()
    results.close()
    assert max(started) <= 1


def test_an_exception_is_raised_in_place_of_the_result() -> None:
    results = map_ahead(lambda item: 1 // item, (1, 0, 1), workers=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
