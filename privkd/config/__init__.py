"""The settings of a run: what they are (`schema`) and how people write them (`spelling`)."""

from privkd.config.schema import (
    ChannelConfig,
    Config,
    DataConfig,
    DpSgdConfig,
    FitConfig,
    ModelConfig,
    Positive,
    PositiveFloat,
    PrivacyConfig,
    ReverseConfig,
    Settings,
    StudentConfig,
    TeacherConfig,
)
from privkd.config.spelling import config_tree, load_config, parse_config

__all__ = [
    "ChannelConfig",
    "Config",
    "DataConfig",
    "DpSgdConfig",
    "FitConfig",
    "ModelConfig",
    "Positive",
    "PositiveFloat",
    "PrivacyConfig",
    "ReverseConfig",
    "Settings",
    "StudentConfig",
    "TeacherConfig",
    "config_tree",
    "load_config",
    "parse_config",
]
