"""Runs on text, whole: trained, audited, reported, exported, and what a cloud publishes of one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import play, small
from torch import Tensor

from audits.game import draw_pool
from cli import app
from privkd.config import Config
from privkd.data import build_scenario
from privkd.deployment.agreement import Agreement
from privkd.deployment.own_records import own_records
from privkd.deployment.owner import RecordsConfig
from privkd.deployment.published import PROXY_FILE, PublishedPlan
from privkd.errors import DataError, RunError
from privkd.export.formats import format_named, suffix_of
from privkd.prepared import finished, prepare, reopen
from privkd.progress import Silent
from privkd.runs.folder import RunFolder

WORDS = {"sport": ["match", "goal", "team", "ball"], "law": ["court", "judge", "clause", "appeal"]}
NAMES = tuple(f"device-{number:04d}" for number in range(3))


def texts(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    labels = [list(WORDS)[row % 2] for row in range(count)]
    return [(" ".join(rng.choice(WORDS[label], size=rng.integers(3, 9))), label) for label in labels]


def lines(path: Path, count: int = 320) -> Path:
    records = [json.dumps({"text": text, "label": label}) for text, label in texts(count)]
    path.write_text("\n".join(records), encoding="utf-8")
    return path


def asked(source: Path, student: str) -> tuple[str, ...]:
    return (
        f"data.source={source}",
        "data.vocabulary=280",
        "data.length=10",
        "data.gap=none",
        "teacher.model={name='auto', width=8}",
        f"student.models=[{{name='{student}', width=8}}]",
    )


@pytest.fixture(scope="module", params=["text-embedding", "transformer"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    play(folder / "run", *asked(lines(folder / "a.jsonl"), request.param))
    return folder / "run"


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    return left.value.code if isinstance(left.value.code, int) else 0


class TestRun:
    def test_the_tokenizer_is_kept_and_bound(self, run: Path) -> None:
        with RunFolder.resume(run) as folder:
            tokens = reopen(folder).scenario.constants.tokens
        assert tokens is not None
        assert (run / "tokenizer.json").read_text() == tokens.tokenizer

    def test_other_text_is_noticed(self, run: Path) -> None:
        source = run.parent / "a.jsonl"
        before = source.read_text()
        try:
            source.write_text(before.replace("judge", "jurist"))
            with RunFolder.resume(run) as folder, pytest.raises(RunError, match="changed"):
                reopen(folder)
        finally:
            source.write_text(before)

    def test_it_is_reported(self, run: Path) -> None:
        assert code_of("report", run) == 0
        assert "token ids" in (run / "report.html").read_text()

    @pytest.mark.parametrize("canaries", ["natural", "crafted"])
    def test_membership_is_audited(self, run: Path, canaries: str) -> None:
        found = code_of("audit", "membership", run, "--canaries", canaries, "--shadows", 8, "--targets", 2)
        assert found == 0

    def test_a_text_is_not_reconstructed(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert code_of("audit", "reconstruction", run) == 2
        assert "privkd audit membership" in capsys.readouterr().err

    @pytest.mark.parametrize("form", ["torch", "onnx"])
    def test_raw_text_comes_to_logits_in_two_lines(self, run: Path, tmp_path: Path, form: str) -> None:
        """By the tokenizer beside the model, which cuts and pads by itself."""
        library = pytest.importorskip("tokenizers")
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        out = tmp_path / f"m{suffix_of(form)}"
        assert code_of("export", run, "--format", form, "--out", out) == 0
        tokenizer = library.Tokenizer.from_file(str(tmp_path / "m-tokenizer.json"))
        written = ["the judge of the court", "a goal", "", "appeal " * 30]
        ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(written)])
        answers = format_named(form).load(out)(ids)
        with RunFolder.resume(run) as folder:
            game = reopen(folder)
            student = game.personalised(finished(game, folder), [0], Silent())[0]
        own = game.scenario.constants.features(np.array(written, dtype=object))
        assert torch.equal(ids, own)
        with torch.no_grad():
            assert torch.allclose(answers, student(own), rtol=1e-5, atol=1e-5)


def test_crafted_canaries_are_rows_of_tokens(tmp_path: Path) -> None:
    """Of ids beyond 2**24, of which none is a float32: nothing on the way makes numbers of them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (320, 6)) + 2**24 + 1
    np.savez(tmp_path / "a.npz", x=ids, y=np.arange(320) % 2)
    config = small(*asked(tmp_path / "a.npz", "mlp")[3:4], f"data.source={tmp_path / 'a.npz'}",
                   "data.tokens=true")  # fmt: skip
    scenario = build_scenario(config.data, 0)
    assert scenario.constants.vocabulary is not None
    sets = [scenario.public, scenario.test, *(device.train for device in scenario.devices)]
    known = {*torch.cat([part.inputs for part in sets]).unique().tolist()}
    for kind in ("natural", "mislabelled", "crafted"):
        candidates = draw_pool(scenario, 0, kind, 0).candidates.inputs
        assert candidates.dtype == torch.int64
        assert {*candidates.unique().tolist()} <= known | {0}
    assert all(part.dtype == torch.int64 for part in (scenario.proxy, scenario.to(torch.device("cpu")).proxy))


class TestPublished:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> tuple[PublishedPlan, Tensor, Config]:
        config = small(*asked(lines(tmp_path / "a.jsonl"), "text-cnn"))
        prepared = prepare(config)
        scenario = prepared.scenario
        return PublishedPlan.of(config, scenario, prepared.plan, NAMES, 1.0), scenario.proxy, config

    def test_a_device_tokenizes_its_own_text(
        self, plan: tuple[PublishedPlan, Tensor, Config], tmp_path: Path
    ) -> None:
        published, proxy, config = plan
        published.write(tmp_path, proxy)
        agreement = Agreement.read(tmp_path, NAMES[1])
        assert torch.equal(agreement.proxy, proxy)
        assert agreement.proxy.dtype == torch.int64
        agreement.check_models()
        own = own_records(RecordsConfig(source=str(tmp_path / "a.jsonl")), agreement.published)
        source = build_scenario(config.data, 0).constants
        written = np.array([text for text, _ in texts(320)], dtype=object)
        assert torch.equal(own.inputs, source.features(written))

    def test_other_records_than_text_are_refused(
        self, plan: tuple[PublishedPlan, Tensor, Config], tmp_path: Path
    ) -> None:
        np.savez(tmp_path / "a.npz", x=np.ones((4, 10)), y=["law", "sport"] * 2)
        with pytest.raises(DataError, match="holds numbers, and the plan is about text"):
            own_records(RecordsConfig(source=str(tmp_path / "a.npz")), plan[0])

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not the tokenizer of the plan"),
            (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        ],
    )
    def test_another_tokenizer_is_refused(
        self,
        plan: tuple[PublishedPlan, Tensor, Config],
        tmp_path: Path,
        spoil: Callable[[Path], Any],
        words: str,
    ) -> None:
        published, proxy, _ = plan
        published.write(tmp_path, proxy)
        spoil(tmp_path)
        with pytest.raises(RunError, match=words):
            PublishedPlan.load(tmp_path)

    def test_ids_beyond_the_vocabulary_are_refused(
        self, plan: tuple[PublishedPlan, Tensor, Config], tmp_path: Path
    ) -> None:
        published, proxy, _ = plan
        for wrong in (proxy + 10_000, proxy - 1, proxy.float()):
            published.write(tmp_path, wrong)
            digest = hashlib.sha256((tmp_path / PROXY_FILE).read_bytes()).hexdigest()
            lying = published.model_copy(update={"proxy": digest})
            (tmp_path / "plan.json").write_bytes(PublishedPlan.model_validate(lying.tree()).canonical)
            with pytest.raises(RunError, match="are not the plan's"):
                PublishedPlan.load(tmp_path)
