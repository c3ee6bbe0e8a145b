"""Read an iterator ahead, in a thread."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterator[T], count: int) -> Iterator[Iterator[T]]:
    """Iterate over `items` (none of them None) while a thread reads up to `count` of them ahead.

    An error of `items` is raised at the point where the item would have come. Leaving the context stops the thread, which
    closes `items`.
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
        except BaseException as error:  # raised by taken()
            ready.put(error)
        finally:
            items.close()  # type: ignore[attr-defined]

    def taken() -> Iterator[T]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item

    # A daemon, since a thread that waits for the network would keep the program from exiting.
    thread = threading.Thread(target=read, name="fastheads-reading", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        room.release()
        thread.join(timeout=1)
