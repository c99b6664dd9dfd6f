"""What a run will do and what it will cost, known before any private record is touched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from privkd.channels.registry import known, price_of
from privkd.config import Config
from privkd.data.scenario import Scenario
from privkd.errors import ConfigError
from privkd.privacy.accounting import Bound, calibrate_noise_multiplier, calibrate_rho, price
from privkd.privacy.claims import check_delta, warnings_on
from privkd.privacy.events import DpSgd, NoPrivacy, PrivacyEvent, Unit
from privkd.privacy.joint import Joint, Persons, Spent
from privkd.privacy.ledger import Budget
from privkd.privacy.votes import VoteRule, affordable_queries, vote_rule
from privkd.secure.normcheck import FALSE_ALARM

_FEWEST_UNDER_NOISE, _MOST_UNDER_NOISE = 100, 1000
_CLEAR = 0.17
_BYTES_PER_ENTRY = 4
_UNCHARGED = 1e-3
"""Part of delta that the norm check may add to it without being charged."""


@dataclass(frozen=True)
class PublicFacts:
    """The public constants of a scenario that a plan needs: sizes, never contents. The last three are as of
    `Scenario`."""

    devices: int
    records_per_device: int
    proxy: int
    classes: int
    inferred: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)
    persons: Persons | None = None


def facts_of(scenario: Scenario) -> PublicFacts:
    """The public constants of ``scenario``."""
    return PublicFacts(
        devices=len(scenario.devices),
        records_per_device=scenario.records_per_device,
        proxy=len(scenario.proxy),
        classes=scenario.classes,
        inferred=scenario.inferred,
        taken=scenario.taken,
        persons=scenario.persons,
    )


@dataclass(frozen=True)
class Plan:
    """A calibrated run.

    Attributes:
        rounds: number of rounds.
        devices: number of devices.
        silent_devices: how many of them fall silent in each round, by ``channel.dropout``.
        noise_multiplier: of DP-SGD, the same in every round; 0 without DP.
        sampling_rate: of DP-SGD.
        steps: DP-SGD steps a round on each device.
        expected_batch_size: public normaliser of the noised gradient sum.
        queries: proxy records put to the students in each round.
        clip_norm: L2 bound on a device's whole block of answers.
        rho: zCDP price of one release to each device, ``None`` without channel noise.
        unit: what training protects: a record, or a person with all records of theirs on a device.
        training_event: what one round's training costs that unit.
        device_event: what one release costs a device.
        training: epsilon per ``unit`` of the whole run, at ``delta``.
        device: epsilon per device of the whole run, at ``delta``.
        delta: of both units.
        upload_bytes: a device's upload a round, before sealing.
        votes: the rule of each release's vote, ``None`` where means are released.
        inferred: public constants that a simulation read from all records, private ones too, in words.
        taken: what in the data was taken for what, such as the label, in words by its name.
        persons: public constants about whose the records are, where that is known.
        warnings: what must be said wherever this plan's epsilons and delta are shown, a sentence each.
    """

    rounds: int
    devices: int
    silent_devices: int
    noise_multiplier: float
    sampling_rate: float
    steps: int
    expected_batch_size: float
    queries: int
    clip_norm: float
    rho: float | None
    unit: Unit
    training_event: PrivacyEvent
    device_event: PrivacyEvent
    training: Bound
    device: Bound
    delta: float
    upload_bytes: int
    votes: VoteRule | None = None
    inferred: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)
    persons: Persons | None = None
    warnings: tuple[str, ...] = ()

    @property
    def joints(self) -> tuple[Joint, ...]:
        """What several units of one owner get together, of the whole run."""
        most = None if self.persons is None else self.persons.most_records
        training, releases = [self.training_event] * self.rounds, [self.device_event] * self.rounds
        return Spent(self.unit, training, releases, self.delta, most).joints


def check_elsewhere(config: Config) -> None:
    """Refuse what devices elsewhere cannot keep.

    Raises:
        ConfigError: training is to protect persons, whose records a device program does not tell apart.
    """
    if config.privacy.unit == "person":
        raise ConfigError(
            "privacy.unit='person' is for simulations: a real device counts what a record costs, and it as a "
            "whole. Where a device is one person's, its device-level budget is the person's: set "
            "privacy.device_epsilon"
        )


def make_plan(config: Config, facts: PublicFacts) -> Plan:
    """Calibrate the noise so that the whole run, all rounds together, stays within its budgets.

    Raises:
        ConfigError: there is nothing to ask the students, delta is too large, or the norm check may name an
            honest device with a probability that is not far below delta.
        BudgetError: no noise reaches the budget.
    """
    if facts.proxy == 0:
        raise ConfigError(
            "the proxy set is empty, so the students have nothing to answer: raise data.proxy_records"
        )
    privacy, recipe = config.privacy, config.student.dp
    check_delta(privacy.delta, allowed=privacy.allow_large_delta)
    multiplier = calibrate_noise_multiplier(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=recipe.sampling_rate,
        steps=recipe.steps * config.rounds,
    )
    rho = _rho(config)
    _check_false_alarms(config, rho)
    unit = Unit(privacy.unit)
    population = _population(unit, facts)
    training_event: PrivacyEvent = (
        DpSgd(multiplier, recipe.sampling_rate, recipe.steps)
        if multiplier > 0
        else NoPrivacy("students were trained without DP: epsilon was set to inf")
    )
    device_event = price_of(config.channel.kind, rho)
    queries = min(facts.proxy, _queries(config, rho, facts))
    training, device = (
        price([event] * config.rounds, privacy.delta) for event in (training_event, device_event)
    )
    return Plan(
        rounds=config.rounds,
        devices=facts.devices,
        silent_devices=config.silent_devices,
        noise_multiplier=multiplier,
        sampling_rate=recipe.sampling_rate,
        steps=recipe.steps,
        expected_batch_size=recipe.sampling_rate * population,
        queries=queries,
        clip_norm=config.channel.row_clip * math.sqrt(queries),
        rho=rho,
        unit=unit,
        training_event=training_event,
        device_event=device_event,
        training=training,
        device=device,
        delta=privacy.delta,
        upload_bytes=queries * facts.classes * _BYTES_PER_ENTRY,
        votes=_votes(config, rho, facts.devices, queries),
        inferred=facts.inferred,
        taken=facts.taken,
        persons=facts.persons,
        warnings=(
            *warnings_on(unit, training.high, privacy.delta, population),
            *warnings_on(Unit.DEVICE, device.high, privacy.delta, facts.devices),
        ),
    )


def _population(unit: Unit, facts: PublicFacts) -> int:
    """How many units of training a device holds, nominally.

    Raises:
        ConfigError: it is a person, and nothing says whose the records are.
    """
    if unit is Unit.RECORD:
        return facts.records_per_device
    if facts.persons is None:
        raise ConfigError(
            "privacy.unit='person': nothing says whose each record is; name the column that does with "
            "--group COLUMN"
        )
    return facts.persons.per_device


def budgets(config: Config) -> tuple[Budget, Budget]:
    """The most that one unit of training, a record or a person, and one device may spend over the run."""
    privacy = config.privacy
    device = math.inf if privacy.device_epsilon is None else privacy.device_epsilon
    unit = Unit(privacy.unit)
    return Budget(unit, privacy.epsilon, privacy.delta), Budget(Unit.DEVICE, device, privacy.delta)


def _rho(config: Config) -> float | None:
    epsilon = config.privacy.device_epsilon
    if epsilon is None or math.isinf(epsilon):
        return None
    return calibrate_rho(epsilon=epsilon, delta=config.privacy.delta, releases=config.rounds)


def _check_false_alarms(config: Config, rho: float | None) -> None:
    """Raise `ConfigError` where the norm check's false alarms, which no charge covers, come near delta."""
    if rho is None or not config.channel.norm_projections:
        return
    alarms = config.rounds * FALSE_ALARM
    if alarms > _UNCHARGED * config.privacy.delta:
        raise ConfigError(
            f"privacy.delta={config.privacy.delta:g}: in {config.rounds} rounds the norm check may name an "
            f"honest device with probability {alarms:.1e}, which no charge covers and is more than a "
            "thousandth of delta: raise delta, or set channel.norm_projections=0"
        )


def _queries(config: Config, rho: float | None, facts: PublicFacts) -> int:
    if config.reverse.queries is not None:
        return config.reverse.queries
    if rho is None:
        return facts.proxy
    channel = config.channel
    if channel.aggregation == "votes":
        return affordable_queries(
            devices=_fewest(config, facts.devices),
            parties=channel.aggregators,
            rho=rho,
            threshold_share=channel.threshold_share,
        )
    clear = _clear_means(config, rho, facts.devices)
    return min(max(_FEWEST_UNDER_NOISE, clear), _MOST_UNDER_NOISE)


def _clear_means(config: Config, rho: float, devices: int) -> int:
    """The most queries for which the known noise on an entry of the mean answer has a standard deviation of
    at most 0.17, so that it seldom turns a first choice that the devices agree on."""
    channel, fewest = config.channel, _fewest(config, devices)
    draws = known(channel.kind).draws(channel, fewest)
    return math.floor(2 * rho / draws * (_CLEAR * fewest / channel.row_clip) ** 2)


def _fewest(config: Config, devices: int) -> int:
    """Over how many of ``devices`` a release is made at least."""
    return config.channel.minimum_devices or devices - config.silent_devices


def _votes(config: Config, rho: float | None, devices: int, queries: int) -> VoteRule | None:
    channel = config.channel
    if channel.aggregation != "votes":
        return None
    return vote_rule(
        devices=_fewest(config, devices),
        queries=queries,
        rho=rho,
        threshold=channel.vote_threshold,
        threshold_share=channel.threshold_share,
    )
