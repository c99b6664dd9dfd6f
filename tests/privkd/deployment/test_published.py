"""The published plan: canonical, without secrets, and recomputed by whoever reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from privkd.config import Config
from privkd.data import build_scenario
from privkd.deployment.published import PLAN_FILE, PROXY_FILE, PublishedPlan
from privkd.errors import ConfigError, RunError
from privkd.plan import facts_of, make_plan

NAMES = tuple(f"device-{number:04d}" for number in range(5))


def published(**settings: Any) -> tuple[PublishedPlan, torch.Tensor]:
    config = Config(**settings)
    scenario = build_scenario(config.data, config.seed)
    plan = make_plan(config, facts_of(scenario))
    return PublishedPlan.of(config, scenario, plan, NAMES, 1.0), scenario.proxy


def test_it_comes_back_from_the_disk_with_its_name(tmp_path: Path) -> None:
    plan, proxy = published(device_epsilon=8.0, channel="noised")
    plan.write(tmp_path, proxy)
    again, inputs = PublishedPlan.load(tmp_path)
    assert again == plan
    assert again.digest == plan.digest
    assert inputs.equal(proxy)


@pytest.mark.parametrize("epsilon", [3.0, "inf"])
def test_the_figures_are_those_of_the_settings(epsilon: Any) -> None:
    plan, proxy = published(epsilon=epsilon, device_epsilon=8.0)
    checked = plan.checked(len(proxy))
    assert checked.noise_multiplier == plan.noise_multiplier
    assert checked.rho == plan.rho
    assert checked.training.high == plan.epsilon_record


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise_multiplier", 0.5), ("rho", 9.0), ("epsilon_record", 1.0), ("queries", 7), ("clip_norm", 99.0)],
)
def test_a_figure_that_its_settings_do_not_give_is_refused(field: str, value: float) -> None:
    plan, proxy = published(device_epsilon=8.0)
    lying = plan.model_copy(update={field: value})
    with pytest.raises(RunError, match=field):
        lying.checked(len(proxy))


def test_it_names_no_path_and_no_seed(tmp_path: Path) -> None:
    secret = tmp_path / "cloud.key"
    plan, _ = published(
        seed=987654321,
        **{"channel": {"ca": str(secret), "certificate": str(secret), "key": str(secret)}},
    )
    text = plan.canonical.decode()
    assert str(tmp_path) not in text
    assert "987654321" not in text


def test_every_field_decides_the_name() -> None:
    plan, _ = published()
    other = plan.model_copy(update={"records_per_device": plan.records_per_device + 1})
    assert PublishedPlan.model_validate(other.tree()).digest != plan.digest


def test_an_altered_folder_is_refused(tmp_path: Path) -> None:
    plan, proxy = published()
    plan.write(tmp_path, proxy + 1)
    with pytest.raises(RunError, match="proxy set"):
        PublishedPlan.load(tmp_path)
    plan.write(tmp_path, proxy)
    (tmp_path / PLAN_FILE).write_text(json.dumps(plan.tree(), indent=2))
    with pytest.raises(RunError, match="canonical"):
        PublishedPlan.load(tmp_path)
    (tmp_path / PROXY_FILE).unlink()


def test_as_many_may_be_asked_for_as_there_are() -> None:
    """The number of devices is the roster's, and no default."""
    channel = {"kind": "secure", "minimum_devices": 7}
    config = Config(channel=channel, data={"devices": 8, "records_per_device": 20})
    scenario = build_scenario(config.data, config.seed)
    names = tuple(f"device-{number}" for number in range(8))
    plan = PublishedPlan.of(config, scenario, make_plan(config, facts_of(scenario)), names, 1.0)
    assert plan.config.channel.minimum_devices == 7
    assert plan.checked(len(scenario.proxy)).devices == 8


def test_a_stranger_has_no_number() -> None:
    plan, _ = published()
    assert plan.number("device-0003") == 3
    with pytest.raises(ConfigError, match="roster"):
        plan.number("mallory")
