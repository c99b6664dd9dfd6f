"""Privacy-hardened distillation: private students teach the cloud teacher, within a stated budget.

    import audits, privkd

    run = privkd.train(privkd.Config(data="digits", epsilon=3.0), out="runs/first")
    audits.membership(run)

A value that a function gives shows itself as a table, in a terminal and in a notebook; ``to_frame()`` is its
data frame, ``tree()`` its JSON form, ``alarm`` what must stop a release. Nothing heavy is loaded before it is
asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privkd.channels.channel import Channel
    from privkd.config import Config
    from privkd.messages import Question, Release, Task, Upload
    from privkd.prepared import forecast, prepare
    from privkd.privacy.ledger import Ledger
    from privkd.run import Run, load, resume, train

__all__ = [
    "Channel",
    "Config",
    "Ledger",
    "Question",
    "Release",
    "Run",
    "Task",
    "Upload",
    "__version__",
    "forecast",
    "load",
    "prepare",
    "resume",
    "train",
]

_ROOMS = {
    "privkd.channels.channel": ("Channel",),
    "privkd.config": ("Config",),
    "privkd.messages": ("Question", "Release", "Task", "Upload"),
    "privkd.prepared": ("forecast", "prepare"),
    "privkd.privacy.ledger": ("Ledger",),
    "privkd.run": ("Run", "load", "resume", "train"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name from its room, which is loaded now."""
    if name == "__version__":
        return version("privkd")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'privkd' has no attribute {name!r}")
    return getattr(import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
