"""`map` in threads: in order, bounded, ended by an error or by a consumer that wants no more."""

import threading
import time

import pytest

from fasttrain.data.map_ahead import map_ahead


def test_results_come_in_order_a_bounded_number_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    results = []
    for result in map_ahead(work, range(20), workers=3, depth=4):
        results.append(result)
        assert len(begun) <= len(results) + 4
    assert results == [item * item for item in range(20)]


def test_what_has_not_begun_is_cancelled() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            go_on.wait()
        return item

    ahead = map_ahead(work, range(100), workers=1, depth=8)
    assert next(ahead) == 0
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert max(begun) <= 1


def test_an_error_comes_where_its_result_would() -> None:
    ahead = map_ahead(lambda item: 1 // item, (1, 0, 1), workers=2)
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        next(ahead)
