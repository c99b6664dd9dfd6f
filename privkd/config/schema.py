"""The settings of a run: frozen and validated. Every field is public."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from privkd.channels.registry import KINDS, NOISY, OURS, SHOW_EACH, known
from privkd.config.labels import canonical_number, same_number
from privkd.config.mistakes import in_words
from privkd.errors import ConfigError
from privkd.options import put, setting_of
from privkd.plugins import is_loaded
from privkd.secure.normcheck import MAX_PROJECTIONS, MIN_PROJECTIONS

# Nothing sensible lies beyond, and float32 or an operating system's timer may not reach it.
_LARGEST = 10**9
_LONGEST_WAIT = 86_400.0
_MOST_ROUNDS = 100_000
_WIDEST = 4096
_LARGEST_VOCABULARY, _LONGEST = 1 << 20, 1 << 14

Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, le=_LARGEST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=True)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error.

    A group that is given in part, as a mapping or as an object, keeps the rest of the defaults of the field
    that it is given to; these may differ from those of its class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def tree_of(cls, given: Any) -> Any:
        """``given`` for such a group, as a mapping of what it sets; what is none is left to be refused."""
        return given.model_dump(exclude_unset=True) if isinstance(given, cls) else given

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        return cls.model_construct()._under(given)

    def _under(self, given: Any) -> Any:
        """``given`` over what this object sets."""
        tree = self.tree_of(given)
        if not isinstance(tree, Mapping):
            return tree
        own = dict(iter(self))  # a field may be called `keys`, which would make a mapping of it
        return {name: own[name] for name in self.model_fields_set} | {
            name: own[name]._under(value) if isinstance(own.get(name), Settings) else value
            for name, value in tree.items()
        }

    @field_validator("*", mode="before")
    @classmethod
    def _unambiguous(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are no values of this setting")
        texts = (
            text for text in (value if isinstance(value, list | tuple) else (value,)) if isinstance(text, str)
        )
        if any(not text.isascii() and text != text.encode(errors="replace").decode() for text in texts):
            raise ValueError("expected text in Unicode")
        return value


class DataConfig(Settings):
    """Which records exist, and who holds them.

    Attributes:
        source: ``digits`` or ``docstrings`` (embedded), ``mnist``, ``cifar10``, a path (npz, CSV, Parquet,
            JSON lines, a folder of images, of texts or of IDX files), ``package.module:function``, or a name
            that a plug-in registers.
        data_dir: where ``mnist`` and ``cifar10`` lie; also the base of a relative path.
        public: a source of public labelled records: then all records of ``source`` are the devices', and what
            everybody may know, such as classes and scale, comes from this one. It is taken whole: part of it
            plays validation, and proxy and test where these are not given.
        proxy: a source of the unlabelled public inputs; labels in it are passed over.
        test: a source of the global test set, in place of one that the data bring or that is drawn.
        devices: number of devices, a public constant.
        records_per_device: the nominal size of a device's training shard. It is public and fixes the
            normaliser of the noised gradients; a device's true count never does. ``None``: by source, and
            fewer where the devices are too many for that.
        persons_per_device: the nominal number of persons on a device, where ``group`` says whose records are:
            public, and never a true count. Training per person is normalised by it. ``None``: in a simulation
            that of all records.
        records_per_person: the most records that one person has on a device; of more, those behind in the
            source are dropped. ``None``: in a simulation the most that anybody has.
        public_records: size of the public labelled set, validation apart. ``None``: by source.
        validation_records: size of the public labelled validation set, of the same kind. ``None``: by source.
        proxy_records: size of the unlabelled public proxy set. ``None``: by source.
        test_records: size of the global test set, drawn where the data bring none. ``None``: by source.
        classes: the label space by name, in the order of the class numbers; as text, with commas between.
            Labels are compared as text; a whole number is the same with and without a point and zeros:
            ``3``, ``"3"`` and ``3.0`` are one class, ``"03"`` is another.
            Private records with another label are dropped. ``None``: the source's own, or in a simulation of
            the user's own file those that occur in it.
        scale: what whole-number features are divided by. ``None``: bytes by 255, unless those of the public
            records are 0/1 flags; images in other whole numbers by 255 or 65535, as those of the public
            records reach; others are left as they are.
        standardise: whether each feature of a table of numbers is brought to mean 0 and deviation 1 by the
            public records, and clipped at 5 deviations; ``auto`` does so to CSV and Parquet files, and to
            arrays ``[record, feature]`` that are no whole numbers by type. 0/1 flags stay.
        image_size: side of a square, in pixels, that all image files are brought to: the shorter side is
            resized to it, what is longer is cut at both ends. ``None``: all must be of one size.
        label: the column of a table, or the array of an npz archive, that holds the labels; a column without
            a name by its number from 1. ``None``: the one that is called like a label; without a header
            the last.
        drop: columns of a table that are neither features nor label; as text, with commas between.
        group: the column of a table, or the array of an npz archive, that says whose record each is, such as
            a writer or a patient; no feature. All records of one group have one role, and are on one device.
            This is the natural partition, in place of ``partition``.
        text: the column of a table, or the field of JSON lines, that holds the record's text; other columns
            but the label are left out. ``None``: of JSON lines ``text``; a table has none.
        tokenizer: a ``tokenizer.json`` of the tokenizers library, whose id 0 pads. ``None``: one is learned
            from the text of the public records.
        vocabulary: how many tokens a tokenizer learns at most; of ``tokens`` how many there are, the last of
            them unknown. ``None``: 2000; or by the largest of the public records.
        length: of each record in tokens; longer ones are cut. ``None``: that which 95 % of the public texts
            do not exceed, 64 at most; or as arrays have it.
        tokens: whether whole-number arrays ``[record, position]`` are token ids, of which 0 pads.
        header: whether the first line of a CSV file names the columns; ``auto`` asks where that is doubtful.
        delimiter: what separates the cells of a CSV or TSV file; ``auto`` takes tabs in a ``.tsv``, else
            commas, and asks where the first line has as many cells by something else.
        decimal: what stands before the fraction of a number in such a file.
        missing: what is done about missing features of a table: ``refuse`` them, fill them with the ``mean``
            or the ``most-frequent`` value of the public records (of text always the latter), or ``drop``
            their records.
        categorical: columns of a table whose values are names, whatever they spell; as text, with commas
            between. Text columns are, where the public records hold few different values.
        device_test_records: size of each device's own test set, of its own distribution.
        partition: how private records fall to devices.
        dirichlet_alpha: concentration of ``dirichlet``; small is uneven.
        classes_per_device: how many classes a device holds under ``classes``.
        gap: what the public labelled data lack and devices know: ``rare`` classes (kept at
            ``rare_share`` of their fair share), ``withheld`` classes (none at all), a shifted ``style``
            (devices, proxy and tests see an altered rendering that the public set does not), ``none``. Where
            ``public`` is given, that lacks what it lacks, and nothing is taken from it.
        gap_classes: the classes concerned. ``None``: half of them, chosen by the seed.
        rare_share: see ``gap``.
    """

    source: str = "digits"
    data_dir: Path | None = None
    public: Annotated[str, Field(min_length=1)] | None = None
    proxy: Annotated[str, Field(min_length=1)] | None = None
    test: Annotated[str, Field(min_length=1)] | None = None
    devices: Positive = 5
    records_per_device: Positive | None = None
    persons_per_device: Positive | None = None
    records_per_person: Positive | None = None
    public_records: Positive | None = None
    validation_records: Positive | None = None
    proxy_records: Annotated[int, Field(ge=0)] | None = None
    test_records: Positive | None = None
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    scale: PositiveFloat | None = None
    standardise: Literal["auto", "yes", "no"] = "auto"
    image_size: Annotated[int, Field(ge=1, le=_WIDEST)] | None = None
    label: Annotated[str, Field(min_length=1)] | None = None
    drop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    group: Annotated[str, Field(min_length=1)] | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    tokenizer: Path | None = None
    vocabulary: Annotated[int, Field(ge=3, le=_LARGEST_VOCABULARY)] | None = None
    length: Annotated[int, Field(ge=1, le=_LONGEST)] | None = None
    tokens: bool = False
    header: Literal["auto", "yes", "no"] = "auto"
    delimiter: Literal["auto", "comma", "semicolon", "tab"] = "auto"
    decimal: Literal["point", "comma"] = "point"
    missing: Literal["refuse", "mean", "most-frequent", "drop"] = "refuse"
    categorical: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    device_test_records: Annotated[int, Field(ge=0)] = 20
    partition: Literal["iid", "dirichlet", "classes"] = "iid"
    dirichlet_alpha: PositiveFloat = 1.0
    classes_per_device: Positive = 2
    gap: Literal["rare", "withheld", "style", "none"] = "rare"
    gap_classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    rare_share: Share = 0.1

    @field_validator("classes", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            canonical_number(str(label))
            if type(label) in (int, float)
            else label.strip()
            if isinstance(label, str)
            else label
            for label in value
        )

    @field_validator("label", "group", "text", mode="before")
    @classmethod
    def _number_too(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("drop", "categorical", mode="before")
    @classmethod
    def _columns_by_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")]
        if type(value) is int:
            value = [value]
        if not isinstance(value, list | tuple):
            return value
        return tuple(str(name) if type(name) is int else name for name in value)

    @property
    def own_files(self) -> dict[str, str]:
        """The sources that are given beside ``source``, by their roles: ``public``, ``proxy``, ``test``."""
        given = {"public": self.public, "proxy": self.proxy, "test": self.test}
        return {role: source for role, source in given.items() if source is not None}

    @property
    def simulated_gap(self) -> Literal["rare", "withheld", "style", "none"]:
        """``gap``, or ``none`` where the public records are the user's own."""
        return self.gap if self.public is None else "none"

    @model_validator(mode="after")
    def _files_say_it(self) -> Self:
        for role, source in self.own_files.items():
            records = f"{role}_records"
            if getattr(self, records) is not None:
                raise ValueError(f"{records}={getattr(self, records)}: data.{role}={source!r} is taken "
                                 "whole; give one of them")  # fmt: skip
        if self.public is not None and self.gap in ("withheld", "style"):
            raise ValueError(f"gap={self.gap!r}: data.public={self.public!r} lacks what it lacks, and "
                             "nothing is taken from it; leave out one of them")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.group is not None and self.partition != "iid":
            raise ValueError(f"group={self.group!r}: its records stay together, which partition="
                             f"{self.partition!r} would divide; give one of them")  # fmt: skip
        return self

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        numbers = map(same_number, value or ())
        spelt = [
            label if number is None else number for label, number in zip(value or (), numbers, strict=True)
        ]
        if "" in spelt or len(set(spelt)) < len(spelt):
            raise ValueError("a class is empty or named twice; name each class once")
        return value


class ModelConfig(Settings):
    """An architecture by name, or the user's own. The name alone may stand for the whole.

    Attributes:
        name: ``linear``, ``mlp``, ``cnn``, ``resnet``, ``scatter`` (fixed scattering features and a linear
            head, for images); of text ``text-embedding`` (the mean of embeddings), ``text-cnn``,
            ``transformer``; or ``package.module:factory``. ``auto`` is ``cnn`` for images,
            ``text-embedding`` for text and ``mlp`` for anything else, such as an encoder's features.
        width: scales the layers of a named architecture; ``scatter`` has none to scale.
        activation: the non-linearity of a named architecture.
        encoder: what stands below it in place of the run's ``encoder``; ``none`` for nothing.
    """

    name: Name = "auto"
    width: Annotated[int, Field(ge=1, le=_WIDEST)] = 32
    activation: Literal["tanh", "relu"] = "tanh"
    encoder: Name | None = None

    def on(self, encoder: str | None) -> "ModelConfig":
        """The same on the run's ``encoder``, unless it has its own; on none where that is ``none``."""
        own = encoder if self.encoder is None else self.encoder
        return self.model_copy(update={"encoder": None if own == "none" else own})

    @classmethod
    def tree_of(cls, given: Any) -> Any:
        """See `Settings.tree_of`; text is the name."""
        return {"name": given} if isinstance(given, str) else super().tree_of(given)


class FitConfig(Settings):
    """Ordinary training, by Adam on mini-batches: for public data, and for runs without DP.

    Attributes:
        steps: number of mini-batches.
        batch_size: records in each.
        learning_rate: of Adam.
        weight_decay: decoupled from the gradient.
    """

    steps: Positive = 300
    batch_size: Positive = 64
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.0


class DpSgdConfig(Settings):
    """One round of DP-SGD on a device (Abadi et al. 2016). Every field is public.

    Attributes:
        sampling_rate: probability with which each record joins a step (Poisson sampling).
        steps: noised steps a round.
        clip_norm: per-example gradients are clipped to this L2 norm.
        learning_rate: of the optimiser, before ``step_noise`` lowers it.
        step_noise: the learning rate is lowered until the noise that one step adds to a weight has at most
            this standard deviation: strong noise calls for small steps.
        momentum: of ``sgd``; ignored by ``adam``.
        optimizer: ``sgd`` or ``adam``, fed with the noised gradients.
        part: which part of the student is trained on private records; ``lora`` is the head, and beside each
            linear layer below it a change of low ``rank``, which is merged into the layer on export.
        rank: of the changes of ``lora``.
        averaging: share of the last steps whose weights are averaged into the result (free).
    """

    sampling_rate: Rate = 1.0
    steps: Positive = 10
    clip_norm: PositiveFloat = 1.0
    learning_rate: PositiveFloat = 8.0
    step_noise: PositiveFloat = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    part: Literal["all", "last_block", "head", "lora"] = "all"
    rank: Positive = 4
    averaging: Share = 0.5


class TeacherConfig(Settings):
    """The cloud's model and its training on the public labelled data.

    Attributes:
        model: its architecture.
        fit: its training on the public labelled data, before the first round.
    """

    model: ModelConfig = ModelConfig(width=128, activation="relu")
    fit: FitConfig = FitConfig()


class StudentConfig(Settings):
    """The devices' models: distilled on public data first, then trained on private records.

    Attributes:
        models: architectures, dealt to the devices in turn; as text, names with commas between.
        public_fit: distillation from the teacher on the public inputs, before any private record.
        private_fit: one round's training on private records where no DP is asked for (``epsilon = inf``), and
            the control's that is trained directly without DP: its steps are those of all rounds.
        dp: DP-SGD on private records.
        direct_dp: DP-SGD of the control that is trained directly; its steps and sampling rate are those
            of ``dp`` over all rounds, so that both spend the same budget.
        alpha: weight of the teacher's soft targets on the device, in [0, 1].
        temperature: of the soft targets.
        start: where a round begins: ``teacher``, a student freshly distilled on public data from the
            teacher of the round, or ``own``, the device's student of the round before.
        own_weight: what a device's own student weighs in the one that the device is left with: after the last
            round it is distilled, on public inputs and so at no cost, toward the mean of its answers and the
            last teacher's. ``0`` is the teacher alone, ``1`` leaves the device the student that it trained.
        delivery_fit: that distillation, from a student freshly distilled from the last teacher.
        engine: ``cohort`` trains equal architectures as one vectorised program; ``opacus`` one by one.
    """

    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)] = (ModelConfig(),)
    public_fit: FitConfig = FitConfig(steps=600, learning_rate=5e-3)
    private_fit: FitConfig = FitConfig()
    dp: DpSgdConfig = DpSgdConfig(part="head")
    direct_dp: DpSgdConfig = DpSgdConfig(step_noise=0.02)
    alpha: Share = 0.1
    temperature: PositiveFloat = 1.0
    start: Literal["teacher", "own"] = "teacher"
    own_weight: Share = 0.5
    delivery_fit: FitConfig = FitConfig(steps=200)
    engine: Literal["cohort", "opacus"] = "cohort"

    @property
    def rank(self) -> int | None:
        """That of the students' adapters; ``None`` where they have none."""
        return self.dp.rank if self.dp.part == "lora" else None

    @property
    def delivers(self) -> bool:
        """Whether a device is left with another student than the one that it trained."""
        return self.own_weight < 1

    @property
    def needs_teacher(self) -> bool:
        """Whether a device must have the teacher itself: to train by it, or to be left with part of it."""
        return self.alpha > 0 or 0 < self.own_weight < 1

    @field_validator("models", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


class PrivacyConfig(Settings):
    """The budgets of the whole run, all rounds together, and where protective noise comes from.

    Attributes:
        epsilon: of ``unit``, on each device; ``inf`` trains without DP.
        unit: what training protects: a ``record``, or a ``person`` with all records of theirs on a device.
            Whose each record is says ``data.group``. Persons are sampled, and the sum of a person's gradients
            is clipped.
        delta: of all units; far below one over a device's records, or it promises nothing.
        allow_large_delta: let ``delta`` be above 0.01, which is refused otherwise.
        device_epsilon: device-level, for each device's contributions to the channel; ``None`` or ``inf``
            adds no noise to the channel, which then has no device-level guarantee.
        noise: ``seeded`` is reproducible and protects nobody outside a simulation; ``system`` draws all
            protective noise and samples from the operating system's cryptographic source.
    """

    epsilon: Epsilon = 3.0
    unit: Literal["record", "person"] = "record"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    allow_large_delta: bool = False
    device_epsilon: Epsilon | None = None
    noise: Literal["seeded", "system"] = "seeded"


class ChannelConfig(Settings):
    """How answers travel.

    Attributes:
        kind: ``plain``, ``noised``, ``secure``, or a plug-in's.
        aggregators: parties among which ``secure`` shares the answers.
        aggregation: what ``secure`` lets the cloud see of a query: the ``mean`` answer, or by ``votes`` the
            class that won, where there is a consensus, and nothing else (Confident-GNMax). Devices then send
            votes, and the group needs a third party.
        vote_threshold: share of the devices, of ``minimum_devices`` where that is set, that must vote for one
            class to make a consensus.
        threshold_share: part of a vote's privacy that goes to finding out whether there is a consensus.
        answers: what a device sends for each query: ``probabilities``, ``votes`` (one-hot), or
            ``residuals`` against the teacher's own probabilities.
        row_clip: the clip norm of a device's whole block is ``row_clip * sqrt(queries)``.
        deadline: seconds that one step of the secure channel's parties may take.
        parties: behind ``secure``: ``processes`` of the run itself, quick to simulate with, or ``services``
            as they are deployed. Both make the same releases. They are started for the run unless
            ``aggregator_urls`` are given.
        aggregator_urls: running services, the third party's included if there is one.
        ca: authority of the services' certificates. ``None``: the system's.
        certificate: the cloud's own, where the services ask for one; ``key`` is its key.
        key: see ``certificate``.
        aggregator_keys: the services' public keys by rank, in hexadecimal. None: what they say is believed.
        minimum_devices: fewest devices over which a sum is released. ``None``: all of them.
        noise_from: who adds the noise: each of the ``aggregators`` all of it, or each of the
            ``devices`` a part, such that ``minimum_devices`` of them make the whole.
        norm_projections: random projections by which the parties check each device's norm, at least 29, so
            that a device of three times the clip norm is caught; needs a third party. 0: no check.
        dropout: share of the devices that fall silent in each round before they upload, drawn from the seed.
    """

    kind: Annotated[str, Field(examples=list(OURS))] = "secure"
    aggregators: Annotated[int, Field(ge=2, le=16)] = 2
    aggregation: Literal["mean", "votes"] = "mean"
    vote_threshold: Rate = 0.6
    threshold_share: Annotated[float, Field(ge=0.01, le=0.99)] = 0.5
    answers: Literal["probabilities", "votes", "residuals"] = "probabilities"
    row_clip: Annotated[float, Field(gt=0, le=2)] = 1.0
    deadline: Annotated[float, Field(gt=0, le=_LONGEST_WAIT, allow_inf_nan=False)] = 120.0
    parties: Literal["processes", "services"] = "processes"
    aggregator_urls: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    aggregator_keys: tuple[str, ...] = ()
    minimum_devices: Positive | None = None
    noise_from: Literal["aggregators", "devices"] = "aggregators"
    norm_projections: Annotated[int, Field(ge=0, le=MAX_PROJECTIONS)] = 0
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0

    @field_validator("norm_projections")
    @classmethod
    def _enough_projections(cls, projections: int) -> int:
        if 0 < projections < MIN_PROJECTIONS:
            raise ValueError(
                "too few to catch a device of three times the clip norm without naming honest ones: "
                f"take {MIN_PROJECTIONS} to {MAX_PROJECTIONS}, or 0"
            )
        return projections

    @property
    def through_services(self) -> bool:
        """Whether the secure channel goes through services."""
        asked = self.parties == "services" or bool(self.aggregator_urls)
        return asked and known(self.kind).has_parties

    @property
    def _asks_for_parties(self) -> bool:
        noise_or_check = self.noise_from == "devices" or self.norm_projections > 0
        voting = self.aggregation == "votes"
        return bool(self.aggregator_urls) or self.minimum_devices is not None or noise_or_check or voting

    @property
    def sends(self) -> Literal["probabilities", "votes", "residuals"]:
        """What a device sends for each query: ``answers``, unless it takes part in a vote."""
        return "votes" if self.aggregation == "votes" else self.answers

    @model_validator(mode="after")
    def _of_services(self) -> Self:
        if self._asks_for_parties and not known(self.kind).has_parties:
            raise ValueError(
                "aggregation, aggregator_urls, minimum_devices, noise_from and norm_projections are for kind "
                "'secure'"
            )
        if self.aggregation == "votes" and self.answers == "residuals":
            raise ValueError("answers='residuals': under aggregation 'votes' devices send 'votes'")
        if self.aggregation == "votes" and self.noise_from == "devices":
            raise ValueError("noise_from='devices': the noise of votes is the aggregators'")
        return self


class ReverseConfig(Settings):
    """How the teacher learns from a release.

    Attributes:
        queries: proxy records put to the students in a round. ``None``: all of them where the channel adds
            no noise, else as many as keep its standard deviation on the mean answer within 0.17, but ``100``
            at least and ``1000`` at most: each query costs device-level noise.
        selection: ``uncertain`` asks what the teacher knows least, ``random`` draws.
        fit: the update's steps; batches are drawn from both the public and the proxy data.
        trust: weight of the distillation from the release.
        anchor: weight of ``KL(old teacher || new teacher)`` against forgetting.
        sharpen: exponent on the aggregated probabilities, 1 leaves them as they are.
        margin: queries whose consensus margin is under so many noise standard deviations are not learned.
        confident: queries where the teacher agrees with the consensus with at least this probability are
            not learned; 1 learns all.
        memory: weight of a release relative to the one a round later, in the knowledge buffer.
        tolerance: a teacher whose public validation accuracy falls by more than this is rolled back.
        aggregation: how the devices' answers become one a query where the cloud sees each device's, so over
            ``plain`` and ``noised``: ``clipped_mean``, ``median``, ``votes``, or ``mean``, which one hostile
            device can move at will; or a rule of a plug-in. Over ``secure`` the parties add up what the
            devices clipped.
    """

    queries: Positive | None = None
    selection: Literal["uncertain", "random"] = "uncertain"
    fit: FitConfig = FitConfig(steps=200, learning_rate=1e-3)
    trust: PositiveFloat = 2.0
    anchor: NonNegativeFloat = 0.1
    sharpen: PositiveFloat = 1.0
    margin: NonNegativeFloat = 2.0
    confident: Rate = 1.0
    memory: Share = 0.5
    tolerance: Share = 0.02
    aggregation: Annotated[str, Field(examples=["mean", "clipped_mean", "median", "votes"])] = "clipped_mean"


class Config(Settings):
    """Everything that decides a run. Equal settings and seed give equal results, up to ``privacy.noise``.

    Python, TOML and ``--set`` take the same trees, and short names (`privkd.options`) for some settings:
    ``data="mnist", devices=20, epsilon=3.0``. A group is a mapping or an object of its class. A mistake
    raises `ConfigError`, in one line.

    Attributes:
        rounds: how often devices are trained and the teacher learns from their answers.
        seed: decides everything but noise that comes from the ``system``.
        device: what trains: ``auto`` is CUDA where there is one.
        encoder: a frozen encoder below the teacher and all students, which is public and costs no privacy:
            ``package.module:function``, or a folder with ``config.json`` and ``model.safetensors`` as
            Hugging Face's transformers save them. Each record goes through it once. ``None``: no encoder.
        controls: whether to measure what the gain is compared with. A deployment measures no control that
            trains on private records.
        plugins: modules of the user's that add channels, attacks, aggregation rules, data sources or export
            formats, each ``package.module`` or a path that ends in ``.py``; as text, with commas between.
        data: which records exist, and who holds them.
        teacher: the cloud's model.
        student: the devices' models.
        privacy: the budgets, and where noise comes from.
        channel: how answers travel.
        reverse: how the teacher learns from them.
    """

    rounds: Annotated[int, Field(ge=1, le=_MOST_ROUNDS)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    encoder: Name | None = None
    controls: bool = True
    plugins: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    channel: ChannelConfig = ChannelConfig()
    reverse: ReverseConfig = ReverseConfig()

    @field_validator("plugins", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("plugins")
    @classmethod
    def _told_apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({Path(name).name for name in value}) < len(value):
            raise ValueError("two are called the same; give each plug-in once, and files names of their own")
        return value

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None: ...

    @classmethod
    def tree_of(cls, given: Any) -> Any:
        """See `Settings.tree_of`; short names are spelt out.

        Raises:
            ConfigError: a setting is given by both of its names.
        """
        given = super().tree_of(given)
        if not isinstance(given, Mapping):
            return given
        groups = {name: value for name, value in cls.model_construct() if isinstance(value, Settings)}
        short = {name: setting for name in given if (setting := setting_of(name, given[name])) != name}
        tree = {
            name: groups[name].tree_of(value) if name in groups else value
            for name, value in given.items()
            if name not in short
        }
        for name, setting in short.items():
            tree = put(tree, setting, given[name], by=name)
        return tree

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The teacher and the students, each on its encoder."""
        return tuple(model.on(self.encoder) for model in (self.teacher.model, *self.student.models))

    def with_encoders(self, spelt: Callable[[str], str]) -> "Config":
        """The same settings, with what each encoder is called by ``spelt``."""

        def renamed(model: ModelConfig) -> ModelConfig:
            own = model.encoder
            return model if own in (None, "none") else model.model_copy(update={"encoder": spelt(own)})

        teacher = self.teacher.model_copy(update={"model": renamed(self.teacher.model)})
        student = self.student.model_copy(update={"models": tuple(map(renamed, self.student.models))})
        encoder = None if self.encoder is None else spelt(self.encoder)
        return self.model_copy(update={"encoder": encoder, "teacher": teacher, "student": student})

    @property
    def silent_devices(self) -> int:
        """How many devices fall silent in each round: public, and the same in every round."""
        return round(self.channel.dropout * self.data.devices)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # What a plug-in adds is known once it is loaded, and checked then.
        if self.plugins_loaded or self.channel.kind in OURS:
            self.check_channel()
        return self

    @property
    def plugins_loaded(self) -> bool:
        """Whether all that the settings may name is known by now."""
        return all(map(is_loaded, self.plugins))

    def check_channel(self) -> None:
        """Do nothing where there is such a channel, and it can do what the settings ask for.

        Raises:
            ConfigError: otherwise.
        """
        chosen, kind = KINDS[self.channel.kind], self.channel.kind
        noisy = self.privacy.device_epsilon is not None and math.isfinite(self.privacy.device_epsilon)
        if noisy and not chosen.adds_noise:
            raise ConfigError(
                f"privacy.device_epsilon needs noise on the channel: take channel.kind {_either(NOISY)}"
            )
        if not chosen.shows_each and self.reverse.aggregation != "clipped_mean":
            raise ConfigError(
                f"reverse.aggregation={self.reverse.aggregation!r} needs each device's answers, and over the "
                f"{kind} channel the cloud sees their sum alone: take channel.kind {_either(SHOW_EACH)}"
            )

    @model_validator(mode="after")
    def _enough_stay(self) -> Self:
        devices, silent = self.data.devices, self.silent_devices
        needed = (self.channel.minimum_devices or devices) if known(self.channel.kind).has_parties else 1
        if needed > devices:
            raise ValueError(f"channel.minimum_devices={needed}: there are {devices} devices")
        if silent and devices - silent < needed:
            cure = (
                "lower channel.dropout"
                if silent == devices
                else (f"set channel.minimum_devices={devices - silent}, or lower channel.dropout")
            )
            raise ValueError(
                f"channel.dropout={self.channel.dropout:g} silences {silent} of {devices} devices, and a "
                f"release takes at least {needed}: {cure}"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, given: Any, validated: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validated(given)
        except ValidationError as error:
            raise ConfigError(in_words(error, cls)) from None
