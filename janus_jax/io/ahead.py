"""Work that waits for answers, done a few items ahead."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    items: Iterable[T], function: Callable[[T], R], at_once: int, ahead: Callable[[T], bool]
) -> Iterator[tuple[T, R]]:
    """Each of `items` and what `function` makes of it, in order.

    Args:
      at_once: how many items are worked on at the same time, in threads.
      ahead: whether an item may be worked on before those before it are taken; others are, in this thread, when it is
        their turn.
    """
    waiting: collections.deque[tuple[T, concurrent.futures.Future[R]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for item in items:
            early = ahead(item)
            while waiting and (not early or len(waiting) >= 2 * at_once):
                before, future = waiting.popleft()
                yield before, future.result()
            if early:
                waiting.append((item, pool.submit(function, item)))
            else:
                yield item, function(item)
        yield from ((item, future.result()) for item, future in waiting)
