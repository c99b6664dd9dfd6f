"""Whether CrypTen is here, found out without loading it, torch or anything else that is heavy."""

import importlib.util
from typing import TYPE_CHECKING

from privkd.channels.registry import WITHOUT_PARTIES, known
from privkd.errors import ConfigError

if TYPE_CHECKING:
    from privkd.config import ChannelConfig

CRYPTEN_COMMAND = "pip install --no-deps crypten==0.4.1"


def has_crypten() -> bool:
    """Whether CrypTen is installed; that it loads is not tried."""
    return importlib.util.find_spec("crypten") is not None


def check_crypten() -> None:
    """Raise ``ConfigError``, with the command that installs it, where CrypTen is missing."""
    if not has_crypten():
        raise ConfigError(
            "the secure channel needs CrypTen, which is missing: run `privkd doctor --fix`, which is "
            f"`{CRYPTEN_COMMAND}`, or take channel.kind {' or '.join(map(repr, WITHOUT_PARTIES))}"
        )


def check_channel(channel: "ChannelConfig") -> None:
    """Raise as `check_crypten` where the parties behind ``channel`` would run here, and so need it."""
    if known(channel.kind).has_parties and not channel.aggregator_urls:
        check_crypten()
