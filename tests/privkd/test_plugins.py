"""A user's own attack, channel, rule, data source and format: each one file, and no file of ours."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import Answer, Commands
from pages import ROOT
from running import SMALL, small, weights
from test_front import HEAVY, process

import attacks
from attacks.registry import Attack
from audits.requests import latest
from audits.sweeps.grid import Grid, Record
from audits.sweeps.runner import _write
from audits.sweeps.sweep import sweep
from privkd.channels import KINDS, Kind
from privkd.cloud import RULES, Aggregate, aggregate
from privkd.config import Config, load_config
from privkd.config.reference import settings_reference
from privkd.errors import ConfigError, InputError, RunError
from privkd.export.formats import FORMATS, check_installed
from privkd.export.formats import register as register_format
from privkd.plugins import Registry, load_plugins, plugin_module
from privkd.runs.fingerprints import check_files
from privkd.runs.folder import RunFolder

PAGE = (ROOT / "docs" / "extend.md").read_text()
FILES = ("score.py", "filter.py", "channel.py", "rule.py", "source.py", "form.py")
"""In the order in which the page shows them."""
TRAIN = (
    "train", "--plugin", "rule.py", "--plugin", "source.py", "--data", "clouds", "--epsilon", "inf",
    *(word for one in (*SMALL, "rounds=1", "reverse.aggregation=trimmed") for word in ("--set", one)),
    "--out", "run",
)  # fmt: skip
TINY = tuple(
    word for one in (*SMALL, "rounds=1") if not one.startswith("channel.") for word in ("--set", one)
)
OVER_OWN = ("train", "--plugin", "channel.py", "--channel", "curated", "--set", "privacy.device_epsilon=8",
            *TINY, "--out", "over")  # fmt: skip
CURVE = ("curve", "--plugin", "channel.py", "--channels", "curated,plain", "--epsilons", "inf",
         "--seeds", "1", "--shadows", "8", "--targets", "2", *TINY, "--out", "curve")  # fmt: skip
AUDIT = ("audit", "membership", "run", "--shadows", "8", "--targets", "2")
TRUSTED = ("--plugin", "rule.py", "--plugin", "source.py")
RULE_CHANGED = "the code changed since the run was started: rule.py was changed"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server


def written(place: Path) -> Path:
    """``place`` with the page's examples, each in a file of its own, word for word."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    for name, block in zip(FILES, blocks, strict=True):
        (place / name).write_text(block)
    return place


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's: the five files, and a run on the source with the rule."""
    place = written(tmp_path_factory.mktemp("users"))
    answer = commands.run(*TRAIN, cwd=place)
    assert answer.code == 0, answer.err
    return place


@pytest.fixture(scope="module")
def audited(commands: Commands, trained: Path) -> list[dict[str, object]]:
    """What a membership audit of that run found, with the score and the filter."""
    answer = commands.run(*AUDIT, "--plugin", "score.py", "--plugin", "filter.py", "--json", cwd=trained)
    assert answer.code == 0, answer.err
    found: list[dict[str, object]] = json.loads(answer.out)["views"]
    return found


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder with copies in place of all files: none is the one that the run was started with."""
    trained.rename(tmp_path / "aside")
    yield Path(shutil.copytree(tmp_path / "aside", trained))
    shutil.rmtree(trained)
    (tmp_path / "aside").rename(trained)


def one_line(answer: Answer) -> str:
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1), answer.err
    return answer.err


class TestOneFileEach:
    def test_the_rule_and_the_source_made_the_run(self, trained: Path) -> None:
        assert f'plugins = [\n    "{trained / "rule.py"}"' in (trained / "run" / "config.toml").read_text()
        test = json.loads((trained / "run" / "result.json").read_text())["test"]
        assert test["records"] > 0

    def test_the_rule_is_what_the_cloud_learned_by(
        self, commands: Commands, trained: Path, tmp_path: Path
    ) -> None:
        """The twin: with another rule of that name, the same settings end otherwise."""
        twin = tmp_path / "twin"
        twin.mkdir()
        text = (trained / "rule.py").read_text()
        (twin / "rule.py").write_text(text.replace("kept.mean(0)", "1 - kept.mean(0)"))
        shutil.copy(trained / "source.py", twin)
        assert commands.run(*TRAIN, cwd=twin).code == 0
        one, other = (weights(place / "run" / "rounds") for place in (trained, twin))
        differ = {name for name in one if one[name] != other[name]}
        assert 0 < len(differ) < len(one) == len(other), "the first teacher and the releases are the same"

    def test_the_score_and_the_filter_are_attacks(self, audited: list[dict[str, object]]) -> None:
        """The score is offline LiRA's numerator: under one variance for all samples both rank alike."""
        found = {(one["view"], one["attack"]): one["auc"] for one in audited}
        assert found["student", "surplus"] == found["student", "lira-offline"]
        assert ("per_client_logits", "plain-shift") in found
        assert ("student", "plain-shift") not in found

    def test_the_format_is_written(self, commands: Commands, trained: Path) -> None:
        answer = commands.run(
            "export", "run", "--plugin", "form.py", "--format", "torchscript", "--json", cwd=trained
        )
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["format"] == "torchscript"
        loaded = torch.jit.load(str(trained / "run" / "export" / "device-0000.pt"))
        assert loaded(torch.zeros(3, 4)).shape == (3, 2)

    @pytest.mark.usefixtures("audited")
    def test_the_report_reads_them_without_the_plug_ins(self, commands: Commands, copied: Path) -> None:
        for name in FILES:
            (copied / name).unlink()
        assert commands.run("report", "run", cwd=copied).code == 0
        assert "surplus" in (copied / "run" / "report.md").read_text()


class TestTheChannel:
    """One file: what it says of itself is all that trains, audits, draws and reports a run over it."""

    @pytest.fixture(scope="class")
    def place(self, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
        place = written(tmp_path_factory.mktemp("over"))
        answer = commands.run(*OVER_OWN, cwd=place)
        assert answer.code == 0, answer.err
        return place

    def test_is_paid_for_and_audited_as_the_run_ends(self, place: Path) -> None:
        result = json.loads((place / "over" / "result.json").read_text())
        device = result["ledger"]["device"]
        assert result["channel"] == "curated"
        assert device["lower_bound"]["path"] == "the run's own curated channel"
        assert 2 < device["lower_bound"]["epsilon"] < device["epsilon"] <= 8
        assert all(check["passed"] for check in result["checks"])

    def test_has_a_view_of_its_own(self, commands: Commands, place: Path) -> None:
        audit = ("audit", "membership", "over", "--shadows", "8", "--targets", "2")
        answer = commands.run(*audit, "--json", cwd=place)
        assert answer.code == 0, answer.err
        assert ("curated_mean", "matched-filter") in {
            (one["view"], one["attack"]) for one in json.loads(answer.out)["views"]
        }
        said = one_line(commands.run(*audit, "--view", "secure_sum", cwd=place))
        assert "over the curated channel the cloud sees curated_mean" in said

    def test_says_in_a_report_who_sees_what(self, commands: Commands, place: Path) -> None:
        for words, found in ((("--plugin", "channel.py"), "A curator sees"), ((), "not loaded here")):
            answer = commands.run("report", "over", *words, "--json", cwd=place)
            assert answer.code == 0, answer.err
            assert found in " ".join(json.loads(answer.out)["trust"]["words"])

    def test_is_drawn_beside_ours(self, commands: Commands, place: Path) -> None:
        answer = commands.run(*CURVE, cwd=place)
        assert answer.code == 0, answer.err
        drawn = (place / "curve" / "figures" / "leak.svg").read_text()
        assert KINDS["plain"].colour.lower() in drawn
        assert Kind.colour.lower() in drawn, "what a plug-in's has by default"


class TestARunKeepsItsPlugIns:
    def test_a_changed_one_is_refused_and_not_run(self, commands: Commands, copied: Path) -> None:
        (copied / "rule.py").write_text("raise SystemExit('it was run')\n")
        for words in (("train", "--resume", "run"), AUDIT, ("export", "run")):
            assert RULE_CHANGED in one_line(commands.run(*words, cwd=copied))

    def test_a_strangers_is_not_run(self, commands: Commands, copied: Path) -> None:
        """The files equal those that the run was started with; anybody could have put them there."""
        for words in (("train", "--resume", "run"), AUDIT, ("export", "run")):
            said = one_line(commands.run(*words, cwd=copied))
            assert "give its path with --plugin, if you trust it" in said
        assert commands.run("export", "run", *TRUSTED, cwd=copied).code == 0

    def test_one_that_moved_is_found_by_its_path(self, commands: Commands, copied: Path) -> None:
        (copied / "moved").mkdir()
        for name in ("rule.py", "source.py"):
            (copied / name).rename(copied / "moved" / name)
        assert "rule.py is gone" in one_line(commands.run("export", "run", cwd=copied))
        trusted = ("--plugin", "moved/rule.py", "--plugin", "moved/source.py")
        assert commands.run("export", "run", *trusted, cwd=copied).code == 0
        (copied / "moved" / "rule.py").write_text((copied / "moved" / "rule.py").read_text() + "# changed\n")
        assert RULE_CHANGED in one_line(commands.run("export", "run", *trusted, cwd=copied))

    def test_a_folder_that_was_never_begun_runs_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "bare.py").write_text("raise SystemExit('it was run')\n")
        config = small(f"plugins={tmp_path / 'bare.py'}")
        said = r"nothing tells that .*bare\.py is the plug-in"
        with RunFolder.create(tmp_path / "run", config) as folder, pytest.raises(RunError, match=said):
            check_files(folder)

    def test_a_resumed_curve_runs_only_what_is_named_again(self, tmp_path: Path) -> None:
        (tmp_path / "bare.py").write_text("raise SystemExit('it was run')\n")
        named = ("plugins", str(tmp_path / "bare.py"))
        _write(tmp_path, Record(request=Grid(settings=(named,)), failed={}))
        with pytest.raises(ConfigError, match=r"go on with --plugin .*bare\.py, if you trust"):
            sweep(out=tmp_path, resume=True)
        with pytest.raises(ConfigError, match="it was run"):
            sweep(out=tmp_path, resume=True, settings=dict([named]))


class TestInstalled:
    @pytest.fixture
    def installed(self, tmp_path: Path) -> Path:
        """A package with an entry point, as an installer leaves it."""
        shutil.copy(written(tmp_path) / "score.py", tmp_path / "their_package.py")
        about = tmp_path / "theirs-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[privkd.plugins]\nmine = their_package\n")
        return tmp_path

    def test_is_found_when_a_name_is_not_known(self, installed: Path, tmp_path: Path) -> None:
        code, _, err = process("audit", "membership", "--attack", "surplu", cwd=tmp_path, path=str(installed))
        assert (code, err.startswith("privkd: attack='surplu': expected one of ['surplus', ")) == (2, True)

    def test_is_not_looked_at_otherwise(self, installed: Path, tmp_path: Path) -> None:
        (installed / "their_package.py").write_text("raise SystemExit('it was imported')\n")
        for words in (["--help"], ["settings", "seed"], ["audit", "membership", "--shadows", "4"]):
            _, out, err = process(*words, cwd=tmp_path, path=str(installed))
            assert "it was imported" not in out + err
        code, _, err = process("export", "run", "--format", "nope", cwd=tmp_path, path=str(installed))
        assert (code, len(err.splitlines())) == (2, 1)
        assert "plugin 'mine', installed with theirs: cannot be imported" in err


class TestLoading:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "cannot be imported (FileNotFoundError"),
            ("import no_such_module_at_all", "cannot be imported (ModuleNotFoundError"),
            ("raise SystemExit(3)", "cannot be imported (SystemExit: 3)"),
            (
                "import attacks\n@attacks.register('lira-online')\ndef mine(e): ...",
                "attack 'lira-online' is a name of privkd's own",
            ),
            (
                "import attacks\n@attacks.register('all')\ndef mine(e): ...",
                "attack 'all' is a name of privkd's own",
            ),
            (
                "import attacks\n@attacks.register('m', views=('secure_sum',))\ndef mine(e): ...",
                "'secure_sum' is no view of a model: give on='channel', or another view",
            ),
            (
                "from privkd import data\n@data.register('../x')\ndef mine(): ...",
                "expected a name of letters",
            ),
        ],
    )
    def test_a_bad_one_ends_in_one_line(self, tmp_path: Path, text: str | None, why: str) -> None:
        file = tmp_path / "bad_plugin.py"
        if text is not None:
            file.write_text(text + "\n")
        with pytest.raises(ConfigError) as refused:
            load_plugins([str(file)])
        assert str(refused.value).startswith(f"plugin {str(file)!r}: ")
        assert why in str(refused.value)
        assert plugin_module(str(file)) not in sys.modules

    def test_is_imported_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "counted.py").write_text("import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
        load_plugins(["counted.py", "./counted.py", str(tmp_path / "counted.py")])
        assert sys.counted == 1  # type: ignore[attr-defined]
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "counted.py").write_text("")
        with pytest.raises(ConfigError, match="of the same name is loaded: rename one"):
            load_plugins(["b/counted.py"])

    def test_settings_name_each_once(self) -> None:
        assert load_config(None, ["plugins=a.b, c.py"]).plugins == ("a.b", "c.py")
        assert Config().plugins == ()
        with pytest.raises(ConfigError, match="two are called the same"):
            load_config(None, ["plugins=a/x.py,b/x.py"])

    def test_is_known_before_torch_loads(self, tmp_path: Path) -> None:
        """An attack is numpy alone, and so is a typo in its name."""
        written(tmp_path)
        code = (
            "import atexit, sys; atexit.register(lambda: print(*sys.modules)); "
            "from privkd.__main__ import main; sys.exit(main())"
        )
        words = ("audit", "membership", "--plugin", "score.py", "--attack", "surplu")
        rc, out, err = process(*words, code=code, cwd=tmp_path)
        assert (rc, "['surplus'" in err) == (2, True)
        assert not HEAVY & set(out.split())


class TestRegistry:
    def test_near_names_come_first(self) -> None:
        numbers = Registry("number", {"one": 1, "two": 2, "twelve": 12})
        with pytest.raises(ConfigError, match=r"^number='tow': expected one of \['two', 'one', 'twelve'\]$"):
            numbers["tow"]
        assert numbers["two"] == 2
        assert list(numbers) == ["one", "two", "twelve"]
        assert "tow" not in numbers
        assert numbers.find("tow") is None

    def test_a_name_is_taken_once(self) -> None:
        def mine() -> None: ...
        def other() -> None: ...

        numbers = Registry("number", {"one": 1}, reserved=["all"])
        numbers.add("two", 2, mine)
        assert (numbers["two"], numbers.module("two"), numbers.module("one")) == (2, __name__, None)
        for name in ("one", "all"):
            with pytest.raises(ConfigError, match=f"number '{name}' is a name of privkd's own"):
                numbers.add(name, 3, mine)
        with pytest.raises(
            ConfigError, match=r"number 'two' is .*mine in .*test_plugins\.py: choose another"
        ):
            numbers.add("two", 3, other)
        numbers.add("two", 4, mine)
        assert numbers["two"] == 4, "a notebook's cell may run again"

    @pytest.mark.parametrize("name", ["", "a b", "a:b", "a/b", "a.b", "-a", "ü"])
    def test_a_name_fits_into_a_files(self, name: str) -> None:
        with pytest.raises(ConfigError, match="expected a name of letters"):
            Registry("number", {}).add(name, 1, len)

    def test_only_what_plug_ins_raise_becomes_one_line(self) -> None:
        def mine() -> None: ...

        numbers = Registry("number", {"one": 1})
        numbers.add("two", 2, mine)
        said = r"^number 'two', .*mine in .*, failed: ZeroDivisionError"
        with pytest.raises(InputError, match=said), numbers.guarded("two"):
            1 / 0  # noqa: B018
        with pytest.raises(ZeroDivisionError), numbers.guarded("one"):
            1 / 0  # noqa: B018
        with pytest.raises(RunError), numbers.guarded("two"):
            raise RunError("as it is")


class TestWhatOnesOwnReturns:
    @pytest.mark.parametrize(
        "found",
        [
            Aggregate(torch.zeros(2), 0.0),
            Aggregate(torch.full((5, 3), torch.nan), 0.0),
            Aggregate(torch.zeros(5, 3), -1.0),
            None,
        ],
    )
    def test_a_rule_answers_each_query(self, monkeypatch: pytest.MonkeyPatch, found: object) -> None:
        monkeypatch.setitem(RULES._values, "odd", lambda answers, noise_std: found)
        monkeypatch.setitem(RULES._makers, "odd", lambda: None)
        with pytest.raises(InputError, match=r"reverse\.aggregation 'odd'"):
            aggregate(torch.rand(4, 5, 3), 0.0, "odd")

    @pytest.mark.parametrize("found", [np.zeros(3), np.full(4, np.nan), 0.0])
    def test_a_score_is_a_number_for_each_candidate(self, found: object) -> None:
        shadows = attacks.Shadows(np.zeros((4, 4)), np.tile([[True], [False]], (2, 4)))
        evidence = attacks.Evidence(np.zeros(4), shadows, attacks.Population(np.zeros(2), np.zeros((4, 2))))
        odd = Attack("model", lambda e: found)  # type: ignore[arg-type, return-value]
        with pytest.raises(InputError, match=r"finite numbers of shape \(4,\)"):
            odd.scores((evidence, evidence))
        assert Attack("model", lambda e: e.target).scores((evidence, evidence)).shape == (2, 4)
        with pytest.raises(InputError, match="no public features"):
            attacks.ATTACKS["quantile-regression"].scores((evidence,))

    def test_a_format_names_what_it_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FORMATS, "_values", dict(FORMATS._values))
        monkeypatch.setattr(FORMATS, "_makers", {})
        with pytest.raises(ConfigError, match="suffix 'x' is none"):
            register_format("odd", suffix="x")
        register_format("odd", suffix=".x", needs=("no_such_module_at_all",))(lambda: None)  # type: ignore[arg-type, return-value]
        with pytest.raises(ConfigError, match="needs no_such_module_at_all, not installed here: pip install"):
            check_installed("odd")


class TestTheFrontDoorOfTheAttacks:
    def test_offers_every_score(self) -> None:
        homes = [name for names in attacks._HOMES.values() for name in names]
        assert sorted(homes) == sorted(attacks.__all__) == dir(attacks)
        for name in attacks.__all__:
            assert getattr(attacks, name) is not None
        for name in ("lira-online", "rmia-offline", "attack-p", "global-loss", "quantile-regression"):
            assert name in attacks.ATTACKS
            assert callable(getattr(attacks, name.replace("-", "_")))
        with pytest.raises(AttributeError, match="no attribute 'lira'"):
            attacks.lira  # noqa: B018

    def test_types_are_those_that_are_loaded(self) -> None:
        """What type checkers read and what is loaded are spelt apart."""
        text = Path(str(attacks.__file__)).read_text()
        typed = {}
        for home, names in re.findall(r"    from attacks\.([\w.]+) import (\([^)]*\)|.*)", text):
            typed[home] = set(re.findall(r"\w+", names))
        assert typed == {home: set(names) for home, names in attacks._HOMES.items()}

    def test_is_light(self) -> None:
        code = "import attacks, sys; print({'numpy', 'scipy', 'torch'} & set(sys.modules))"
        assert process(code=code, cwd=ROOT) == (0, "set()\n", "")


def test_the_settings_name_our_rules() -> None:
    (rule,) = settings_reference("reverse.aggregation").settings
    assert rule.takes == f"{', '.join(name for name in RULES if RULES.module(name) is None)}, or a plug-in's"


def test_an_unknown_rule_is_refused_before_there_is_a_folder(commands: Commands, tmp_path: Path) -> None:
    for words in (["train", "--out", "run"], ["train", "--dry-run"]):
        answer = commands.run(
            *words, "--channel", "plain", "--set", "reverse.aggregation=medain", cwd=tmp_path
        )
        assert one_line(answer).startswith(
            "privkd: reverse.aggregation='medain': expected one of ['median', "
        )
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError):
        latest(tmp_path, "run")
