"""The command from outside: its names, its help, its version, its settings, and what it lacks."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import privkd.doctor
from cli import app
from privkd.config import Config, Settings, config_tree, load_config
from privkd.config.reference import documented, settings_reference
from privkd.errors import ConfigError, InputError
from privkd.options import OPTIONS, Option
from privkd.plugins import SIBLINGS, load_siblings
from privkd.secure import installed

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("privkd", "attacks", "audits", "papers")
CONSOLE_SCRIPT = "import sys; from privkd.__main__ import main; sys.exit(main())"
HEAVY = {"torch", "opacus", "dp_accounting", "sklearn", "crypten", "matplotlib"}


def process(*words: str, code: str = CONSOLE_SCRIPT, cwd: Path, path: str = "") -> tuple[int, str, str]:
    """``code`` in a fresh interpreter in ``cwd``, as a console script: without the folder on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        capture_output=True, text=True, check=False, timeout=120, cwd=cwd, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The command line in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app(list(words))
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


class TestManners:
    @pytest.mark.parametrize("words", [[], ["audit"], ["papers"]])
    def test_a_group_alone_shows_its_help(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        alone, asked = answer(capsys, *words), answer(capsys, *words, "--help")
        assert alone == asked
        assert alone[0] == 0
        assert "Commands:" in alone[1]

    @pytest.mark.parametrize(
        "words", [[], ["train"], ["audit"], ["audit", "membership"], ["papers", "run"], ["settings"]]
    )
    def test_h_is_help(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        short, long = answer(capsys, *words, "-h"), answer(capsys, *words, "--help")
        assert short == long
        assert (short[0], short[2]) == (0, "")

    def test_version(self, tmp_path: Path) -> None:
        code, out, err = process("--version", cwd=tmp_path)
        assert (code, out, err) == (0, f"privkd {PROJECT['project']['version']}\n", "")

    def test_python_m_is_the_same(self, tmp_path: Path) -> None:
        as_module = "import runpy, sys; runpy.run_module('privkd', run_name='__main__', alter_sys=True)"
        for words in (["--version"], ["train", "--help"], ["train", "--epsilon", "-1"]):
            assert process(*words, code=as_module, cwd=tmp_path) == process(*words, cwd=tmp_path)

    def test_completion(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (
            ("_PRIVKD_COMPLETE", "complete_bash"), ("COMP_WORDS", "privkd tr"), ("COMP_CWORD", "1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        code, out, _ = process(cwd=tmp_path)
        assert (code, out.split()) == (0, ["train"])

    def test_windows_is_refused_in_one_line(self, tmp_path: Path) -> None:
        code, out, err = process(
            "--help", code=f"import sys; sys.platform = 'win32'; {CONSOLE_SCRIPT}", cwd=tmp_path
        )
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith("privkd: Windows is not supported")


class TestMistakesAreAnsweredAtOnce:
    @pytest.mark.parametrize(
        "words",
        [
            ["train", "--epsilon", "-1"],
            ["train", "--set", "data.gapp=rare"],
            ["train", "--dry-run", "--channel", "nosied"],
            ["train", "--resume", "run", "--epsilon", "3"],
            ["curve", "--channels", "nope"],
            ["curve", "--epsilons", "x"],
            ["curve", "--set", "a.b=1"],
            ["audit", "membership", "--attack", "nope"],
            ["audit", "membership", "--shadows", "4"],
            ["audit", "reconstruction", "--trials", "0"],
            ["audit", "scores", "scores.csv", "--epsilon", "3"],
            ["audit", "model", "mine:train", "--epsilon", "-1", "--delta", "1e-5"],
            ["papers", "run", "nope"],
            ["papers", "run", "du2022", "--scale", "nope"],
            ["settings", "privacy.epsilom"],
            ["export", "run", "--format", "pickle"],
        ],
        ids=" ".join,
    )
    def test_before_torch_loads(self, words: list[str], tmp_path: Path) -> None:
        code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {CONSOLE_SCRIPT}"
        rc, out, err = process(*words, code=code, cwd=tmp_path)
        assert (rc, len(err.splitlines())) == (2, 1), err
        assert not HEAVY & set(out.split())
        assert not list(tmp_path.iterdir())


class TestAUsersWorkingFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Somebody's project, whose modules have our names, and would end us if they were imported."""
        for name in SIBLINGS:
            file = tmp_path / ("cli.py" if name == "cli" else f"{name}/__init__.py")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"raise SystemExit('{name} of the working folder')\n")
        (tmp_path / "mine.py").write_text("def records():\n    return 'not arrays'\n")
        return tmp_path

    def test_the_twin_is_broken_without_it(self, folder: Path) -> None:
        code, _, err = process(code="from audits import requests", cwd=folder, path=str(folder))
        assert (code, err) == (1, "audits of the working folder\n")

    @pytest.mark.parametrize("path", ["", "."])
    def test_does_not_break_the_command(self, folder: Path, path: str) -> None:
        assert process("papers", "list", "--json", cwd=folder, path=path)[0] == 0
        code, _, err = process("audit", "membership", "--attack", "nope", cwd=folder, path=path)
        assert (code, err.startswith("privkd: attack='nope': expected")) == (2, True)

    def test_nor_once_the_users_modules_are_imported(self, folder: Path) -> None:
        """They put the folder first on the path; what is imported of ours after that is still ours."""
        code = (
            "from privkd.__main__ import main\n"
            "from privkd.errors import DataError\nfrom privkd.plugins import users_callable\n"
            "assert users_callable('mine:records', 'source', DataError)() == 'not arrays'\n"
            "import sys; assert sys.path[0] == sys.argv[1]\n"
            "import attacks.registry, audits.requests, papers.study, cli"
        )
        assert process(str(folder.resolve()), code=code, cwd=folder) == (0, "", "")

    def test_nor_our_library(self, folder: Path) -> None:
        """A script of the user's lies beside them. It gets its own by their name; we get ours."""
        (folder / "audits" / "__init__.py").unlink()
        (folder / "audits").rmdir()
        code = "import audits, attacks.registry, audits.requests; print('ours')"
        assert process(code=code, cwd=folder, path=str(folder)) == (0, "ours\n", "")

    def test_what_was_imported_before_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs = type(sys)("attacks")
        theirs.__file__ = "/home/me/attacks.py"
        monkeypatch.setitem(sys.modules, "attacks", theirs)
        with pytest.raises(InputError, match=r"^/home/me/attacks.py is imported as 'attacks'.*rename yours$"):
            load_siblings("attacks")

    def test_a_users_module_of_our_name_is_told_why(self, folder: Path) -> None:
        code, _, err = process("train", "--data", "attacks:records", cwd=folder)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "'attacks' is a name of privkd's own: rename your module" in err


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting of a tree by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


class TestSettings:
    def test_every_setting_is_there_with_its_default(self) -> None:
        listed = settings_reference().settings
        assert len({one.name for one in listed}) == len(listed)
        assert {one.name: one.default for one in listed if one.default is not None} == leaves(
            config_tree(Config())
        )
        for one in listed:
            if one.default is None:
                *groups, field = one.name.split(".")
                value: Any = Config()
                for group in groups:
                    value = getattr(value, group)
                assert getattr(value, field) is None

    @pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
    def test_an_option_is_a_setting_and_shows_its_default(self, option: Option) -> None:
        shown = re.search(r"\[(.*)\]$", option.help)
        default = settings_reference(option.setting).settings
        assert [one.name for one in default] in ([option.setting], ["student.models"])
        if shown is None or shown[1] in ("none", "by its name"):
            assert default[0].default in (None, [])
        else:
            assert Config(**{option.name: shown[1]}) == Config()

    def test_every_field_of_every_group_has_a_meaning(self) -> None:
        def groups(kind: type[Settings]) -> set[type[Settings]]:
            below = [field.annotation for field in kind.model_fields.values()]
            found = {one for one in below if isinstance(one, type) and issubclass(one, Settings)}
            return {kind}.union(*(groups(one) for one in found))

        for kind in groups(Config):
            assert list(documented(kind)) == list(kind.model_fields), kind
            assert all(documented(kind).values())

    def test_what_they_say_they_take_is_what_the_schema_takes(self) -> None:
        for one in settings_reference().settings:
            with pytest.raises(ConfigError) as refused:
                load_config(None, [f"{one.name}={{nonsense=1}}"])
            for word in one.takes.split(" | ") if " | " in one.takes else ():
                assert f"'{word}'" in str(refused.value)

    def test_a_group_a_setting_and_a_typo(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = answer(capsys, "settings", "privacy", "--json")
        names = [one["name"] for one in json.loads(out)["settings"]]
        assert (code, names[0], len(names)) == (0, "privacy.epsilon", 6)
        assert [one.name for one in settings_reference("student.dp.part").settings] == ["student.dp.part"]
        assert (
            len(settings_reference("student").settings) > len(settings_reference("student.dp").settings) > 1
        )
        with pytest.raises(ConfigError, match=r"did you mean 'privacy.epsilon'\?"):
            settings_reference("privacy.epsilom")

    def test_people_see_a_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = answer(capsys, "settings")
        assert code == 0
        for words in ("top level", "student.dp", "sampling_rate", "uncertain |", "none"):
            assert words in " ".join(out.split())


class TestCryptenMissing:
    @pytest.fixture(autouse=True)
    def _missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installed, "has_crypten", lambda: False)
        monkeypatch.setattr(privkd.doctor, "has_crypten", lambda: False)

    @pytest.mark.parametrize(
        "words",
        [["train"], ["train", "--set", "channel.parties=services"], ["curve", "--channels", "plain,secure"]],
        ids=" ".join,
    )
    def test_is_said_before_a_run_folder_exists(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        code, out, err = answer(capsys, *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "run `privkd doctor --fix`, which is `pip install --no-deps crypten==0.4.1`" in err
        assert not list(tmp_path.iterdir())

    def test_matters_to_parties_of_this_machine_alone(self) -> None:
        for override in ("channel.kind=plain", "channel.kind=noised"):
            installed.check_channel(load_config(None, [override]).channel)
        urls = 'channel.aggregator_urls=["https://a:1", "https://b:1"]'
        installed.check_channel(load_config(None, [urls]).channel)
        with pytest.raises(ConfigError):
            installed.check_channel(Config().channel)

    def test_doctor_fix_runs_the_command_it_shows(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ran: list[list[str]] = []

        def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
            ran.append(command)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr("privkd.doctor.subprocess.run", run)
        code, out, _ = answer(capsys, "doctor", "--fix")
        assert ran == [[sys.executable, "-m", "pip", "install", "--no-deps", "crypten==0.4.1"]]
        assert out.splitlines()[0].endswith("-m pip install --no-deps crypten==0.4.1")
        assert code == 1, "it is missing still, as nothing was run"

    def test_doctor_fix_leaves_what_is_there(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(privkd.doctor, "has_crypten", lambda: True)
        monkeypatch.setattr("privkd.doctor.subprocess.run", lambda *_, **__: pytest.fail("it ran something"))
        privkd.doctor.fix_crypten()
        assert capsys.readouterr().out == "CrypTen is installed: nothing to fix\n"


class TestPackage:
    def test_the_licence_is_there_and_named(self) -> None:
        project = PROJECT["project"]
        assert project["license"] == "Apache-2.0"
        assert project["license-files"] == ["LICENSE"]
        assert "Apache License" in (ROOT / "LICENSE").read_text()
        assert not [word for word in project["classifiers"] if word.startswith("License")]

    def test_all_import_names_and_their_files_are_in_the_wheel(self) -> None:
        wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert set(wheel["only-include"]) == {*PACKAGES, "cli.py"}
        assert not {"exclude", "artifacts"} & set(wheel)
        assert set(SIBLINGS) == {*PACKAGES, "cli"} - {"privkd"}

    def test_the_readmes_links_lead_somewhere_in_the_wheel_too(self) -> None:
        shared = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
        home = shared["README.md"].removesuffix("README.md")
        links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
        for link in links:
            if not link.startswith("https://"):
                first = link.partition("/")[0]
                assert shared[first] == f"{home}{first}", link

    def test_the_console_script_is_the_module(self) -> None:
        assert PROJECT["project"]["scripts"] == {"privkd": "privkd.__main__:main"}


LEAN = "import sys; sys.modules.update(dict.fromkeys(('jinja2', 'matplotlib', 'skimage', 'sklearn'))); "


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["train", "--epsilon", "3"], "sklearn"),
        (["curve", "--epsilons", "3", "--seeds", "1", "--out", "curve"], "matplotlib"),
    ],
)
def test_what_a_lean_installation_lacks_is_named(words: list[str], missing: str, tmp_path: Path) -> None:
    code, _, said = process(*words, code=LEAN + CONSOLE_SCRIPT, cwd=tmp_path)
    assert code == 2
    assert said.splitlines()[-1].startswith(f"privkd: {missing} is not installed")
    assert "pip install 'privkd[lab]'" in said
    assert "Traceback" not in said


def test_a_lean_installation_trains_on_records_of_its_own(tmp_path: Path) -> None:
    rows = [f"{number % 7},{number % 5},{number % 2}" for number in range(400)]
    (tmp_path / "own.csv").write_text("\n".join(["a,b,label", *rows]))
    small = ["rounds=1", "controls=false", "teacher.model.name=mlp", "student.models=mlp", "data.devices=2",
             "data.records_per_device=40", "channel.kind=plain", "student.dp.steps=2"]  # fmt: skip
    words = ["train", "--data", "own.csv", *(word for setting in small for word in ("--set", setting))]
    code, _, said = process(*words, code=LEAN + CONSOLE_SCRIPT, cwd=tmp_path)
    assert code == 0, said
