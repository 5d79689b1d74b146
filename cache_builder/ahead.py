"""Work done ahead of its use, in order, never more than a few items ahead.

Threads, not processes: decoding, resizing, hashing, compressing and the teacher itself run outside
Python's lock, and pixels need no copy from one process to another.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Generic[Item, Result]):
    """`map(work, items)` whose first `depth` results are under way before they are asked for.

    An exception of `work` is raised where its result would have come.
    """

    def __init__(
        self, work: Callable[[Item], Result], items: Iterable[Item], pool: Executor, depth: int
    ) -> None:
        self._work, self._items, self._pool = work, iter(items), pool
        self._waiting: deque[Future[Result]] = deque()
        for _ in range(depth):
            self._submit()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._waiting:
            raise StopIteration
        result = self._waiting.popleft().result()
        self._submit()
        return result

    def _submit(self) -> None:
        for item in self._items:
            self._waiting.append(self._pool.submit(self._work, item))
            return
