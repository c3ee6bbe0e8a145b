"""Read an iterator in a thread, ahead of its use."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterator[T], count: int) -> Iterator[Iterator[T]]:
    """Iterate over `items`, none of which is None, with a thread that reads up to `count` of them ahead.

    An error of `items` is raised in its place. Leaving the context stops the thread, which closes `items`.
    """
    ready: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(count)
    stop = threading.Event()

    def read() -> None:
        try:
            room.acquire()
            while not stop.is_set():
                item = next(items, None)
                ready.put(item)
                if item is None:
                    return
                room.acquire()
        except BaseException as error:  # raised below, in its place
            ready.put(error)
        finally:
            items.close()  # type: ignore[attr-defined]

    def taken() -> Iterator[T]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item

    # A daemon: one that waits for the network would hold up the end of the program.
    thread = threading.Thread(target=read, name="fastheads-reading", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        room.release()
        thread.join(timeout=1)
