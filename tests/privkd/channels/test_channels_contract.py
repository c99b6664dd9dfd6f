"""What is known of each kind of channel: enough to plan, price, audit, draw and report a run over it.

The kinds are all that are registered, a user's own among them. What a release must be stands in
``test_channel``. False alarms: a sound channel fails a check of its audit with 1e-6, and crosses a bound in
0.1 % of all seeds; the seeds are fixed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_channel
import pytest
import torch
from matplotlib.colors import is_color_like
from matplotlib.markers import MarkerStyle
from mutants.accusations import fewest
from mutants.channel import clipped_at_twice, divided_by_the_devices, with_noise
from mutants.mutant import Fault
from running import charges, federation_of, play, small

import audits.mechanisms.closing
from audits.mechanism_audit import opened
from audits.mechanisms.closing import closing_audit
from audits.requests import attacks_of, check_view, is_wire
from privkd.channels import KINDS, Channel, open_channel, register
from privkd.channels.registry import OURS, known, price_of
from privkd.config import Config, load_config
from privkd.errors import ConfigError, InputError
from privkd.messages import Question, Release, Upload
from privkd.plan import PublicFacts, make_plan
from privkd.prepared import prepare
from privkd.privacy.bounds import Audited
from privkd.privacy.events import NoPrivacy, Unit, ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.progress import Silent

EVERY = (*OURS, own_channel.NAME)
FACTS = PublicFacts(devices=5, records_per_device=140, proxy=360, classes=10)
BUDGET = "privacy.device_epsilon=8"
TOO_LITTLE: dict[str, Fault] = {
    "noised": with_noise(0.5),
    "secure": divided_by_the_devices,
    own_channel.NAME: with_noise(0.5),
}


@pytest.fixture(autouse=True, scope="module")
def own() -> Iterator[None]:
    with own_channel.own_channel():
        yield


def settings(kind: str, *more: str) -> Config:
    return small(f"channel.kind={kind}", "privacy.epsilon=inf", *more)


def audited(kind: str, monkeypatch: pytest.MonkeyPatch) -> Audited:
    """The audit that ends a run over a channel of this kind, of as few canaries as it can do with."""
    monkeypatch.setattr(audits.mechanisms.closing, "audit_releases", fewest)
    run = prepare(settings(kind, *([BUDGET] if KINDS[kind].adds_noise else [])))
    with opened(run, run.plan.rho) as channel:
        federation = federation_of(run, channel)
        return closing_audit(federation, federation.begin(), Silent())


def test_every_kind_is_here() -> None:
    assert tuple(KINDS) == EVERY


@pytest.mark.parametrize("kind", EVERY)
class TestKnown:
    def test_its_views_are_audited(self, kind: str) -> None:
        views = KINDS[kind].views
        assert 1 <= len(views) == len(set(views))
        for view in views:
            check_view(view)
            assert is_wire(view)
            assert "matched-filter" in attacks_of(view)

    def test_says_who_sees_what(self, kind: str) -> None:
        for noise in ("", "device-level ε ≤ 8") if KINDS[kind].adds_noise else ("",):
            said = KINDS[kind].trust(settings(kind).channel, noise)
            assert said.parties[-1].title == "Cloud"
            assert len(said.parties) == len(said.arrows)
            assert len(said.words) >= 2
            lines = [line for box in said.parties for line in box.lines]
            assert noise in " ".join([*said.words, *said.device, *lines])

    def test_looks_like_no_other(self, kind: str) -> None:
        one = KINDS[kind]
        assert is_color_like(one.colour)
        assert MarkerStyle(one.marker)
        others = [KINDS[name] for name in EVERY if name != kind]
        assert all(one.colour != other.colour and one.marker != other.marker for other in others)

    def test_has_a_price_before_it_is_opened(self, kind: str) -> None:
        for rho in (None, 0.5) if KINDS[kind].adds_noise else (None,):
            with open_channel(kind, clip_norm=2.0, rho=rho, root=NoiseRoot.from_seed(0)) as channel:
                assert channel.event == price_of(kind, rho) == (ZCdp(0.5) if rho else channel.event)
        plan = make_plan(settings(kind), FACTS)
        assert plan.device_event == price_of(kind, None) == NoPrivacy(KINDS[kind].without_noise)
        assert "nois" in KINDS[kind].without_noise

    def test_is_debited(self, kind: str, tmp_path: Path) -> None:
        budget = [BUDGET] if KINDS[kind].adds_noise else []
        play(tmp_path / "run", f"channel.kind={kind}", "privacy.epsilon=inf", "rounds=1", *budget)
        (by_device,) = [charge for charge in charges(tmp_path / "run") if charge["unit"] == "device"][:1]
        assert by_device["event"]["kind"] == ("zcdp" if budget else "no_privacy")

    def test_keeps_a_budget_or_refuses_it(self, kind: str) -> None:
        if KINDS[kind].adds_noise:
            assert make_plan(settings(kind, BUDGET), FACTS).device.high <= 8
        else:
            with pytest.raises(ConfigError, match=f"the {kind} channel adds no noise"):
                open_channel(kind, clip_norm=1.0, rho=1.0, root=NoiseRoot.from_seed(0))
            with pytest.raises(ConfigError, match="needs noise on the channel"):
                settings(kind, BUDGET)

    def test_is_audited_or_says_why_not(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        found = audited(kind, monkeypatch)
        bounds = [bound for bound in found.bounds if bound.unit is Unit.DEVICE]
        assert bool(bounds) != bool(KINDS[kind].unaudited)
        assert all(check.passed for check in found.checks), found.checks
        assert all(bound.epsilon <= 8 and f"own {kind} channel" in bound.path for bound in bounds)


@pytest.mark.parametrize("kind", TOO_LITTLE)
@pytest.mark.parametrize("fault", ["too little noise", "no clipping at the norm"])
def test_the_audit_finds_a_fault(kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the variance or less, over 800 draws; blocks of twice the norm: see `mutants.channel`."""
    put = TOO_LITTLE[kind] if fault == "too little noise" else clipped_at_twice
    put(lambda owner, name, value: monkeypatch.setattr(owner, name, value))
    failed = [check.name for check in audited(kind, monkeypatch).checks if not check.passed]
    which = "claimed variance" if fault == "too little noise" else "fresh for every device"
    assert any(which in name for name in failed), failed


def test_all_that_add_noise_have_a_fault() -> None:
    assert set(TOO_LITTLE) == {kind for kind in EVERY if KINDS[kind].adds_noise}


class TestOnesOwn:
    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"colours": "red"}, "unknown 'colours'"),
            ({"budgeted": True}, "unknown 'budgeted'"),
            ({"views": ()}, "expected one view"),
            ({"views": ("teacher",)}, "none of them a model's"),
            ({"views": ("a", "b")}, "expected one view"),
            ({"shows_each": False, "views": ("a", "b", "c")}, "expected one view or two"),
        ],
    )
    def test_is_refused_with_a_mistake(self, given: dict[str, Any], why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            register("odd", trust="Nobody.", **given)
        assert "odd" not in KINDS

    def test_takes_no_name_of_ours(self) -> None:
        with pytest.raises(ConfigError, match="a name of privkd's own"):
            register("secure", trust="Nobody.")(Shapeless)

    def test_releases_what_it_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(KINDS, "_values", dict(KINDS._values))
        monkeypatch.setattr(KINDS, "_makers", dict(KINDS._makers))
        register("shapeless", trust="Nobody.")(Shapeless)
        with open_channel("shapeless", clip_norm=1.0, root=NoiseRoot.from_seed(0)) as channel:
            with pytest.raises(InputError, match=r"'shapeless': released .* \[2\]; expected \[1, 3, 2\]"):
                channel.release(torch.zeros(1, 3, 2), devices=["a"], round=0)
            with pytest.raises(InputError, match=r"channel.kind 'shapeless', .* failed: ZeroDivisionError"):
                channel.release(torch.zeros(1, 3, 2), devices=["a"], round=1)

    def test_that_is_not_loaded_is_told_apart(self) -> None:
        """A record of its run is read, and a typo is refused, plug-ins or not."""
        there = load_config(None, ["channel.kind=theirs", "plugins=their.package"])
        assert there.channel.kind == "theirs"
        assert "not loaded here" in known("theirs").trust(there.channel, "").words[0]
        with pytest.raises(ConfigError, match=r"channel\.kind='curatde': expected one of \['curated', "):
            load_config(None, ["channel.kind=curatde"])
        with pytest.raises(ConfigError, match=r"their sum alone: take channel\.kind 'plain' or 'noised'"):
            load_config(None, ["channel.kind=curated", "reverse.aggregation=median"])
        with pytest.raises(ConfigError, match="are for kind 'secure'"):
            load_config(None, ["channel.kind=curated", "channel.minimum_devices=2"])


class Shapeless(Channel):
    def encode(self, question: Question, block: Any, device: str) -> Upload:
        return Upload(device, question.round, b"")

    def collect(self, question: Question, uploads: Any) -> Release:
        return Release.to(question, torch.zeros(2 // (1 - question.round)), 0.0, ["a"])
