"""Work on the pieces of a bundle, several at a time and in their order, each hashed before it is used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Watch = Callable[[str, int, int, str], None]
AT_ONCE = 4  # pieces on their way: a store answers late, and each takes up to 64 MiB of memory


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """What `work` gives for each of `items`, in their order; few are ahead of what was taken."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_part(path: Path, offset: int, count: int) -> bytes:
    """The bytes of a file from `offset` on: `count`, or fewer where it ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def digest_of(content: bytes) -> str:
    """The sha256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
