"""How much of a service each caller may take: calls at once, calls a second, bytes in memory."""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator

from privkd.errors import ChannelError
from privkd.secure.certificates import CLOUD
from privkd.secure.party import LimitsConfig

_BURST_SECONDS = 10.0


class TooManyCallsError(ChannelError):
    """A caller takes more than its part; it may try again later."""


class Callers:
    """The callers by the names in their certificates. For one thread.

    Callers without names, as there are on the loopback interface alone, are not told apart, so not limited.
    Nor is the cloud, which can do more harm than that.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        """``limits``: may be replaced at any time."""
        self.limits = limits
        self._calls: Counter[str] = Counter()
        self._allowance: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def admitted(self, caller: str | None) -> Iterator[None]:
        """Count a call of this caller for as long as it is on.

        Raises:
            TooManyCallsError: it has too many on, or calls too often.
        """
        if caller in (None, CLOUD):
            yield
            return
        if self._calls[caller] >= self.limits.calls_per_caller:
            raise TooManyCallsError(
                f"{caller!r} has {self.limits.calls_per_caller} calls on already; try again later"
            )
        self._spend(caller)
        self._calls[caller] += 1
        try:
            yield
        finally:
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]

    def _spend(self, caller: str) -> None:
        """One call of a bucket that fills by the second, up to that of ten seconds."""
        now, rate = time.monotonic(), self.limits.calls_per_second
        left, then = self._allowance.get(caller, (rate * _BURST_SECONDS, now))
        left = min(rate * _BURST_SECONDS, left + (now - then) * rate)
        if left < 1.0:
            raise TooManyCallsError(f"{caller!r} calls more than {rate:g} times a second; try again later")
        self._allowance[caller] = left - 1.0, now


class ByteBudget:
    """Bytes that bodies may take in memory, given out in the order of asking. For one event loop."""

    def __init__(self, size: int) -> None:
        """``size``: of all together; a larger body waits until it is alone."""
        self._size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes; waits until they are free."""
        wanted = min(size, self._size)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            # Whoever gave up while it waited had nothing yet.
            if turn.done() and not turn.cancelled():
                self._free += wanted
            self._serve()

    def resize(self, size: int) -> None:
        """Give out ``size`` bytes in all from now on."""
        self._free += size - self._size
        self._size = size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if wanted > self._free:
                    return
                self._free -= wanted
                turn.set_result(None)
            self._waiting.popleft()
