"""Models as people write them: each kind runs, leaves as a file, or is refused by its layer with a cure."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_module import own_module
from running import play

from privkd.errors import ModelError
from privkd.export.export import export_student
from privkd.runs.folder import RunFolder

CODE = """
import torch
from torch import nn

class Keeps(nn.Module):
    def __init__(self, classes, keep):
        super().__init__()
        self.body, self.head, self.keep = nn.Linear(64, 16), nn.Linear(16, classes), keep
        self.features = None
    def forward(self, x):
        found = torch.tanh(self.body(x.flatten(1)))
        self.features = {"tensor": found, "list": [found], "dict": {"last": (found,)}}[self.keep]
        return self.head(found)

class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, classes)
        self.other.weight = self.one.weight
    def forward(self, x):
        return self.head(torch.tanh(self.other(torch.tanh(self.one(x.flatten(1))))))

def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes))

def tensor(shape, classes): return Keeps(classes, "tensor")
def list_(shape, classes): return Keeps(classes, "list")
def dict_(shape, classes): return Keeps(classes, "dict")
def tied(shape, classes): return Tied(classes)
def lazy(shape, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.LazyLinear(classes))
def compiled(shape, classes): return torch.compile(net(classes))
def peft(shape, classes):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(net(classes), LoraConfig(target_modules=["1"], r=2, modules_to_save=["3"]))
def scripted(shape, classes): return nn.Sequential(torch.jit.script(net(classes)))
def half(shape, classes): return net(classes).half()
def frozen(shape, classes): return net(classes).requires_grad_(False)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with own_module(CODE, "own_kinds", tmp_path, monkeypatch) as name:
        yield name


def setting(role: str, model: str) -> str:
    return f"student.models=['{model}']" if role == "student" else f"teacher.model={model}"


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["tensor", "list_", "dict_", "tied", "lazy", "compiled", "peft"])
def test_it_runs_and_is_exported(tmp_path: Path, own: str, kind: str, role: str) -> None:
    if kind == "peft":
        pytest.importorskip("peft")
    play(tmp_path / "run", setting(role, f"{own}:{kind}"), "rounds=1")
    if role == "student" and kind not in ("list_", "dict_"):
        with RunFolder.resume(tmp_path / "run") as folder:
            made = export_student(folder, "torch", 0, tmp_path / "student.pt2")
        assert made.check.difference < 1e-5


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("scripted", r"layer '0' \(RecursiveScriptModule\) is compiled by torch.jit .*return the module"),
        ("half", r"layer '1' \(Linear\) has weights of torch.float16.*\.float\(\)"),
        ("frozen", r"nothing to train.*requires_grad_\(True\)"),
    ],
)
def test_it_is_refused_by_its_layer(tmp_path: Path, own: str, kind: str, role: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        play(tmp_path / "run", setting(role, f"{own}:{kind}"))
    assert "\n" not in str(refused.value)
