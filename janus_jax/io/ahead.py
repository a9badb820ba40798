"""Work that waits for answers, done a few items ahead."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    items: Iterable[T],
    function: Callable[[T], R],
    pool: Executor,
    ahead: int,
    early: Callable[[T], bool] = lambda item: True,
) -> Iterator[tuple[T, R]]:
    """Each of `items` and what `function` makes of it, in order, worked on by `pool`.

    Args:
      ahead: how many items are worked on, or wait to be taken, at the same time.
      early: whether an item may be worked on before those before it are taken; others are, in this thread, when it is
        their turn.
    """
    waiting: collections.deque[tuple[T, Future[R]]] = collections.deque()

    def taken(at_most: int) -> Iterator[tuple[T, R]]:
        while len(waiting) > at_most:
            item, future = waiting.popleft()
            yield item, future.result()

    for item in items:
        if early(item):
            waiting.append((item, pool.submit(function, item)))
            yield from taken(ahead - 1)
        else:
            yield from taken(0)
            yield item, function(item)
    yield from taken(0)
