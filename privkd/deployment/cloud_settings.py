"""``cloud.toml`` and the roster beside it: what an operator of a cloud writes down."""

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from privkd.channels.registry import WITHOUT_PARTIES, known
from privkd.config import ChannelConfig, Config, config_tree, parse_config
from privkd.config.mistakes import in_words
from privkd.config.schema import PositiveFloat, Settings
from privkd.deployment.carriers import Carrier, SocketCarrier
from privkd.errors import ConfigError
from privkd.privacy.events import PartyId
from privkd.records import FileRecord, Record

TEMPLATE = """\
# The cloud of a federation whose devices are elsewhere. Paths are relative to this file.

engine = "socket"                 # what carries questions: "socket" (devices of this machine) or "nvflare"
sockets = "sockets/{device}.sock" # engine "socket": where each device listens
roster = "roster.json"            # written by `privkd cloud enrol`
published = "published"           # what devices are given: plan.json and proxy.safetensors
runs = "runs"                     # a folder for each run, by the name of its plan
patience_seconds = 3600           # how long a round waits for its devices
again_seconds = 300               # whom it has not heard for so long is asked again: longer than they train
answer_seconds = 10               # devices answer at whole multiples of it after a question arrived

# The parties of the secure channel, as `privkd keys` names them; the third party's url is last.
[aggregators]
urls = []                         # ["https://aggregator-0.example:8440", ...]
keys = []                         # their public keys by rank, in hexadecimal; devices pin the same ones
# ca = "ca.pem"
# certificate = "cloud.pem"
# key = "cloud.key"

# With engine = "nvflare": the socket of the server's jobs, and the kit that may submit them.
# [nvflare]
# socket = "desk.sock"
# operator = "operator"

# The settings of the run, as of `privkd train --config`. The roster says how many devices there are.
[run]
rounds = 3

[run.data]
source = "digits"                 # public data: every record of it is the cloud's own
# records_per_device = 140        # about what a device holds: a constant that owners agree to, never a count
# gap = "none"                    # for data of your own; "rare" withholds classes to show what devices add

[run.privacy]
epsilon = 3.0                     # record-level, whole run
# device_epsilon = 8.0            # device-level, whole run

[run.channel]
kind = "secure"                   # plain, noised, or secure, which needs [aggregators]
# minimum_devices = 4             # secure: fewest devices in a release; all of the roster otherwise
"""
_OF_A_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Aggregators(Settings):
    """The parties of the secure channel.

    Attributes:
        urls: of the aggregators by rank, and of the third party if there is one.
        pins: the aggregators' public keys by rank, in hexadecimal, which devices pin too; ``keys`` in TOML.
        ca: the authority of their certificates; ``None`` for the system's.
        certificate: the cloud's own.
        key: of ``certificate``.
    """

    urls: tuple[str, ...] = ()
    # A field by that name would make a mapping of the model.
    pins: tuple[str, ...] = Field((), alias="keys")
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class Nvflare(Settings):
    """Where the server's jobs come to, and the kit that may submit them."""

    socket: Path = Path("desk.sock")
    operator: Path = Path("operator")


class CloudSettings(Settings):
    """A cloud's ``cloud.toml``; see `TEMPLATE`. Its paths are absolute once it is read.

    Attributes:
        engine: what carries questions to the devices.
        sockets: under ``socket``, where a ``{device}`` listens.
        nvflare: of engine ``nvflare``.
        roster: the devices by name.
        published: folder of what devices are given.
        runs: a folder for each run.
        patience_seconds: how long a round waits for its devices.
        again_seconds: whom it has not heard for so long is asked again.
        answer_seconds: see `privkd.deployment.published.PublishedPlan`.
        aggregators: the parties of the secure channel.
        run: the settings of the run.
    """

    engine: Literal["socket", "nvflare"] = "socket"
    sockets: str = "sockets/{device}.sock"
    nvflare: Nvflare = Nvflare()
    roster: Path = Path("roster.json")
    published: Path = Path("published")
    runs: Path = Path("runs")
    patience_seconds: PositiveFloat = 3600.0
    again_seconds: PositiveFloat = 300.0
    answer_seconds: PositiveFloat = 10.0
    aggregators: Aggregators = Aggregators()
    run: Config = Config()

    @field_validator("sockets")
    @classmethod
    def _one_each(cls, value: str) -> str:
        if "{device}" not in value:
            raise ValueError("expected a path with {device} in it, so that each device has its own")
        return value

    @model_validator(mode="after")
    def _time_to_answer(self) -> Self:
        for name in ("again_seconds", "patience_seconds"):
            if getattr(self, name) <= self.answer_seconds:
                raise ValueError(
                    f"{name}={getattr(self, name):g}: no device answers before answer_seconds="
                    f"{self.answer_seconds:g} are over; wait for longer"
                )
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """The settings in a TOML file.

        Raises:
            ConfigError: it is missing, not TOML, or a setting is unknown or wrong.
        """
        try:
            tree = tomllib.loads(path.read_text())
        except OSError as error:
            words = f"{error.strerror or error}; `privkd cloud init` writes one"
            raise ConfigError(f"cloud settings {path}: {words}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"cloud settings {path} is not TOML: {error}") from None
        try:
            found = cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"{path}: {in_words(error, cls)}") from None
        return found._anchored(path.absolute().parent)

    def _anchored(self, folder: Path) -> Self:
        def below(settings: Settings, *names: str) -> dict[str, Any]:
            given = {name: getattr(settings, name) for name in names}
            return {name: folder / path for name, path in given.items() if path is not None}

        parties = self.aggregators.model_copy(update=below(self.aggregators, "ca", "certificate", "key"))
        nvflare = self.nvflare.model_copy(update=below(self.nvflare, "socket", "operator"))
        data = self.run.data.model_copy(update={"data_dir": folder / (self.run.data.data_dir or "")})
        plugins = tuple(str(folder / name) if name.endswith(".py") else name for name in self.run.plugins)
        run = self.run.model_copy(update={"data": data, "plugins": plugins})
        own = below(self, "roster", "published", "runs")
        return self.model_copy(
            update=own
            | {"aggregators": parties, "nvflare": nvflare, "sockets": str(folder / self.sockets)}
            | {"run": run}
        )

    def config(self, roster: "Roster") -> Config:
        """The settings of the run, for the devices on ``roster``.

        Raises:
            ConfigError: nobody is enrolled, or a setting is not one of a run whose devices are elsewhere.
        """
        run, names = self.run, roster.names
        if not names:
            raise ConfigError(f"{self.roster}: nobody is enrolled; `privkd cloud enrol NAME` adds a device")
        if "devices" in run.data.model_fields_set and run.data.devices != len(names):
            raise ConfigError(
                f"run.data.devices={run.data.devices}: the roster has {len(names)}; leave it out"
            )
        if run.channel.dropout:
            raise ConfigError(
                f"run.channel.dropout={run.channel.dropout:g} simulates silence, and real devices fall "
                "silent by themselves: leave it out, and set run.channel.minimum_devices"
            )
        tree = config_tree(run)
        tree["data"]["devices"] = len(names)
        tree["privacy"]["noise"] = "system"
        tree["channel"] |= self._channel(run.channel)
        return parse_config(tree)

    def _channel(self, channel: ChannelConfig) -> dict[str, Any]:
        parties = self.aggregators
        if not known(channel.kind).has_parties:
            return {}
        if not parties.urls or not parties.pins:
            raise ConfigError(
                f"run.channel.kind={channel.kind!r} needs running aggregators: give [aggregators] urls and "
                f"keys, or take {' or '.join(WITHOUT_PARTIES)}"
            )
        files = {name: str(path) for name in ("ca", "certificate", "key") if (path := getattr(parties, name))}
        shown = {"aggregator_urls": list(parties.urls), "aggregator_keys": list(parties.pins)}
        return files | shown | {"aggregators": len(parties.pins)}

    def carrier(self, roster: "Roster") -> Carrier:
        """What carries questions to the devices on ``roster``.

        Raises:
            ConfigError: the engine is not installed, or not set up.
        """
        if self.engine == "socket":
            return SocketCarrier({name: Path(self.sockets.format(device=name)) for name in roster.names})
        try:
            # Nothing but this engine needs its library.
            carrier: Carrier = import_module("privkd.deployment.flare").FlareCarrier(
                self.nvflare.socket, self.nvflare.operator
            )
        except ModuleNotFoundError:
            raise ConfigError("engine='nvflare' is not installed: pip install 'privkd[nvflare]'") from None
        return carrier


class Enrolled(Record):
    """One device on the roster.

    Attributes:
        name: by which the aggregators know it too: the common name of its certificate.
        certificate: where the cloud keeps a copy of that, to say when it ends.
    """

    name: PartyId
    certificate: Path | None = None


class Roster(FileRecord):
    """Who may take part, in order: a device's number is its place."""

    devices: tuple[Enrolled, ...] = ()

    @property
    def names(self) -> tuple[PartyId, ...]:
        """By name."""
        return tuple(device.name for device in self.devices)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The roster at ``path``; empty where there is none yet. Raises `RunError`: it is damaged."""
        return cls.read(path) if path.exists() else cls()

    def joined(self, name: PartyId, certificate: Path | None) -> Self:
        """The roster with one more device, or with another certificate of one that is on it.

        Raises:
            ConfigError: the name cannot be a certificate's and a file's.
        """
        if not _OF_A_DEVICE.fullmatch(name):
            raise ConfigError(
                f"device {name!r}: expected up to 64 of letters, digits, . _ and -, no mark first"
            )
        entry = Enrolled(name=name, certificate=None if certificate is None else certificate.absolute())
        others = {device.name: device for device in self.devices}
        return self.model_copy(update={"devices": tuple((others | {name: entry}).values())})
