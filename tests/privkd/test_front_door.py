"""The front door from Python: what three imports offer, own records and models, values, and no way around."""

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import ROOT
from running import SMALL, StopAt
from test_front import process
from torch import nn

import attacks
import audits
import privkd
from audits.tables import MembershipReport
from privkd.channels.channel import Channel, PlainChannel
from privkd.config import load_config
from privkd.errors import InputError, RunError
from privkd.federation import Federation
from privkd.prepared import Prepared, prepare

FRONTS = (privkd, audits, attacks)
NUMERIC = {"torch", "numpy", "scipy", "pandas", "matplotlib", "opacus", "dp_accounting"}
CONFIG = load_config(None, [*SMALL, "rounds=1"])


def arrays() -> tuple[Any, Any]:
    """Records of three classes ``[record, feature]``, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 3
    return rng.normal(size=(400, 5)) + labels[:, None], labels


def own_student(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], classes))


class TestImports:
    @pytest.mark.parametrize("name", ["privkd", "audits", "attacks"])
    def test_load_nothing_numeric(self, name: str) -> None:
        code = f"import {name}, sys; print(sorted({NUMERIC!r} & set(sys.modules)))"
        assert process(code=code, cwd=ROOT) == (0, "[]\n", "")

    @pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.__name__)
    def test_offer_what_they_name(self, front: Any) -> None:
        assert len(set(front.__all__)) == len(front.__all__)
        assert set(front.__all__) <= set(dir(front))
        for name in front.__all__:
            assert getattr(front, name) is not None
        with pytest.raises(AttributeError, match=f"module '{front.__name__}' has no attribute 'nothing'"):
            _ = front.nothing

    def test_the_version_is_the_packages(self) -> None:
        stated = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        assert stated is not None
        assert privkd.__version__ == stated[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> privkd.Run:
    """A run on arrays, of a student whose factory no other process can import."""

    def local_student(input_shape: tuple[int, ...], classes: int) -> nn.Module:
        return own_student(input_shape, classes)

    out = tmp_path_factory.mktemp("door") / "run"
    return privkd.train(CONFIG, data=arrays(), student=local_student, out=out)


AUDIT = "audits.membership(run, view='student', attack='lira-online', shadows=8, targets=1)"


def audit(run: privkd.Run | Path) -> MembershipReport:
    return audits.membership(run, view="student", attack="lira-online", shadows=8, targets=1)


def elsewhere(run: privkd.Run, code: str) -> tuple[int, str, str]:
    """``code`` in another process, which has the records and the factory under other names."""
    begin = (
        "import audits, numpy as np, privkd\nfrom torch import nn\nfrom typing import Any\n"
        f"{inspect.getsource(arrays)}\n{inspect.getsource(own_student)}\npath = {str(run.path)!r}\n"
    )
    return process(code=begin + textwrap.dedent(code), cwd=ROOT)


class TestOwnRecordsAndModels:
    def test_train_a_run(self, run: privkd.Run) -> None:
        assert (run.config.data.source, run.config.student.models[0].name) == (
            "python:records",
            "python:student",
        )
        assert [type(module) for module in prepare(run.config).cloud.untrained_students()[0]] == [
            nn.Flatten,
            nn.Linear,
        ]

    def test_are_audited_in_the_same_process(self, run: privkd.Run) -> None:
        found = audit(run)
        assert [finding.attack for finding in found.findings] == ["lira-online"]
        assert audit(run.path) == found

    def test_are_asked_for_in_another_process(self, run: privkd.Run) -> None:
        """What was recorded is read there; what plays the run again needs them."""
        code, out, err = elsewhere(
            run,
            f"""
            from privkd.errors import InputError
            run = privkd.load(path)
            print(run.result.teacher.after)
            try:
                {AUDIT}
            except InputError as error:
                print(error)
            """,
        )
        assert code == 0, err
        accuracy, refusal = out.splitlines()
        assert float(accuracy) == run.result.teacher.after
        assert refusal.endswith(
            "was handed over in another process: give it to privkd.load, or to privkd.resume, again"
        )

    def test_and_given_again_are_audited_alike(self, run: privkd.Run) -> None:
        code, out, err = elsewhere(
            run,
            f"""
            run = privkd.load(path, data=arrays(), student=own_student)
            print({AUDIT}.findings[0].auc.estimate)
            """,
        )
        assert code == 0, err
        again = audit(run)
        assert float(out) == again.findings[0].auc.estimate  # type: ignore[union-attr]

    def test_other_records_are_refused(self, run: privkd.Run) -> None:
        code, _, err = elsewhere(
            run,
            f"""
            inputs, labels = arrays()
            run = privkd.load(path, data=(inputs + 1, labels), student=own_student)
            {AUDIT}
            """,
        )
        assert code == 1
        assert "RunError" in err.splitlines()[-1]
        assert "changed" in err.splitlines()[-1]

    def test_and_given_again_a_run_goes_on(self, run: privkd.Run, tmp_path: Path) -> None:
        """Killed after its first commit, it ends as the whole one."""
        path, stop = tmp_path / "run", StopAt(4)
        with pytest.raises(KeyboardInterrupt):
            privkd.train(
                CONFIG, data=arrays(), student=lambda *shape: own_student(*shape), out=path, progress=stop
            )
        code, out, err = elsewhere(
            run,
            f"""
            import pathlib
            path = {str(path)!r}
            try:
                privkd.resume(path)
            except privkd.errors.InputError as error:
                print("give it" in str(error))
            run = privkd.resume(path, data=arrays(), student=own_student)
            print(run.result.teacher.after)
            """,
        )
        assert code == 0, err
        assert out.split() == ["True", str(run.result.teacher.after)]

    @pytest.mark.parametrize(
        "given", [{"data": arrays()}, {"student": own_student}, {"teacher": own_student}], ids=list
    )
    def test_a_run_of_ours_needs_none(self, given: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text("{}")
        (tmp_path / "config.toml").write_text("")
        with pytest.raises(InputError, match=r"the run has '.*', which was not handed over: give nothing"):
            privkd.load(tmp_path, **given)

    def test_as_many_students_are_given_again(self, run: privkd.Run) -> None:
        with pytest.raises(InputError, match="2 students given again, but the run has 1"):
            privkd.load(run.path, student=(own_student, own_student))

    @pytest.mark.parametrize("given", [{"data": 3}, {"student": 3}, {"teacher": 3.5}], ids=str)
    def test_what_is_neither_a_name_nor_code_is_refused(self, given: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is neither a name nor something to call"):
            privkd.train(CONFIG, **given, out=tmp_path / "run")
        assert not list(tmp_path.iterdir())


class TestLoad:
    def test_a_folder_without_a_result_says_what_to_do(self, tmp_path: Path) -> None:
        said = rf"^{tmp_path}: no finished run; go on with one by `privkd train --resume {tmp_path}`$"
        with pytest.raises(RunError, match=said):
            privkd.load(tmp_path)

    def test_gives_the_run_that_was_trained(self, run: privkd.Run) -> None:
        loaded = privkd.load(run.path)
        assert loaded.tree() == run.tree()
        assert loaded.config == run.config


class TestValues:
    @pytest.fixture(params=["run", "ledger", "audit", "forecast"])
    def value(self, request: pytest.FixtureRequest, run: privkd.Run) -> Any:
        if request.param == "audit":
            return audit(run)
        return {"run": run, "ledger": run.ledger, "forecast": privkd.forecast(CONFIG)}[request.param]

    def test_show_themselves(self, value: Any) -> None:
        assert value.tree()
        assert value.alarm is None
        assert len({tuple(row) for row in value.rows()}) == 1
        assert value._repr_html_().startswith("<pre")

    def test_are_data_frames(self, value: Any) -> None:
        pytest.importorskip("pandas")
        frame = value.to_frame()
        assert list(frame.columns) == list(value.rows()[0])
        assert len(frame) == len(value.rows())

    def test_a_teacher_maps_inputs_to_logits(self, run: privkd.Run) -> None:
        public = prepare(run.config).scenario.public.inputs
        assert run.teacher(public).shape == (len(public), 3)


def classes_of_the_library() -> Iterator[type]:
    for room in pkgutil.walk_packages(privkd.__path__, "privkd."):
        # The command's entry runs it, and a format's own room needs its runtime.
        if not room.name.endswith(("__main__", "_format")):
            for _, found in inspect.getmembers(importlib.import_module(room.name), inspect.isclass):
                if found.__module__ == room.name:
                    yield found


def releases(kind: type) -> list[str]:
    """Its methods that give a `Release` to who has no channel."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    found = [(name, inspect.signature(method)) for name, method in methods]
    return [
        name
        for name, signature in found
        if re.search(r"\bRelease\b", inspect.formatannotation(signature.return_annotation))
        and "channel" not in signature.parameters
    ]


class TestNoWayAround:
    def test_only_a_federation_and_its_channel_release(self) -> None:
        able = {kind for kind in classes_of_the_library() if releases(kind)}
        assert {kind for kind in able if not issubclass(kind, Channel)} == {Federation}
        assert PlainChannel in able, "the twin: a channel releases"
        assert releases(Prepared) == []

    def test_a_federation_needs_its_ledger_and_its_channel(self) -> None:
        needed = {field.name for field in fields(Federation) if field.default is MISSING}
        assert {"prepared", "ledger", "channel"} <= needed
        prepared = prepare(CONFIG)
        with pytest.raises(TypeError, match="'ledger' and 'channel'"):
            Federation(prepared, progress=None, fleet=None)  # type: ignore[call-arg, arg-type]
        assert not {"ledger", "channel"} & set(dir(prepared))
