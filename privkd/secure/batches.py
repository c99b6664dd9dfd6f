"""Work that costs less the more of it is done at once."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Batches(Generic[T]):
    """What comes in while a thread works on one batch is the next. For one event loop."""

    def __init__(self, work: Callable[[Sequence[T]], Sequence[Exception | None]], name: str) -> None:
        """``work``: on a batch, in a thread of this ``name``; of each why it failed, if it did."""
        self._work = work
        self._pool = ThreadPoolExecutor(1, name)
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._working: asyncio.Task[None] | None = None

    async def done(self, item: T) -> None:
        """Return once it is done, or raise why it failed."""
        outcome = asyncio.get_running_loop().create_future()
        self._waiting.append((item, outcome))
        if self._working is None:
            self._working = asyncio.create_task(self._all())
        await outcome

    async def _all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            items = [item for item, _ in batch]
            try:
                failures = await asyncio.get_running_loop().run_in_executor(self._pool, self._work, items)
            except Exception as error:
                failures = [error] * len(batch)
            for (_, outcome), failure in zip(batch, failures, strict=True):
                # Whoever gave up is told nothing.
                if outcome.done():
                    continue
                if failure is None:
                    outcome.set_result(None)
                else:
                    outcome.set_exception(failure)
        self._working = None

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
