"""Parts of a pass that are shared out: to several devices, each with a thread of its own, or to processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from heapq import heapreplace
from typing import Final, TypeVar

_Part = TypeVar("_Part")
_Made = TypeVar("_Made")

# Parts of each device that are begun before the first of them is used: one that is computed, and one that waits.
_AHEAD: Final = 2


def shared_out(work: Callable[[int, _Part], _Made], parts: Iterable[_Part], devices: int) -> Iterator[_Made]:
    """Yield what `work` makes of each part, in the order of the parts, whatever device is faster.

    Part `n` is worked on by device `n % devices`. Few parts are begun before an earlier one is used, so that what they
    make does not pile up. With one device, no thread is begun.

    Args:
        work: called with the number of a device and a part; in the device's own thread.
        parts: the parts.
        devices: the number of devices.
    """
    if devices == 1:
        yield from (work(0, part) for part in parts)
        return
    waiting: deque[Future[_Made]] = deque()
    with ExitStack() as begun:
        threads = [begun.enter_context(ThreadPoolExecutor(1)) for _ in range(devices)]
        begun.callback(lambda: [future.cancel() for future in waiting])
        for number, part in enumerate(parts):
            waiting.append(threads[number % devices].submit(work, number % devices, part))
            if len(waiting) >= _AHEAD * devices:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def hands_of(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal the numbers of texts out by their lengths, so that all hands get about as much; none is empty."""
    held: list[list[int]] = [[] for _ in range(min(count, len(lengths)))]
    sums = [(0, hand) for hand in range(len(held))]  # a heap, whose first hand has the least
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        total, hand = sums[0]
        held[hand].append(number)
        heapreplace(sums, (total + lengths[number], hand))
    return [sorted(hand) for hand in held]
