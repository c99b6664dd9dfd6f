"""``device.toml``: what a device's owner decides, and nobody else can change.

A cloud's plan is held against it when the owner agrees and again when the device starts, so that a bound that
was tightened since holds for runs of before.
"""

import json
import tomllib
from datetime import datetime, time
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from privkd.channels.registry import known
from privkd.config import Positive, PositiveFloat, Settings
from privkd.config.mistakes import in_words
from privkd.deployment.published import PublishedPlan
from privkd.errors import ConfigError, RunError
from privkd.privacy.events import Budget, Unit

DEVICE_FILE = "device.toml"
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=True)]
Time = Annotated[str, Field(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]


class RecordsConfig(Settings):
    """Where the private records are; the first fields are as of `DataConfig`.

    Attributes:
        source: a path, ``package.module:function``, or the name of an embedded data set.
        data_dir: the base of a relative path.
        label: the column or array of the labels.
        drop: columns that are neither features nor label.
        text: the column, or the field of JSON lines, that holds the text.
        header: whether a CSV file begins with names.
        image_size: side of the square that image files are brought to, as the cloud says.
        delimiter: what separates the cells of a CSV file.
        decimal: what stands before the fraction of its numbers.
        missing: whether records with a missing value are refused or dropped, where the plan fills none.
        part: ``[number, devices]`` of a public data set, for trials: the shard of the device of that number
            in a simulation of so many devices at its default settings.
    """

    source: Annotated[str, Field(min_length=1)]
    data_dir: Path | None = None
    label: str | None = None
    drop: tuple[str, ...] = ()
    text: str | None = None
    header: Literal["auto", "yes", "no"] = "auto"
    image_size: Annotated[int, Field(ge=1)] | None = None
    delimiter: Literal["auto", "comma", "semicolon", "tab"] = "auto"
    decimal: Literal["point", "comma"] = "point"
    missing: Literal["refuse", "drop"] = "refuse"
    part: tuple[Annotated[int, Field(ge=0)], Positive] | None = None

    @model_validator(mode="after")
    def _a_part_of_it(self) -> "RecordsConfig":
        if self.part is not None and self.part[0] >= self.part[1]:
            raise ValueError(f"part={list(self.part)}: expected a number below that of the devices")
        return self


class BudgetConfig(Settings):
    """The most that is ever spent, over all runs and clouds; ``privkd device budget`` changes it.

    Attributes:
        epsilon: of any one record; add or remove one record of this device.
        device_epsilon: of all that the device contributes; zero out its whole contribution.
        delta: of both.
    """

    epsilon: Epsilon = 3.0
    device_epsilon: Epsilon = inf
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @property
    def budgets(self) -> tuple[Budget, Budget]:
        """As a ledger holds them."""
        record = Budget(Unit.RECORD, self.epsilon, self.delta)
        return record, Budget(Unit.DEVICE, self.device_epsilon, self.delta)


class BoundsConfig(Settings):
    """What a plan may ask for at most.

    Attributes:
        max_epsilon_per_run: of a record, at the owner's delta.
        max_device_epsilon_per_run: of the device, likewise.
        minimum_devices: fewest devices whose answers are added up; 1 lets the cloud see this device's own.
        max_rho: zCDP price of one release; none allows a release without noise.
        max_steps: of DP-SGD in one round.
        max_queries: in one round.
        max_rounds: of a run.
        models: each ``package.module:factory`` that may be imported and run here.
    """

    max_epsilon_per_run: Epsilon = 3.0
    max_device_epsilon_per_run: Epsilon = inf
    minimum_devices: Positive = 2
    max_rho: PositiveFloat | None = None
    max_steps: Positive = 1000
    max_queries: Positive = 10_000
    max_rounds: Positive = 100
    models: tuple[str, ...] = ()


class HoursConfig(Settings):
    """When the device may train, by its own clock; over midnight where ``end`` lies before ``start``."""

    start: Time = "00:00"
    end: Time = "00:00"

    def allow(self, now: datetime) -> bool:
        """Whether ``now`` lies within. Equal hours are the whole day."""
        start, end, at = time.fromisoformat(self.start), time.fromisoformat(self.end), now.time()
        if start < end:
            return start <= at < end
        return start == end or at >= start or at < end


class AggregatorsConfig(Settings):
    """The aggregators that the owner trusts, by rank, and by what they are reached.

    Attributes:
        urls: their addresses, the third party's last if there is one.
        keys: their public keys in hexadecimal, pinned.
        ca: authority of their certificates; none for the system's.
        certificate: the device's own; its common name is the device's.
        key: of ``certificate``.
    """

    urls: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class Owner(Settings):
    """All of ``device.toml``.

    Attributes:
        name: of the device, as on a plan's roster; for good.
        state: folder of the key, the ledger and the student, for the device's user alone.
        socket: where the courier reaches it.
        threads: of a training.
        nice: how far the process stands back for others.
        encoders: the frozen encoders that this device has, which a plan names by their digests: folders in
            Hugging Face's layout, or each ``package.module:function``, which may then be run here.
        records: see `RecordsConfig`.
        budget: see `BudgetConfig`.
        bounds: see `BoundsConfig`.
        hours: see `HoursConfig`.
        aggregators: see `AggregatorsConfig`.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    state: Path = Path("state")
    socket: Path = Path("device.sock")
    threads: Positive = 1
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    encoders: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    records: RecordsConfig
    budget: BudgetConfig = BudgetConfig()
    bounds: BoundsConfig = BoundsConfig()
    hours: HoursConfig = HoursConfig()
    aggregators: AggregatorsConfig = AggregatorsConfig()

    @field_validator("threads")
    @classmethod
    def _a_few(cls, threads: int) -> int:
        if threads > 256:
            raise ValueError("expected at most 256")
        return threads

    def check(self, plan: PublishedPlan) -> None:
        """Hold the public ``plan`` against the bounds and the pins; its figures are believed here.

        Raises:
            ConfigError: it asks for more than the owner allows; the message names the bound.
        """
        number = plan.number(self.name)
        if len(set(plan.roster)) < len(plan.roster):
            raise ConfigError("the plan's roster names a device twice")
        self._check_sizes(plan)
        self._check_models(plan, number)
        self._check_channel(plan)

    def _check_sizes(self, plan: PublishedPlan) -> None:
        bounds, config = self.bounds, plan.config
        rho = inf if plan.rho is None else plan.rho
        for name, asked, most in (
            ("max_rounds", config.rounds, bounds.max_rounds),
            ("max_steps", config.student.dp.steps, bounds.max_steps),
            ("max_queries", plan.queries, bounds.max_queries),
            ("max_rho", rho, inf if bounds.max_rho is None else bounds.max_rho),
        ):
            if asked > most:
                raise ConfigError(f"the plan asks for {asked:g}, but bounds.{name}={most:g}")

    def _check_models(self, plan: PublishedPlan, number: int) -> None:
        student = plan.config.student
        asked = [student.models[number % len(student.models)].name]
        if student.needs_teacher:
            asked.append(plan.config.teacher.model.name)
        for name in asked:
            if ":" in name and name not in self.bounds.models:
                raise ConfigError(f"the plan would run {name!r} here, which bounds.models does not list")

    def _check_channel(self, plan: PublishedPlan) -> None:
        channel, own = plan.config.channel, self.aggregators
        fewest = 1 if known(channel.kind).shows_each else channel.minimum_devices or len(plan.roster)
        if fewest < self.bounds.minimum_devices:
            seen = (
                "the cloud would see this device's own answers" if fewest == 1 else f"over {fewest} devices"
            )
            least = f"bounds.minimum_devices={self.bounds.minimum_devices}"
            raise ConfigError(f"answers are released over too few devices ({seen}): {least}")
        if not known(channel.kind).has_parties:
            return
        if not channel.aggregator_urls or not channel.aggregator_keys:
            raise ConfigError("the plan names no aggregators that a device elsewhere could reach and know")
        if channel.aggregator_keys != own.keys or channel.aggregator_urls != own.urls:
            raise ConfigError(
                "the plan's aggregators are not those of [aggregators]: an address or a key differs"
            )


def load_owner(path: Path) -> Owner:
    """The owner's settings at ``path``; its paths are taken relative to the file's folder.

    Raises:
        ConfigError: the file is missing, not TOML, or a setting is wrong.
    """
    try:
        tree = tomllib.loads(path.read_text())
        owner = Owner.model_validate(tree)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; `privkd device init` writes one") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {in_words(error, Owner)}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return _anchored(owner, path.resolve().parent)


def _anchored(owner: Owner, folder: Path) -> Owner:
    own, records = owner.aggregators, owner.records
    files = {name: _below(folder, getattr(own, name)) for name in ("ca", "certificate", "key")}
    data_dir = folder if records.data_dir is None else folder / records.data_dir
    return owner.model_copy(
        update={
            "state": folder / owner.state,
            "socket": folder / owner.socket,
            "encoders": tuple(name if ":" in name else str(folder / name) for name in owner.encoders),
            "records": records.model_copy(update={"data_dir": data_dir}),
            "aggregators": own.model_copy(update=files),
        }
    )


def _below(folder: Path, path: Path | None) -> Path | None:
    return None if path is None else folder / path


def write_owner(folder: Path, name: str, source: str) -> Path:
    """Write a commented ``device.toml`` into ``folder``, for its owner to go through.

    Raises:
        ConfigError: a value is wrong.
        RunError: there is one already, or it cannot be written.
    """
    text = _TEMPLATE.format(name=json.dumps(name), source=json.dumps(source))
    try:
        Owner.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise ConfigError(in_words(error, Owner)) from None
    path = folder / DEVICE_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
    return path


_TEMPLATE = """\
# Settings of this device. They are its owner's: no cloud can change them. Paths are relative to this file.

name = {name}              # as on the roster of a plan, for good; over NVFlare without dots
state = "state"                # root key, ledger, student: for this device's user alone
socket = "device.sock"         # where the courier brings questions
threads = 1                    # of a training
nice = 0                       # 0 to 19: how far it stands back for others
encoders = []                  # folders of frozen encoders that a plan may ask for by digest

[records]                      # private; they never leave
source = {source}          # a file, a folder, or package.module:function
# label = "diagnosis"          # column or array of the labels
# drop = ["id"]                # columns that are neither features nor label
# text = "note"                # the column, or field of JSON lines, that holds the text
# header = "auto"              # whether a CSV file begins with names
# image_size = 32              # the square that image files are brought to, as the cloud says
# part = [0, 5]                # for trials: device 0 of 5 of an embedded data set

[budget]                       # for good, over all runs and clouds; `privkd device budget` changes it
epsilon = 3.0                  # any one record
device_epsilon = inf           # all that this device contributes
delta = 1e-5

[bounds]                       # a plan that asks for more is refused
max_epsilon_per_run = 3.0
max_device_epsilon_per_run = inf
minimum_devices = 2            # 1 lets the cloud see this device's own answers
# max_rho = 0.5                # zCDP price of one release; without it noise may be missing
max_steps = 1000
max_queries = 10000
max_rounds = 100
models = []                    # each package.module:factory that may run here

[hours]                        # when it may train; equal hours are the whole day
start = "00:00"
end = "00:00"

[aggregators]                  # whom the owner trusts, in the order of their ranks
urls = []
keys = []                      # their public keys, pinned
# ca = "ca.pem"
# certificate = "device.pem"
# key = "device.key"
"""
