"""The published plan: what a cloud promises its devices before the first round, and the name of the run.

``plan.json`` is canonical, and its SHA-256 is the run's name: a cloud that changes one field has another run,
to which no device has agreed. It holds no path and no seed. Beside it lies ``proxy.safetensors``, the public
proxy set, and of text ``tokenizer.json``: devices are asked about rows of the set by number, so that no
question can bring inputs of its own.

A device believes no figure of it that it can compute: `PublishedPlan.checked` calibrates the noise again.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from privkd.channels.registry import price_of
from privkd.config import Config, config_tree, parse_config
from privkd.data.constants import Constants
from privkd.data.preprocessing import Column
from privkd.data.scenario import Scenario
from privkd.data.tokens import TOKENIZER_FILE, Tokens, check_tokenizer
from privkd.errors import ConfigError, RunError
from privkd.models.encoder import encoder_named
from privkd.models.inputs import InputType
from privkd.plan import Plan, PublicFacts, check_elsewhere, make_plan
from privkd.privacy.events import DpSgd, PartyId
from privkd.records import Count, FileRecord, Plain, Real, Record

PLAN_FILE, PROXY_FILE = "plan.json", "proxy.safetensors"
_SHOWN = ("rounds", "encoder", "teacher", "student", "privacy", "channel", "reverse")
"""The groups of settings that devices must know. Others are the cloud's own: data, seed, plug-ins."""
_ROUNDING = 1e-9
"""By how much, of itself, a figure may differ on another machine."""
_OWN = ("ca", "certificate", "key")
"""Settings of the channel that are the cloud's own files."""


class TokenScale(Record):
    """How texts or whole numbers become token ids; see `privkd.data.tokens.Tokens`.

    ``tokenizer`` is the SHA-256 of ``tokenizer.json``; ``None`` where records are ids as they come.
    """

    vocabulary: Annotated[int, Field(ge=2)]
    length: Annotated[int, Field(ge=1)]
    tokenizer: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None


class Scale(Record):
    """How raw features become inputs; see `privkd.data.constants.Constants`."""

    divisor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    largest: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    channels: Literal[1, 3] | None
    columns: tuple[Column, ...] = ()
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens: TokenScale | None = None

    @classmethod
    def of(cls, constants: Constants) -> Self:
        """That of a scenario."""
        given = {name: getattr(constants, name) for name in cls.model_fields}
        if (own := constants.tokens) is not None:
            given["tokens"] = TokenScale(vocabulary=own.vocabulary, length=own.length, tokenizer=own.digest)
        return cls(**given)

    @property
    def vocabulary(self) -> int | None:
        """Inputs are token ids below it; ``None``: they are numbers."""
        return None if self.tokens is None else self.tokens.vocabulary


class PublishedPlan(FileRecord):
    """All that devices are told of a run before it begins. Public.

    Attributes:
        settings: the tree of those settings that concern a device.
        roster: the devices by name; a device's number is its place.
        records_per_device: the nominal size of a shard, a constant that owners agree to, never a count.
        classes: by name, in the order of their numbers.
        input_shape: of one input.
        scale: how raw features become inputs.
        queries: proxy records put to the students in each round.
        clip_norm: L2 bound on a device's whole block of answers.
        noise_multiplier: of DP-SGD.
        rho: zCDP price of one release to a device; ``None`` for no noise.
        epsilon_record: of the whole run, at the settings' delta; infinite without DP.
        epsilon_device: likewise.
        answer_seconds: devices answer at whole multiples of it after a question arrived, so that the moment
            says little of how long they trained.
        proxy: SHA-256 of ``proxy.safetensors``.
    """

    settings: Mapping[str, Plain]
    roster: Annotated[tuple[PartyId, ...], Field(min_length=1)]
    records_per_device: Annotated[Count, Field(ge=1)]
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    input_shape: tuple[Count, ...]
    scale: Scale
    queries: Count
    clip_norm: Real
    noise_multiplier: Real
    rho: Real | None
    epsilon_record: Real
    epsilon_device: Real
    answer_seconds: Annotated[Real, Field(gt=0)]
    proxy: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    _tokenizer: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _scaled_as_shaped(self) -> Self:
        columns = self.scale.columns
        if columns and self.input_shape != (sum(column.width for column in columns),):
            raise ValueError(f"{len(columns)} columns do not make inputs of shape {list(self.input_shape)}")
        tokens = self.scale.tokens
        if tokens is not None and self.input_shape != (tokens.length,):
            raise ValueError(f"{tokens.length} tokens are not inputs of shape {list(self.input_shape)}")
        return self

    @classmethod
    def of(
        cls, config: Config, scenario: Scenario, plan: Plan, roster: Sequence[PartyId], answer_seconds: float
    ) -> Self:
        """That of a run with these settings, for the devices on ``roster``."""
        tokens = scenario.constants.tokens
        found = cls(
            settings=public_settings(config, InputType.of(scenario.proxy)),
            roster=tuple(roster),
            records_per_device=scenario.records_per_device,
            classes=scenario.labels,
            input_shape=scenario.input_shape,
            scale=Scale.of(scenario.constants),
            queries=plan.queries,
            clip_norm=plan.clip_norm,
            noise_multiplier=plan.noise_multiplier,
            rho=plan.rho,
            epsilon_record=plan.training.high,
            epsilon_device=plan.device.high,
            answer_seconds=answer_seconds,
            proxy=hashlib.sha256(proxy_bytes(scenario.proxy)).hexdigest(),
        )
        found._tokenizer = None if tokens is None else tokens.tokenizer
        return found

    @property
    def constants(self) -> Constants:
        """How raw features become inputs, as data are read by it."""
        given, own = dict(self.scale), self.scale.tokens
        tokens = None if own is None else Tokens(own.vocabulary, own.length, self._tokenizer)
        return Constants(**given | {"tokens": tokens}, said="as the plan says")

    @property
    def inputs(self) -> InputType:
        """What the models take."""
        return InputType(self.input_shape, torch.float32 if self.scale.tokens is None else torch.int64)

    @cached_property
    def canonical(self) -> bytes:
        """The bytes of ``plan.json``: equal for equal plans."""
        return json.dumps(self.tree(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical` in hexadecimal: the run's name."""
        return hashlib.sha256(self.canonical).hexdigest()

    @cached_property
    def config(self) -> Config:
        """The settings that concern a device, for the roster; the others are at their defaults.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        return parse_config({**self.settings, "data": {"devices": len(self.roster)}})

    def checked(self, proxy: int) -> Plan:
        """The plan of the settings, for a proxy set of ``proxy`` records, with the published figures.

        These are those of the settings up to the rounding of another machine's arithmetic, by which the noise
        and the price are then the same on all of them.

        Raises:
            RunError: a published figure is not what the settings give.
            ConfigError: the settings make no plan, or none for devices elsewhere.
            BudgetError: no noise reaches their budget.
        """
        check_elsewhere(self.config)
        facts = PublicFacts(len(self.roster), self.records_per_device, proxy, len(self.classes))
        plan = make_plan(self.config, facts)
        own = {
            "queries": plan.queries,
            "clip_norm": plan.clip_norm,
            "noise_multiplier": plan.noise_multiplier,
            "rho": plan.rho,
            "epsilon_record": plan.training.high,
            "epsilon_device": plan.device.high,
        }
        for name, computed in own.items():
            if not _equal(getattr(self, name), computed):
                said = getattr(self, name)
                raise RunError(f"the published plan says {name}={said}, but its settings give {computed}")
        event = (
            replace(plan.training_event, noise_multiplier=self.noise_multiplier)
            if isinstance(plan.training_event, DpSgd)
            else plan.training_event
        )
        return replace(
            plan,
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            rho=self.rho,
            training_event=event,
            device_event=price_of(self.config.channel.kind, self.rho),
        )

    def number(self, device: PartyId) -> int:
        """A device's place on the roster, which decides its architecture.

        Raises:
            ConfigError: it is not on the roster.
        """
        if device not in self.roster:
            raise ConfigError(f"{device} is not on the roster of run {self.digest[:12]}")
        return self.roster.index(device)

    def write(self, folder: Path, proxy: Tensor) -> None:
        """Write both files, and of text the tokenizer, into ``folder``, which exists.

        Raises:
            RunError: they cannot be written.
        """
        try:
            (folder / PLAN_FILE).write_bytes(self.canonical)
            (folder / PROXY_FILE).write_bytes(proxy_bytes(proxy))
            if self._tokenizer is not None:
                (folder / TOKENIZER_FILE).write_bytes(self._tokenizer.encode())
        except OSError as error:
            raise RunError(f"{folder}: {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: Path) -> "tuple[PublishedPlan, Tensor]":
        """The plan and its proxy set ``[query, *shape]`` in ``folder``.

        Raises:
            RunError: a file is missing, damaged, not canonical, or the proxy set or the tokenizer is not the
                plan's.
        """
        plan = cls.read(folder / PLAN_FILE)
        proxy = _bytes_of(folder / PROXY_FILE)
        if _bytes_of(folder / PLAN_FILE) != plan.canonical:
            raise RunError(f"{folder / PLAN_FILE} is not canonical: ask the cloud for its own file")
        if hashlib.sha256(proxy).hexdigest() != plan.proxy:
            raise RunError(f"{folder / PROXY_FILE} is not the proxy set of the plan beside it")
        try:
            inputs = parse_tensors(proxy)["inputs"]
        except (SafetensorError, KeyError) as error:
            raise RunError(f"{folder / PROXY_FILE} holds no inputs ({error})") from None
        if tuple(inputs.shape[1:]) != plan.input_shape or not plan._takes(inputs):
            kind = f"{inputs.dtype} inputs of shape {list(inputs.shape)}"
            raise RunError(f"{folder / PROXY_FILE}: {kind} are not the plan's")
        plan._tokenizer = plan._tokenizer_in(folder)
        return plan, inputs

    def _takes(self, inputs: Tensor) -> bool:
        """Whether ``inputs`` are finite numbers or, of tokens, ids of the vocabulary."""
        vocabulary = self.scale.vocabulary
        if vocabulary is None:
            return inputs.is_floating_point() and bool(inputs.isfinite().all())
        return inputs.dtype == torch.int64 and bool(((inputs >= 0) & (inputs < vocabulary)).all())

    def _tokenizer_in(self, folder: Path) -> str | None:
        """The contents of ``tokenizer.json``, where the plan names one."""
        tokens, path = self.scale.tokens, folder / TOKENIZER_FILE
        if tokens is None or tokens.tokenizer is None:
            return None
        found = _bytes_of(path)
        if hashlib.sha256(found).hexdigest() != tokens.tokenizer:
            raise RunError(f"{path} is not the tokenizer of the plan beside it")
        try:
            text = found.decode()
            check_tokenizer(text, tokens.length, str(path))
        except (UnicodeDecodeError, ConfigError) as error:
            raise RunError(f"{path}: {error}") from None
        return text


def _equal(published: float | None, computed: float | None) -> bool:
    if published is None or computed is None:
        return published is computed
    return math.isclose(published, computed, rel_tol=_ROUNDING)


def public_settings(config: Config, inputs: InputType) -> dict[str, Any]:
    """The settings that devices are told; encoders by their digests, as each device has its own copy.

    Raises:
        ModelError: an encoder cannot be loaded.
    """
    config = config.with_encoders(lambda name: encoder_named(name, inputs).digest)
    tree = {name: group for name, group in config_tree(config).items() if name in _SHOWN}
    channel = {name: value for name, value in tree.get("channel", {}).items() if name not in _OWN}
    shown: dict[str, Any] = json.loads(json.dumps(tree | {"channel": channel}, default=os.fspath))
    return shown


def proxy_bytes(proxy: Tensor) -> bytes:
    """``proxy.safetensors`` of the inputs ``proxy`` ``[query, *shape]``."""
    return serialise_tensors({"inputs": proxy.detach().cpu().contiguous()})


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from None
