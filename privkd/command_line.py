"""The command line's manners: errors in one line with an exit code and no traceback, signals that end a
command as Ctrl-C does, options that are settings, help, the version."""

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from privkd.options import OPTIONS

_INTERRUPTED = 130
_LAB = ("jinja2", "matplotlib", "skimage", "sklearn")
"""What a device is installed without: the embedded data, audits' figures and reports need them."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class OneLineErrors(TyperGroup):
    """Bad input ends in one line on stderr and exit code 2; our own errors in theirs."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and turn errors that are meant for people into one line."""
        kwargs["standalone_mode"] = False
        try:
            with _interrupted_by_signals():
                code = super().main(*args, **kwargs)
        except Exception as error:
            message, code = _for_people(error)
            if message is None:
                raise
            _say(message)
        else:
            if code == _INTERRUPTED:
                _say("stopped; nothing more was spent, and --resume goes on with the run")
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP are as Ctrl-C, so that nothing is left behind that must not be.

    One is enough: a terminal that closes sends several, and the rest would break off the tidying up. What was
    ignored stays so, such as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    ours = [number for number in _ENDING if before[number] is signal.SIG_DFL]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        # After a signal the process is about to end, and no other may hurry it.
        for number in ours:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, before[number])


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these short names where its parameter ``settings`` stands.

    That parameter gets what was typed of them, as text by dotted name.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def typed(**given: Any) -> None:
            settings = {OPTIONS[name].setting: given.pop(name) for name in names}
            command(settings={name: text for name, text in settings.items() if text is not None}, **given)

        signature = inspect.signature(command)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += map(_parameter, names) if parameter.name == "settings" else [parameter]
        typed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return typed

    return decorated


def _parameter(name: str) -> inspect.Parameter:
    option = OPTIONS[name]
    typed = list[str] if option.many else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(None, option.flag, help=option.help),
        annotation=typed | None,
    )


def help_alone(context: typer.Context) -> None:
    """Print the help of a group that was called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def group_or_command(context: typer.Context, *, needed: str) -> None:
    """Print the help of a group that was called with nothing; one that was called with a command lets it run.

    Raises:
        ConfigError: the group's own options were given besides, or without the one that is ``needed``.
    """
    from privkd.errors import ConfigError

    sources = map(context.get_parameter_source, context.params)
    if any(source is not None and source.name != "DEFAULT" for source in sources):
        command = context.invoked_subcommand
        raise ConfigError(
            f"missing option {needed}" if command is None else f"options stand after {command!r}"
        )
    help_alone(context)


def print_version(wanted: bool) -> None:
    """Print the version and end, if ``wanted``."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"privkd {version('privkd')}")
        except PackageNotFoundError:
            typer.echo("privkd, from sources that are not installed")
        raise typer.Exit


def _say(message: str) -> None:
    typer.secho(f"privkd: {' '.join(message.split())}", err=True, fg="red")


def _for_people(error: Exception) -> tuple[str | None, int]:
    from privkd.errors import PrivkdError

    if isinstance(error, PrivkdError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and _package_of(error) in _LAB:
        return f"{_package_of(error)} is not installed, and this needs it: pip install 'privkd[lab]'", 2
    format_message: Callable[[], str] | None = getattr(error, "format_message", None)
    if format_message is not None:
        return f"{format_message()} (see --help)", 2
    return None, 1


def _package_of(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]
