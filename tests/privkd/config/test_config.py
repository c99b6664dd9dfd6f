"""The settings: what they accept, what they say of a mistake, and that TOML spells all of them."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from privkd.config import (
    Config,
    DataConfig,
    DpSgdConfig,
    ModelConfig,
    PrivacyConfig,
    StudentConfig,
    TeacherConfig,
    config_tree,
    load_config,
    parse_config,
)
from privkd.errors import ConfigError
from privkd.options import OPTIONS, Option, put


def message_of(*overrides: str, **settings: Any) -> str:
    """The one line in which a mistake is refused."""
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides, settings)
    message = str(refused.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def refusal_of(load: Callable[[], Config]) -> str | None:
    """The message, or ``None`` where the settings are accepted, and then TOML can spell them."""
    try:
        config = load()
    except ConfigError as error:
        return str(error)
    tomli_w.dumps(config_tree(config)).encode()
    return None


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted name and annotation of every setting."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaves(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = kind
    return found


def flat(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every setting's value by its dotted name."""
    found: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


LEAVES = leaves(Config)
OTHERS: tuple[Any, ...] = (
    0.25, 4, "mlp", "plain", "noised", "votes", "own", "opacus", "cpu", "system", "style", "classes", "head",
    "last_block", "adam", "random", "relu", "all", "tanh", "services", "devices", False, True, [1], ["cnn"],
    32, "yes", "comma", "tab", "drop", "person",
    ["a", "b"],
)  # fmt: skip
"""For every setting, a value that it takes and that is not its default."""

COMPANIONS = {
    "reverse.aggregation": ("channel.kind=plain",),
    "channel.dropout": ("channel.kind=plain",),
}
"""What else a setting needs to take another value."""

NUMBERS = [name for name, kind in LEAVES.items() if kind in (int, float)]


class TestDefaults:
    def test_the_main_job_is_what_the_readme_says(self) -> None:
        config = load_config()
        assert config.privacy.epsilon == 3.0
        assert config.privacy.delta == 1e-5
        assert config.privacy.device_epsilon is None
        assert config.channel.kind == "secure"
        assert config.data.source == "digits"
        assert config.privacy.noise == "seeded"

    def test_settings_are_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load_config().privacy.epsilon = 100.0  # type: ignore[misc]

    def test_nothing_given_is_the_default(self) -> None:
        assert load_config() == Config() == parse_config({})


class TestPrecedence:
    def test_file_then_set_then_option(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text("rounds = 7\nseed = 7\n[privacy]\nepsilon = 7.0\ndelta = 0.007\n")
        config = load_config(
            path, ["privacy.epsilon=8", "seed=8", "seed=9"], {"privacy.epsilon": "10", "data.devices": "11"}
        )
        assert config.rounds == 7, "the file alone"
        assert config.privacy.delta == 0.007, "the file's other keys survive"
        assert config.seed == 9, "the later --set wins"
        assert config.privacy.epsilon == 10, "the option wins over --set"
        assert config.data.devices == 11

    def test_override_reads_toml_else_text(self) -> None:
        config = load_config(
            None, ["data.gap_classes=[1, 2]", "controls=false", "channel.kind=plain", 'data.gap="none"']
        )
        assert config.data.gap_classes == (1, 2)
        assert config.controls is False
        assert config.channel.kind == "plain"
        assert config.data.gap == "none"

    def test_a_value_with_an_equals_sign(self) -> None:
        assert load_config(None, ["data.source=a=b.npz"]).data.source == "a=b.npz"

    def test_spaces_around_name_and_value(self) -> None:
        assert load_config(None, [" rounds = 4 "]).rounds == 4

    def test_an_override_cannot_smuggle_in_another(self) -> None:
        assert "rounds=" in message_of("rounds=3\nseed=4")


class TestPartOfAGroup:
    """A group's defaults may differ from its class's: naming one member must not reset the others."""

    def test_every_other_setting_stays(self) -> None:
        before = flat(Config())
        for name, value in before.items():
            for other in (*OTHERS, not value):
                try:
                    after = flat(load_config(None, (), {name: other}))
                except ConfigError:
                    continue
                if after == before:
                    continue
                assert {key for key in before if after[key] != before[key]} == {name}
                break

    def test_likewise_in_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text("[student.dp]\nsteps = 123\n[teacher]\nmodel = 'mlp'\n")
        config = load_config(path)
        default = Config()
        assert config.student.dp == default.student.dp.model_copy(update={"steps": 123})
        assert config.teacher.model == default.teacher.model.model_copy(update={"name": "mlp"})
        assert config.teacher.fit == default.teacher.fit


class TestBadValues:
    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize(
        "value", ["nan", "-1", "abc", "", "true", "[1]", "{a=1}", "-inf", "-" + "1" * 5000]
    )
    def test_numbers(self, name: str, value: str) -> None:
        message = message_of(f"{name}={value}")
        assert message.startswith(f"{name}=") or message.startswith(f"{name}.a")
        assert len(message) < 250
        if value not in ("true", "{a=1}", "[1]"):
            assert value[:20] in message

    @pytest.mark.parametrize("name", NUMBERS)
    def test_options_are_checked_as_overrides_are(self, name: str) -> None:
        assert message_of(**{name: "nan"}).startswith(f"{name}='nan'")

    @pytest.mark.parametrize("value", ["0", "-0.0", "-3", "nan", "1e-400", "three"])
    @pytest.mark.parametrize("name", ["privacy.epsilon", "privacy.device_epsilon"])
    def test_epsilon(self, name: str, value: str) -> None:
        assert message_of(f"{name}={value}").startswith(f"{name}=")

    @pytest.mark.parametrize("value", ["inf", "0.01", "100", "1e9"])
    def test_extreme_epsilon_is_a_value(self, value: str) -> None:
        for name in ("epsilon", "device_epsilon"):
            config = load_config(None, [f"privacy.{name}={value}"])
            assert getattr(config.privacy, name) == float(value)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("channel.kind=nosied", "channel.kind='nosied': expected one of ['noised', 'plain', 'secure']"),
            ("privacy.delta=1", "privacy.delta=1: expected less than 1"),
            ("privacy.delta=0", "privacy.delta=0: expected greater than 0"),
            ("rounds=0", "rounds=0: expected greater than or equal to 1"),
            ("rounds=2.5", "rounds=2.5: expected a valid integer"),
            (
                "channel.norm_projections=28",
                "channel.norm_projections=28: too few to catch a device of three times the clip norm without "
                "naming honest ones: take 29 to 256, or 0",
            ),
            ("channel.aggregators=1", "channel.aggregators=1: expected greater than or equal to 2"),
            ("student.dp.sampling_rate=1.01", "student.dp.sampling_rate=1.01: expected less than"),
            ("student.alpha=1.5", "student.alpha=1.5: expected less than or equal to 1"),
            ("data.devices=1000000001", "data.devices=1000000001: expected less than or equal to 1000000000"),
            ("teacher.fit.learning_rate=1e38", "teacher.fit.learning_rate=1e+38: expected less than"),
            ("rounds=1000000", "rounds=1000000: expected less than or equal to 100000"),
            ("channel.deadline=1e9", "channel.deadline=1000000000.0: expected less than or equal to 86400"),
            ("data.gap_classes=[-1]", "data.gap_classes.0=-1: expected greater than or equal to 0"),
            ("data.classes=a", "data.classes=('a',): "),
            ("data.classes=a,b,a", "data.classes='a,b,a': a class is empty or named twice"),
            ("data.classes=3,4,3.0", "data.classes='3,4,3.0': a class is empty or named twice"),
            ("data.classes=a,,b", "data.classes='a,,b': a class is empty or named twice"),
            ("data.classes=3", "data.classes=3: expected"),
            ("data.classes=[true, false]", "data.classes.0=True: expected a valid string"),
            ("data.classes=a\udcff,b", "data.classes=('a\\udcff', 'b'): expected text in Unicode"),
            ("data.scale=0", "data.scale=0: expected greater than 0"),
            ("data.test_records=0", "data.test_records=0: expected greater than or equal to 1"),
            ("data=3", "data=3: expected a valid dictionary"),
            ("student.models=[]", "student.models=[]: "),
            ("student.models=[3]", "student.models.0=3: "),
            ('teacher.model=""', "teacher.model.name='': "),
            ("controls=perhaps", "controls='perhaps': expected a valid boolean"),
            ("data.source=\udcff", "data.source='\\udcff': expected text in Unicode"),
            ("data.data_dir=\udcff", "data.data_dir='\\udcff': expected text in Unicode"),
        ],
    )
    def test_names_setting_value_and_expectation(self, override: str, expected: str) -> None:
        assert message_of(override).startswith(expected)

    @pytest.mark.parametrize("override", ["rounds", "=3", " = 3", ""])
    def test_not_an_assignment(self, override: str) -> None:
        assert message_of(override).startswith(f"--set {override!r}: expected name=value")

    def test_settings_that_contradict_each_other(self) -> None:
        message = message_of("channel.kind=plain", "privacy.device_epsilon=3")
        assert "privacy.device_epsilon" in message
        assert "noised" in message
        load_config(None, ["channel.kind=plain", "privacy.device_epsilon=inf"])

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["channel.dropout=1"], "channel.dropout=1"),
            (["channel.dropout=0.3"], "silences 2 of 5 devices, and a release takes at least 5: "),
            (["channel.dropout=0.3"], "set channel.minimum_devices=3, or lower channel.dropout"),
            (["channel.dropout=0.6", "channel.minimum_devices=3"], "set channel.minimum_devices=2"),
            (["channel.dropout=0.95", "channel.kind=plain"], "takes at least 1: lower channel.dropout"),
            (["channel.minimum_devices=6"], "channel.minimum_devices=6: there are 5 devices"),
        ],
    )
    def test_dropouts_beyond_what_the_channel_allows(self, overrides: list[str], expected: str) -> None:
        assert expected in message_of(*overrides)

    @pytest.mark.parametrize(
        ("overrides", "silent"),
        [
            (["channel.dropout=0.3", "channel.minimum_devices=3"], 2),
            (["channel.dropout=0.8", "channel.kind=noised"], 4),
            (["channel.dropout=0.3", "channel.minimum_devices=700", "data.devices=1000"], 300),
            (["channel.dropout=0.01"], 0),
        ],
    )
    def test_dropouts_that_it_does(self, overrides: list[str], silent: int) -> None:
        assert load_config(None, overrides).silent_devices == silent

    @given(st.text(), st.text())
    def test_any_text_is_a_value_or_one_line(self, name: str, value: str) -> None:
        message = refusal_of(lambda: load_config(None, [f"{name}={value}"]))
        assert message is None or len(message.splitlines()) == 1

    @given(st.sampled_from(sorted(LEAVES)), st.text())
    def test_any_text_for_any_setting(self, name: str, value: str) -> None:
        for load in (
            lambda: load_config(None, [f"{name}={value}"]),
            lambda: load_config(None, (), {name: value}),
        ):
            message = refusal_of(load)
            assert message is None or len(message.splitlines()) == 1


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("privacy.epsilom=3", "privacy.epsilom: unknown setting; did you mean 'epsilon'?"),
            ("chanel.kind=plain", "chanel: unknown setting; did you mean 'channel'?"),
            ("student.dp.step=3", "student.dp.step: unknown setting; did you mean 'steps'?"),
            ('student.models=[{nam="mlp"}]', "student.models.0.nam: unknown setting; did you mean 'name'?"),
            ("teacher.fit.stps=3", "teacher.fit.stps: unknown setting; did you mean 'steps'?"),
        ],
    )
    def test_suggestion(self, override: str, expected: str) -> None:
        assert message_of(override) == expected

    def test_without_a_near_name_all_are_listed(self) -> None:
        message = message_of("channel.xyzzy=1")
        for known in ("aggregators", "answers", "kind"):
            assert repr(known) in message

    def test_a_key_below_a_value(self, tmp_path: Path) -> None:
        assert "data.devices" in message_of("data.devices.x=3")
        path = tmp_path / "run.toml"
        path.write_text("data = 3\n")
        with pytest.raises(ConfigError, match="'data' is a value, not a group"):
            load_config(path, ["data.devices=3"])


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"rounds = ",
            b"\xff\xfe",
            b"rounds = 3\nrounds = 4\n",
            b"rounds = " + b"1" * 5000,
            b"a = " + b"[" * 5000,
            b"\0",
            b"[data\n",
        ],
    )
    def test_not_toml(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            load_config(path)
        assert str(path) in str(refused.value)

    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.mktemp("toml") / "run.toml"
        path.write_bytes(content)
        refusal_of(lambda: load_config(path))

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.toml", tmp_path):
            with pytest.raises(ConfigError, match=f"configuration {path}: "):
                load_config(path)

    def test_unknown_key_in_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text("[privacy]\nepsilom = 3\n")
        with pytest.raises(ConfigError, match=r"privacy\.epsilom: unknown setting; did you mean 'epsilon'"):
            load_config(path)


class TestModelsByName:
    def test_a_name_alone_is_a_model(self) -> None:
        config = load_config(
            None, ['student.models=["mlp", {name = "cnn", width = 8}]', "teacher.model=resnet"]
        )
        assert config.student.models == (ModelConfig(name="mlp"), ModelConfig(name="cnn", width=8))
        assert config.teacher.model == Config().teacher.model.model_copy(update={"name": "resnet"})

    def test_from_the_command_line(self) -> None:
        config = load_config(None, (), {"student.models": "mlp, cnn ", "teacher.model.name": "mlp"})
        assert [model.name for model in config.student.models] == ["mlp", "cnn"]
        assert config.student == load_config(None, ["student.models=mlp,cnn"]).student
        assert config.teacher.model.width == Config().teacher.model.width, "the name alone is changed"


class TestClasses:
    @pytest.mark.parametrize(
        ("spelt", "classes"),
        [
            ("3,4,ten", ("3", "4", "ten")),
            ("[3, 4.0, 'ten ']", ("3", "4", "ten")),
            (" 3 ,04, 4,ten", ("3", "04", "4", "ten")),
            ('["3.0", "+4", "4", 1e1]', ("3.0", "+4", "4", "10")),
        ],
    )
    def test_are_text_and_numbers_have_one_form(self, spelt: str, classes: tuple[str, ...]) -> None:
        assert load_config(None, [f"data.classes={spelt}"]).data.classes == classes


def _values() -> dict[str, st.SearchStrategy[Any]]:
    share = st.floats(0, 1)
    positive = st.floats(1e-300, 1e9)
    epsilon = st.one_of(st.floats(1e-300, 1e300), st.just(math.inf))
    count = st.integers(1, 10**9)
    return {
        "rounds": st.integers(1, 100_000),
        "seed": st.integers(0, 2**63 - 1),
        "controls": st.booleans(),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "data.source": st.text(st.characters(exclude_categories=("Cs",))),
        "data.data_dir": st.sampled_from(["data", "/a/b c", "ü"]),
        "data.classes": st.lists(st.integers().map(str), min_size=2, unique=True),
        "data.scale": positive,
        "data.label": st.text("ab 1,", min_size=1),
        "data.drop": st.lists(st.text("ab 1,", min_size=1)),
        "data.header": st.sampled_from(["auto", "yes", "no"]),
        "data.gap_classes": st.lists(st.integers(0, 99)),
        "data.records_per_device": count,
        "data.dirichlet_alpha": positive,
        "privacy.epsilon": epsilon,
        "privacy.device_epsilon": epsilon,
        "privacy.delta": st.floats(1e-300, 1, exclude_max=True),
        "channel.kind": st.sampled_from(["noised", "secure"]),
        "channel.row_clip": st.floats(1e-9, 2),
        "student.models": st.lists(st.sampled_from(["mlp", "cnn", "a.b:c"]), min_size=1),
        "student.alpha": share,
        "student.dp.momentum": st.floats(0, 1, exclude_max=True),
        "student.dp.sampling_rate": st.floats(1e-9, 1),
        "reverse.queries": count,
        "reverse.memory": share,
    }


@cache
def _all_values() -> dict[str, st.SearchStrategy[Any]]:
    """For every setting, values that it takes, if need be beside others."""

    def taken(name: str, value: Any) -> bool:
        return isinstance(outcome(lambda: load_config(None, COMPANIONS.get(name, ()), {name: value})), Config)

    others = {name: [value for value in OTHERS if taken(name, value)] for name in LEAVES}
    return {name: st.sampled_from(values) for name, values in others.items()} | _values()


@st.composite
def _chosen(draw: st.DrawFn) -> dict[str, Any]:
    """Values that are good in themselves, of any settings at all, by dotted name."""
    names = draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, max_size=12))
    return {name: draw(_all_values()[name]) for name in names}


def outcome(load: Callable[[], Config]) -> Config | str:
    """The settings, or the line in which they are refused."""
    try:
        return load()
    except ConfigError as error:
        return str(error)


def tree_of(chosen: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as a tree."""
    tree: dict[str, Any] = {}
    for name, value in chosen.items():
        tree = put(tree, name, value)
    return tree


def override(name: str, value: Any) -> str:
    """As ``--set`` takes it."""
    return f"{name}={tomli_w.dumps({'value': value}).partition('=')[2]}"


def objects(kind: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """The members of a group, those that are groups built as objects."""
    kinds = {name: field.annotation for name, field in kind.model_fields.items()}
    return {
        name: kinds[name](**objects(kinds[name], value)) if isinstance(value, dict) else value  # type: ignore[misc, arg-type]
        for name, value in tree.items()
    }


def doors(tree: dict[str, Any], folder: Path) -> dict[str, Config | str]:
    """What a tree gives, however it is spelled; ``--set`` gets each member of a group on its own."""
    path = folder / "run.toml"
    path.write_bytes(tomli_w.dumps(tree).encode())
    named = flat_tree(tree)
    return {
        "keywords": outcome(lambda: Config(**tree)),
        "model_validate": outcome(lambda: Config.model_validate(tree)),
        "parse_config": outcome(lambda: parse_config(tree)),
        "TOML": outcome(lambda: load_config(path)),
        "--set": outcome(lambda: load_config(None, [override(*one) for one in named.items()])),
        "options": outcome(lambda: load_config(None, (), named)),
    }


def flat_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat_tree(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        )
    return found


class TestEveryDoorGivesTheSame:
    @pytest.fixture(autouse=True, scope="class")
    def _values_are_known(self) -> None:
        """Before hypothesis looks at the clock."""
        _all_values()

    @given(chosen=_chosen())
    def test_any_tree(self, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]) -> None:
        tree = tree_of(chosen)
        found = doors(tree, tmp_path_factory.mktemp("doors"))
        config = found.pop("keywords")
        assert set(map(repr, found.values())) == {repr(config)}
        if isinstance(config, str):
            assert len(config.splitlines()) == 1
            return
        assert all(one == config for one in found.values())
        assert Config(**objects(Config, tree)) == config, "objects are tables"
        assert Config(**dict(config)) == config == Config.model_validate(config_tree(config))
        after, before = flat(config), flat(Config())
        assert all(after[name] == before[name] for name in LEAVES if name not in chosen), (
            "the rest is as it was"
        )

    @given(
        chosen=_chosen(),
        name=st.sampled_from(sorted(LEAVES)),
        value=st.sampled_from([*OTHERS, -1, math.nan, {}]),
    )
    def test_a_bad_value_too(
        self, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any], name: str, value: Any
    ) -> None:  # fmt: skip
        found = doors(tree_of(chosen | {name: value}), tmp_path_factory.mktemp("doors"))
        if value == {}:
            found = {door: one for door, one in found.items() if door not in ("--set", "options")}
        assert len(set(map(repr, found.values()))) == 1

    def test_a_group_of_a_few_members(self) -> None:
        config = Config.model_validate(
            {"student": {"dp": {"steps": 10}}, "teacher": {"model": {"name": "mlp"}}}
        )
        assert config.student.dp.part == "head"
        assert (config.teacher.model.width, config.teacher.model.activation) == (128, "relu")

    def test_an_object_keeps_what_it_sets_and_takes_the_rest_from_the_field(self) -> None:
        config = Config(
            student=StudentConfig(dp=DpSgdConfig(steps=7), direct_dp=DpSgdConfig(step_noise=0.2)),
            teacher=TeacherConfig(model=ModelConfig(name="mlp", activation="tanh")),
        )
        assert (config.student.dp.steps, config.student.dp.part) == (7, "head")
        assert config.student.direct_dp.step_noise == 0.2, "set, though it is what its class has"
        assert config.teacher.model == ModelConfig(name="mlp", width=128, activation="tanh")

    def test_an_object_of_another_group_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^student=TeacherConfig.*expected a valid .*StudentConfig$"):
            Config(student=TeacherConfig())

    def test_nothing_of_the_callers_is_changed(self) -> None:
        data = {"source": "mnist"}
        tree = {"data": data, "devices": 3}
        assert Config(**tree).data.devices == 3
        assert (data, list(tree)) == ({"source": "mnist"}, ["data", "devices"])


class TestShortNames:
    @pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
    def test_are_their_settings(self, option: Option, tmp_path: Path) -> None:
        values = [
            value for value in (*OTHERS, "3", "inf", "x") if isinstance(value, str) or not option.names_group
        ]
        expected = [outcome(partial(load_config, None, (), {option.setting: value})) for value in values]
        for value, one in zip(values, expected, strict=True):
            found = doors({option.name: value}, tmp_path)
            assert found == dict.fromkeys(found, one)
        assert len(set(map(repr, expected))) > 1

    def test_of_the_main_job(self) -> None:
        config = Config(data="mnist", devices=20, epsilon="inf", channel="secure", rounds=3, teacher="mlp")
        assert config == parse_config(
            {
                "data": {"source": "mnist", "devices": 20},
                "privacy": {"epsilon": math.inf},
                "teacher": {"model": {"name": "mlp"}},
            }
        )

    def test_join_a_group(self) -> None:
        for group in ({"source": "mnist"}, DataConfig(source="mnist")):
            config = Config(data=group, devices=20)
            assert (config.data.source, config.data.devices) == ("mnist", 20)

    @pytest.mark.parametrize("group", [{"epsilon": 3.0}, PrivacyConfig(epsilon=3.0)])
    def test_both_names_of_one_setting_are_refused(self, group: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"^epsilon and privacy\.epsilon are one setting: give one of them$"
        ):
            Config(epsilon=3.0, privacy=group)

    def test_the_later_wins_under_either_name(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text("epsilon = 7.0\ndata = 'mnist'\ndevices = 9\n")
        assert load_config(path, ["privacy.epsilon=8", "data.devices=8"]).privacy.epsilon == 8
        config = load_config(path, ["privacy.epsilon=8", "epsilon=9", "data=cifar10"], {"data.devices": "4"})
        assert (config.privacy.epsilon, config.data.source, config.data.devices) == (9, "cifar10", 4)

    def test_are_suggested(self) -> None:
        assert message_of("epsilom=3") == "epsilom: unknown setting; did you mean 'epsilon'?"


class TestRoundTrip:
    def test_defaults(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(config_tree(Config())))
        assert load_config(path) == Config()

    @given(chosen=st.fixed_dictionaries({}, optional=_values()))
    def test_any_settings(self, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]) -> None:
        config = load_config(None, (), chosen)
        path = tmp_path_factory.mktemp("toml") / "run.toml"
        path.write_bytes(tomli_w.dumps(config_tree(config)).encode())
        assert load_config(path) == config

    def test_every_setting_survives(self, tmp_path: Path) -> None:
        """Each leaf alone, at a value that is not its default."""
        path = tmp_path / "run.toml"
        missed = []
        for name, kind in LEAVES.items():
            for value in OTHERS:
                try:
                    config = load_config(None, COMPANIONS.get(name, ()), {name: value})
                except ConfigError:
                    continue
                if config == load_config(None, COMPANIONS.get(name, ())):
                    continue
                path.write_bytes(tomli_w.dumps(config_tree(config)).encode())
                assert load_config(path) == config, name
                break
            else:
                missed.append((name, kind))
        assert not missed
