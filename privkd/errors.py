"""Errors that people read: what was wrong, which value, what to do.

The tree::

    PrivkdError                 exit code 1
    ├── InputError              exit code 2: something the caller gave is wrong
    │   ├── ConfigError         a setting: unknown key, bad value
    │   ├── DataError           a data set: missing, corrupt, wrong shape
    │   ├── ModelError          a model: cannot be built or privately trained
    │   └── RunError            a run folder: missing, foreign, damaged, in use
    ├── BudgetError             exit code 2: the privacy budget would be overspent
    ├── ChannelError            exit code 1: a release failed; nothing left the channel
    │   └── RefusalError        a party of the secure channel refuses, for good
    ├── TrainingError           exit code 1: training diverged; its model was discarded
    ├── InterruptError          exit code 130: told to stop; what was committed stands
    └── AuditAlarm              exit code 3: a lower bound lies above its upper bound

The command line prints the message alone, in one line, and exits with ``exit_code``.
"""

from typing import ClassVar


class PrivkdError(Exception):
    """Base of all errors that privkd raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(PrivkdError):
    """Something the caller gave is wrong; no run was harmed and no budget spent."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown or has a bad value."""


class DataError(InputError):
    """A data set is missing, corrupt or of the wrong shape."""


class ModelError(InputError):
    """A model cannot be built, or cannot be trained with DP-SGD."""


class RunError(InputError):
    """A run folder is missing, damaged, not ours, or in use by another process."""


class BudgetError(PrivkdError):
    """A charge would overspend a privacy budget; it was not booked."""

    exit_code = 2


class ChannelError(PrivkdError):
    """A release failed. Nothing was released."""


class RefusalError(ChannelError):
    """A party of the secure channel will not do what was asked, now or later. ``status`` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class TrainingError(PrivkdError):
    """Training diverged: the weights are not finite. The model was discarded."""


class InterruptError(PrivkdError):
    """A run was told to stop, and can be gone on with."""

    exit_code = 130


class AuditAlarm(PrivkdError):  # noqa: N818  an alarm, not a failure
    """An audit's lower bound exceeds the ledger's upper bound: something is broken."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """What a library's error says, in its first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
