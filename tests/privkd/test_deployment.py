"""What a reader of the run folder finds, and what a deployment does differently from a simulation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import StopAt, Trained, Watching, outcome, play, resume, weights
from safetensors.torch import load_file
from torch import Tensor

import privkd.federation
from privkd.errors import RunError
from privkd.prepared import prepare
from privkd.privacy.events import Unit
from privkd.privacy.noise import Keystream, NoiseRoot
from privkd.runs.checkpoint import load_transcript
from privkd.runs.folder import RunFolder
from privkd.runs.result import Result

Secure = tuple[Path, Result, Path, list[Tensor]]


def release(path: Path, name: str = "wire") -> dict[str, Tensor]:
    """What the first round left in ``path``."""
    return load_file(path / "rounds" / "001" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Secure:
    """A run over the secure channel, its twin over the plain one, and the twin's answers."""
    base = tmp_path_factory.mktemp("secure")
    with pytest.MonkeyPatch.context() as patch:
        watching = Watching(base / "plain", patch)
        play(base / "plain", "rounds=1")
    result = play(base / "secure", "rounds=1", "channel.kind=secure")
    return base / "secure", result, base / "plain", watching.answers


class TestSecure:
    def test_the_cloud_gets_the_mean_and_learns_the_same(self, secure: Secure) -> None:
        path, _, plain, answers = secure
        wire = release(path)
        assert wire["answers"].shape == answers[0].shape[1:]
        torch.testing.assert_close(wire["answers"], answers[0].mean(0), atol=1e-4, rtol=0)
        one, other = (release(p, "cloud") for p in (path, plain))
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-2, rtol=0)

    def test_without_noise_a_device_has_no_guarantee_and_the_result_says_so(self, secure: Secure) -> None:
        path, result, _, _ = secure
        found = outcome(path)["ledger"]["device"]
        assert found["epsilon"] == "inf"
        assert "secure aggregation without noise" in found["reasons"][0]
        assert result.statement(Unit.RECORD).high <= 3.0

    def test_the_transcript_shows_the_sum_alone(self, secure: Secure) -> None:
        path, _, plain, _ = secure
        for folder, axes in ((path, 2), (plain, 3)):
            with RunFolder.resume(folder) as opened:
                game = prepare(opened.config)
                seen = load_transcript(opened, game.cloud.untrained_teacher()).exchanges
            assert all(each.release.answers.ndim == axes for each in seen)
            assert len(seen) == 1


class TestDeployment:
    SYSTEM = ("privacy.noise=system", "controls=true")

    def test_skips_whatever_touches_private_records_beside_the_ledger(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run", *self.SYSTEM)
        assert result.student.direct is None
        assert result.student.direct_private is None
        assert math.isnan(result.student.personal)
        assert math.isnan(result.student.mean)
        found = outcome(tmp_path / "run")
        assert found["student"]["personal"] is None
        assert found["student"]["mean"] is None
        assert [row["students"] is None for row in found["rounds"]] == [False, True, True]
        assert found["student"]["direct"] is None
        assert found["noise"] == "system"
        assert result.statement(Unit.RECORD).high <= 3.0

    @pytest.mark.parametrize("engine", ["opacus", "cohort"])
    def test_no_seed_reaches_its_noise(
        self, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained = Trained(monkeypatch)
        for name in ("one", "two"):
            play(tmp_path / name, *self.SYSTEM, f"student.engine={engine}", "rounds=1")
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        assert one["rounds/000/cloud.safetensors"] == two["rounds/000/cloud.safetensors"], (
            "public, and seeded"
        )
        assert float((trained.values(0) - trained.values(1)).abs().min()) > 0, "every weight"

    def test_no_seed_reaches_the_channels_noise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The students train without DP and so from the seed: the releases differ by the channel's noise."""
        noised = ("channel.kind=noised", "privacy.device_epsilon=8", "privacy.epsilon=inf", "rounds=1")
        trained = Trained(monkeypatch)
        for name in ("one", "two"):
            play(tmp_path / name, *self.SYSTEM, *noised)
        assert torch.equal(trained.values(0), trained.values(1))
        wires = [
            load_file(tmp_path / n / "rounds" / "001" / "wire.safetensors")["answers"] for n in ("one", "two")
        ]
        assert float((wires[0] - wires[1]).abs().min()) > 0

    @pytest.mark.parametrize("kind", ["noised", "secure"])
    def test_all_streams_grow_from_the_systems_key_whatever_the_seed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """Samples, DP-SGD's noise, the channel's noise and shares; a seeded twin shows what would be seen."""
        key, used, inner, opened = bytes(range(32)), [], NoiseRoot.stream, []
        open_channel = privkd.federation.open_channel
        monkeypatch.setattr(NoiseRoot, "from_system", classmethod(lambda cls: cls(key)))

        def stream(root: NoiseRoot, *labels: Any) -> Keystream:
            used.append(root.key)
            return inner(root, *labels)

        def opening(*arguments: Any, **named: Any) -> Any:
            opened.append(named["root"].key)
            return open_channel(*arguments, **named)

        monkeypatch.setattr(NoiseRoot, "stream", stream)
        monkeypatch.setattr("privkd.federation.open_channel", opening)
        noised = (f"channel.kind={kind}", "privacy.device_epsilon=8", "rounds=1")
        for seed in (0, 1):
            play(tmp_path / f"{seed}", *self.SYSTEM, *noised, f"seed={seed}")
        assert opened == [key, key]
        assert used
        assert kind == "secure" or set(used) == {key}
        seeded = {NoiseRoot.from_seed(seed).key for seed in (0, 1)}
        assert not seeded & {*used, *opened}
        play(tmp_path / "twin", *noised)
        assert opened[-1] in seeded

    def test_the_key_does_not_outlive_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys: list[bytes] = []
        inner = RunFolder.secret

        def secret(folder: RunFolder, name: str, fresh: bytes) -> bytes:
            keys.append(inner(folder, name, fresh))
            assert (folder.path / "secrets" / name).read_bytes() == keys[-1]
            return keys[-1]

        monkeypatch.setattr(RunFolder, "secret", secret)
        play(tmp_path / "run", *self.SYSTEM, "rounds=1")
        assert len(keys) == 1
        assert not (tmp_path / "run" / "secrets").exists()
        everything = b"".join(f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file())
        assert keys[0] not in everything
        assert keys[0].hex().encode() not in everything

    def test_a_simulation_keeps_no_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "privkd.privacy.noise.os.urandom", lambda size: pytest.fail("system noise in a simulation")
        )
        play(tmp_path / "run", "rounds=1")


def npz(path: Path, seed: int) -> str:
    rng = np.random.default_rng(seed)
    np.savez(path, inputs=rng.random((400, 6)).astype(np.float32), labels=rng.integers(0, 3, 400))
    return f"data.source={path}"


GIVEN = (
    "data.classes=0,1,2",
    "data.public_records=40",
    "data.validation_records=20",
    "data.test_records=80",
)


class TestSameRecords:
    @pytest.mark.parametrize("noise", ["seeded", "system"])
    def test_a_run_goes_on_with_the_data_it_was_started_with(self, tmp_path: Path, noise: str) -> None:
        """Replayed on other data the noise would cancel: the two releases would differ by the bare data."""
        data = npz(tmp_path / "data.npz", 0)
        with pytest.raises(KeyboardInterrupt):
            play(tmp_path / "run", data, *GIVEN, f"privacy.noise={noise}", progress=StopAt(5))
        npz(tmp_path / "data.npz", 1)
        with pytest.raises(RunError, match="the data changed since the run was started"):
            resume(tmp_path / "run")
        npz(tmp_path / "data.npz", 0)
        resume(tmp_path / "run")
