"""An ordered `map` over threads that computes a bounded number of results in advance."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(8, os.cpu_count() or 1)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int = WORKERS,
    depth: int | None = None,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order.

    At most `depth` calls (default: 2 * workers) are queued, running, or finished but not yet consumed. After
    an exception, or if the generator is closed, queued calls are cancelled and running ones are awaited.
    """
    depth = depth or 2 * workers
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
