"""How the devices' answers reach the cloud.

`register` adds a kind of your own: a class that inherits `Channel`. Everything is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privkd.channels.channel import Channel
    from privkd.channels.registry import KINDS, Kind, open_channel, register

_HOME_OF = {"Channel": "channel", **dict.fromkeys(("KINDS", "Kind", "open_channel", "register"), "registry")}

__all__ = ["KINDS", "Channel", "Kind", "open_channel", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'privkd.channels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"privkd.channels.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
