# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Work that a thread does before or after its user needs it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional, TypeVar

__all__ = ['Behind', 'ahead']

T = TypeVar('T')


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next of which is made in a thread while the last is used; None is no item."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, iterator, None)
            yield item


class Behind:
    """A thread that does what it is asked to, in order, while its user goes on; two calls at most wait for it.

    What it raises is raised by the next call, and nothing is done after that.  When the block ends, by an exception
    as well, everything that was asked for has been done.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._error: Optional[Exception] = None

    def __enter__(self) -> 'Behind':
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._check()

    def __call__(self, function: Callable[..., None], *args: Any) -> None:
        self._check()
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
            self._check()
        self._waiting.append(self._pool.submit(self._run, function, *args))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        if self._error is None:
            try:
                function(*args)
            except Exception as error:
                self._error = error
