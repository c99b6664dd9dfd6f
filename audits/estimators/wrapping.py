"""What both kinds of estimators share: they carry the name and the words of the bound that they wrap."""

from collections.abc import Callable
from typing import Generic, TypeVar

Bound = TypeVar("Bound", bound=Callable[..., float])


class Estimator(Generic[Bound]):
    """A bound behind a call that checks its arguments; ``zero_delta`` says whether delta may be 0."""

    __name__: str

    def __init__(self, bound: Bound, *, zero_delta: bool) -> None:
        # Not update_wrapper: the signature is that of the checked call, not that of what it wraps.
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(bound, name))
        self._bound = bound
        self._zero_delta = zero_delta
