"""The settings that have an option of the command line, and so a short name: spelled here and nowhere else.

Light to import, as ``--help`` needs nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privkd.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """A setting's option.

    Attributes:
        name: the setting's short name, wherever settings are written.
        setting: its dotted name.
        help: what the command line says of it, its default in brackets.
        many: whether it is typed once for each member of a list.
    """

    name: str
    setting: str
    help: str
    many: bool = False

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def names_group(self) -> bool:
        """Whether a group of settings has the same name; text is then the option's."""
        return self.setting.startswith(f"{self.name}.")


_ALL = (
    Option("epsilon", "privacy.epsilon", "Budget of the whole run, of each --unit; inf is no DP. [3]"),
    Option(
        "unit",
        "privacy.unit",
        "What training protects: a record, or with --group a person with all of their records. [record]",
    ),
    Option("delta", "privacy.delta", "Delta of both units. [1e-5]"),
    Option(
        "device_epsilon",
        "privacy.device_epsilon",
        "Device-level budget of the whole run: adds noise to the channel. [none]",
    ),
    Option(
        "data",
        "data.source",
        "digits, docstrings, mnist, cifar10, a path, or package.module:function. [digits]",
    ),
    Option("data_dir", "data.data_dir", "Folder of mnist or cifar10, base of relative paths."),
    Option(
        "public",
        "data.public",
        "Public labelled records, instead of ones drawn from --data; all of that is then private.",
    ),
    Option(
        "proxy",
        "data.proxy",
        "Unlabelled public inputs of their own, instead of ones drawn from the public records.",
    ),
    Option("test", "data.test", "The global test set, instead of what --data brings or what is drawn."),
    Option(
        "classes", "data.classes", "The classes by name, comma-separated, instead of those that are known."
    ),
    Option("image_size", "data.image_size", "Square that image files are resized and cropped to, in pixels."),
    Option("label", "data.label", "The label's column in a table, or array in an npz archive. [by its name]"),
    Option(
        "text",
        "data.text",
        "The column, or field of JSON lines, that holds the text; in JSON lines it is text otherwise.",
    ),
    Option("drop", "data.drop", "Columns that are neither feature nor label, comma-separated. [none]"),
    Option(
        "group",
        "data.group",
        "The column that says whose each record is: a natural partition, by whole groups.",
    ),
    Option("missing", "data.missing", "Missing features: refuse, mean, most-frequent or drop. [refuse]"),
    Option("devices", "data.devices", "Number of devices. [5]"),
    Option("rounds", "rounds", "Number of rounds. [3]"),
    Option("channel", "channel.kind", "plain, noised, secure or a plug-in's. [secure]"),
    Option("aggregators", "channel.aggregators", "Parties of the secure channel. [2]"),
    Option(
        "aggregation",
        "channel.aggregation",
        "What the secure channel shows the cloud: mean, or votes. [mean]",
    ),
    Option(
        "dropout",
        "channel.dropout",
        "Share of the devices that fall silent in each round, simulated. [0]",
    ),
    Option(
        "aggregator_url",
        "channel.aggregator_urls",
        "A running party of the secure channel; repeat for each.",
        many=True,
    ),
    Option(
        "student",
        "student.models",
        "linear, mlp, cnn, resnet, scatter, text-embedding, text-cnn, transformer or package.module:factory; "
        "a comma deals several. [auto]",
    ),
    Option("teacher", "teacher.model.name", "One of the same names. [auto]"),
    Option(
        "encoder",
        "encoder",
        "Frozen encoder below all models: package.module:function, or a folder of Hugging Face's. [none]",
    ),
    Option("partition", "data.partition", "iid, dirichlet or classes. [iid]"),
    Option("seed", "seed", "Decides everything but deployment noise. [0]"),
    Option("device", "device", "auto, cpu or cuda. [auto]"),
)

OPTIONS: Mapping[str, Option] = {option.name: option for option in _ALL}
"""By short name, in the order of ``--help``."""


def setting_of(name: str, value: Any) -> str:
    """The dotted name of the setting that ``name`` gives ``value`` to: that of a short name, else itself.

    A group's own name is short for its main setting where ``value`` is text.
    """
    option = OPTIONS.get(name)
    if option is None or (option.names_group and not isinstance(value, str)):
        return name
    return option.setting


def put(tree: Mapping[Any, Any], setting: str, value: Any, *, by: str = "") -> dict[Any, Any]:
    """``tree`` with ``setting``, a dotted name, at ``value``; given ``by`` a short name, it is to be new.

    Raises:
        ConfigError: part of the name is a setting and no group; or it is not new.
    """
    whole = below = dict(tree)
    *groups, last = setting.split(".")
    for group in groups:
        inner = below.get(group, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{setting}: {group!r} is a value, not a group of settings")
        below[group] = dict(inner)
        below = below[group]
    if by and last in below:
        raise ConfigError(f"{by} and {setting} are one setting: give one of them")
    below[last] = value
    return whole
