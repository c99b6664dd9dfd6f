"""Frozen encoders: public constants below teacher and students, computed once for each record."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import damaged, fuzzed, no_hang
from hypothesis import given
from hypothesis import strategies as st
from on_device import box, clouds
from own_module import own_module
from running import play
from torch import nn

from privkd.config import DpSgdConfig, ModelConfig, load_config
from privkd.deployment.agreement import agree, show
from privkd.errors import ModelError, RunError
from privkd.export.export import export_student
from privkd.models import features
from privkd.models.encoder import Encoder, encoder_named
from privkd.models.features import Parted
from privkd.models.inputs import InputType
from privkd.models.zoo import build, parameter_count, trained_parameters
from privkd.prepared import prepare, reopen
from privkd.runs.binding import binding_of
from privkd.runs.folder import RunFolder
from privkd.training.dpsgd import check_trainable
from privkd.training.proof import Probe, check_apart
from privkd.training.vectorised import formulation

SHAPE = (1, 8, 8)

CODE = """
import torch
from torch import nn

class Once(nn.Module):
    seen = 0
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        Once.seen += len(x)
        return self.drop(self.norm(torch.relu(self.weight(x.flatten(1)))))

class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = Centre()
    def forward(self, x):
        return self.centre(x.flatten(1))

class Centre(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

class Drawing(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand(x.shape[0], 1)

class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        return x.flatten(1) * self.calls

def encoder(shape): return Once(24)
def plain(shape): return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU())
def compiled(shape): return torch.compile(Once(24))
def mixing(shape): return Mixing()
def drawing(shape): return Drawing()
def keeping(shape): return Keeping()
def failing(shape): raise RuntimeError("no weights here")
def nothing(shape): return 3
def flat(shape): return nn.Flatten(0)
def whole(shape): return nn.Sequential(nn.Flatten(), nn.Embedding(4, 4))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in a folder that is imported from."""
    with own_module(CODE, "own_encoder", tmp_path, monkeypatch) as name:
        yield name


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A small encoder of random weights, as transformers save it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "text":
        sizes |= {"vocab_size": 30, "max_position_embeddings": 12}
        model = transformers.BertModel(transformers.BertConfig(**sizes | settings))
    else:
        sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
        model = transformers.ViTModel(transformers.ViTConfig(**sizes | settings))
    model.save_pretrained(folder)
    return folder


def named(name: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Encoder:
    return encoder_named(name, InputType(shape, dtype))


def model_on(name: str, shape: tuple[int, ...] = SHAPE, vocabulary: int | None = None) -> nn.Module:
    config = ModelConfig(name="linear", encoder=name)
    return build(config, input_shape=shape, classes=4, seed=0, vocabulary=vocabulary)


class TestFront:
    def test_constants_are_shared_and_in_no_state(self, own: str) -> None:
        one, other = model_on(f"{own}:encoder"), model_on(f"{own}:encoder")
        front = Parted.of(one).front
        assert isinstance(front, Encoder)
        assert sorted(one.state_dict()) == ["head.bias", "head.weight"]
        assert parameter_count(one) == 24 * 4 + 4
        assert [p.shape for p in trained_parameters(one, "head")] == [(4, 24), (4,)]
        assert front._constants is Parted.of(other).front._constants  # type: ignore[union-attr]
        doubled = one.double()
        assert doubled[0](torch.rand(2, *SHAPE).double()).dtype == torch.float64  # type: ignore[index]
        assert other[0](torch.rand(2, *SHAPE)).dtype == torch.float32  # type: ignore[index]

    def test_gives_what_the_encoder_gives(self, own: str) -> None:
        model, x = model_on(f"{own}:encoder").train(), torch.rand(21, *SHAPE)
        plain = sys.modules[own].encoder(SHAPE).eval()
        found = Parted.of(model).features(x)
        torch.testing.assert_close(found, plain(x).detach())
        torch.testing.assert_close(model(x), model[2](plain(x)))  # type: ignore[index]
        assert not found.requires_grad
        assert model[0](x[:0]).shape == (0, 24)  # type: ignore[index]

    def test_each_record_goes_through_once(self, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "_rows", type(features._rows)())
        parted, x = Parted.of(model_on(f"{own}:encoder")), torch.rand(40, *SHAPE)
        whole = parted.features(x)
        sys.modules[own].Once.seen = 0
        again = parted.features(x[torch.arange(39, -1, -2)].clone())
        assert sys.modules[own].Once.seen == 0
        assert torch.equal(again, whole[torch.arange(39, -1, -2)])
        parted.features(torch.cat([x[:3], torch.rand(5, *SHAPE)]))
        assert sys.modules[own].Once.seen == 16

    def test_what_finds_no_room_is_computed_again(self, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "_rows", type(features._rows)())
        parted, x = Parted.of(model_on(f"{own}:encoder")), torch.rand(40, *SHAPE)
        whole = parted.features(x)
        monkeypatch.setattr(features, "_MOST_KEPT", 0)
        torch.testing.assert_close(parted.features(torch.rand_like(x)).shape, whole.shape)
        torch.testing.assert_close(parted.features(x.clone()), whole)

    def test_a_cohort_is_the_fast_program(self, own: str) -> None:
        assert formulation(model_on(f"{own}:encoder"), SHAPE) == "bookkeeping"

    def test_a_compiled_encoder_is_taken_as_it_was(self, own: str) -> None:
        one, other = (named(f"{own}:{name}") for name in ("encoder", "compiled"))
        assert one.digest == other.digest


class TestProof:
    @pytest.mark.parametrize("name", ["encoder", "compiled"])
    def test_a_good_one_passes(self, own: str, name: str) -> None:
        probe = Probe.made_up(SHAPE, 4, torch.zeros(1))
        check_apart(model_on(f"{own}:{name}"), probe, "student")
        check_trainable(
            model_on(f"{own}:{name}"), input_shape=SHAPE, classes=4, recipe=DpSgdConfig(), probe=probe
        )

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("mixing", r"layer 'centre' \(Centre\): treat each record by itself"),
            ("drawing", "other features the next time: draw nothing"),
            ("keeping", "other features the next time: draw nothing, and keep nothing"),
        ],
    )
    def test_a_bad_one_is_refused(self, own: str, name: str, said: str) -> None:
        probe = Probe.made_up(SHAPE, 4, torch.zeros(1))
        with pytest.raises(ModelError, match=f"the encoder cannot stand below.*{said}"):
            check_apart(model_on(f"{own}:{name}"), probe, "student")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("failing", r"failing\(\(1, 8, 8\)\) failed: .*no weights here"),
            ("nothing", "returned int, not a torch.nn.Module"),
            ("flat", r"returned \[128\] for 2 records"),
            ("whole", r"does not take records of shape \[1, 8, 8\]"),
            ("missing", "cannot be imported"),
        ],
    )
    def test_what_is_none_is_refused(self, own: str, name: str, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            model_on(f"{own}:{name}")


class TestHub:
    def test_text_is_the_mean_over_what_is_no_padding(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "bert", "text")
        tokens = torch.randint(1, 30, (3, 10))
        tokens[0, 4:] = 0
        found = named(str(folder), (10,), torch.int64)(tokens)
        model = pytest.importorskip("transformers").BertModel.from_pretrained(folder).eval()
        with torch.no_grad():
            alone = model(input_ids=tokens[:1, :4]).last_hidden_state.mean(1)
            rest = model(input_ids=tokens[1:]).last_hidden_state.mean(1)
        torch.testing.assert_close(found, torch.cat([alone, rest]))
        assert named(str(folder), (10,), torch.int64)(torch.full((1, 10), 99)).isfinite().all()

    def test_images_are_standardised(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "vit", "images")
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
        images = torch.rand(3, *SHAPE)
        model = pytest.importorskip("transformers").ViTModel.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = model(pixel_values=(images - 0.5) / 0.25).last_hidden_state.mean(1)
        torch.testing.assert_close(named(str(folder))(images), expected)

    @pytest.mark.parametrize("kind", ["text", "images"])
    def test_it_is_proved(self, tmp_path: Path, kind: str) -> None:
        shape = (10,) if kind == "text" else SHAPE
        public = torch.randint(0, 30, (40, 10)) if kind == "text" else torch.rand(40, *SHAPE)
        model = model_on(str(saved(tmp_path / "hub", kind)), shape, 30 if kind == "text" else None)
        check_apart(model, Probe.of(public, 4), "student")

    def test_a_changed_folder_is_read_again(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "vit", "images")
        first = named(str(folder)).digest
        assert named(str(folder)).digest == first
        saved(folder, "images", hidden_act="relu")
        assert named(str(folder)).digest != first

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda folder: (folder / "config.json").unlink(), "no config.json in it"),
            (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
            (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
            (lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'), "cannot load it"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no weights in it"),
            (
                lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
                "pickled, which may run anything",
            ),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04."), "holds no weights"),
            (lambda folder: _edit(folder, num_hidden_layers=10**9), "more than there are weights"),
            (lambda folder: _edit(folder, hidden_size=2 * 10**8), "cannot load it"),
            (lambda folder: _edit(folder, image_size=10**9), "cannot load it"),
            (lambda folder: _edit(folder, hidden_size=16), "cannot load it|another shape"),
            (lambda folder: _edit(folder, num_hidden_layers=2), "lacks .* and .* more"),
            (lambda folder: _edit(folder, num_channels=3), "images of 3 channels|cannot load it"),
            (lambda folder: _edit(folder, is_encoder_decoder=True), "save its encoder by itself"),
            (lambda folder: _edit(folder, image_size=16), "does not take records|cannot load|another shape"),
            (lambda folder: _edit(folder, auto_map={"AutoModel": "a.B"}, model_type="x"), "cannot load it"),
            (lambda folder: _loop(folder / "model.safetensors"), "no weights in it"),
            (lambda folder: _loop(folder / "config.json"), "no config.json"),
            (
                lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": "a"}'),
                "no number for each of 1 channels",
            ),
        ],
    )
    def test_a_damaged_folder_is_refused(
        self, tmp_path: Path, change: Callable[[Path], None], said: str
    ) -> None:
        folder = saved(tmp_path / "vit", "images")
        change(folder)
        with pytest.raises(ModelError, match=said) as refused:
            named(str(folder))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("settings", "shape", "dtype", "said"),
        [
            ({"pad_token_id": 1}, (10,), torch.int64, "with token 1"),
            ({}, (13,), torch.int64, "at most 12 tokens"),
            ({}, (10,), torch.float32, "takes texts as tokens"),
        ],
    )
    def test_other_records_are_refused(
        self, tmp_path: Path, settings: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, said: str
    ) -> None:
        with pytest.raises(ModelError, match=said):
            named(str(saved(tmp_path / "bert", "text", **settings)), shape, dtype)

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such folder; expected one with "):
            named(str(tmp_path / "nowhere"))

    def test_damage_ends_in_one_line(self, tmp_path: Path) -> None:
        folder = saved(tmp_path / "vit", "images")
        whole = {path: path.read_bytes() for path in folder.iterdir()}

        @fuzzed()
        @given(st.data())
        def tries(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(sorted(whole)))
            path.write_bytes(data.draw(damaged(whole[path])))
            try:
                with no_hang():
                    named(str(folder))
            except ModelError as error:
                assert "\n" not in str(error)  # noqa: PT017
            finally:
                path.write_bytes(whole[path])

        tries()


def _edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


class TestRuns:
    def test_settings(self) -> None:
        config = load_config(None, ["encoder=a:b", "student.models=['mlp', {name='mlp', encoder='none'}]"])
        assert [model.encoder for model in config.models] == ["a:b", "a:b", None]
        renamed = config.with_encoders(str.upper)
        assert [model.encoder for model in renamed.models] == ["A:B", "A:B", None]

    def test_a_run_stands_on_it_and_is_bound_to_it(
        self, tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "run"
        result = play(path, f"encoder={own}:plain")
        assert result.student.parameters == 24 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10
        with RunFolder.resume(path) as folder:
            binding = binding_of(folder.journal, path)
        assert binding is not None
        assert list(binding.encoders) == [f"{own}:plain"]
        assert f"{own}.py" in binding.code
        monkeypatch.chdir(tmp_path)
        with RunFolder.resume(path) as folder:
            for form in ("torch", "onnx"):
                made = export_student(folder, form, 0, tmp_path / f"s{'.onnx' if form == 'onnx' else '.pt2'}")
                assert made.parameters > result.student.parameters
            monkeypatch.setattr(sys.modules[own], "plain", lambda shape: nn.Flatten())
            with pytest.raises(RunError, match=r"the encoder changed .*plain was changed"):
                reopen(folder)

    def test_a_folder_is_found_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved(tmp_path / "vit", "images")
        monkeypatch.chdir(tmp_path)
        play(tmp_path / "run", "encoder=vit", "teacher.model.encoder=none")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with RunFolder.resume(tmp_path / "run") as folder:
            assert export_student(folder, "onnx", 0, tmp_path / "s.onnx").check.difference < 1e-5
            assert Parted.of(prepare(folder.config).cloud.untrained_teacher()).front is None


class TestDeployment:
    def test_the_plan_has_the_digest_and_the_device_its_own_copy(self, tmp_path: Path, own: str) -> None:
        cloud = clouds(f"encoder={own}:encoder")
        digest = named(f"{own}:encoder").digest
        assert cloud.published.config.encoder == digest
        assert own not in cloud.published.canonical.decode()
        assert not any("encoder" in name for name in cloud.tensors(0))
        lacking = box(tmp_path / "lacking", cloud, agreed=False)
        plan = cloud.write(tmp_path / "plan")
        assert digest in str(show(lacking.owner, plan).asks["student"])
        with pytest.raises(ModelError, match="name its folder in `encoders`"):
            agree(lacking.owner, plan, cloud.published.digest)
        device = box(tmp_path / "device", cloud, encoders=(f"{own}:encoder",))
        answered, block = device(cloud.ask())
        assert answered.refused is None
        assert len(np.frombuffer(block, np.uint8))
