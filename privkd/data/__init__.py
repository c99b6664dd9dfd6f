"""Sources, and the scenario that splits them between the public, the devices and the tests."""

from privkd.data.dataset import Source
from privkd.data.partition import Split, split_indices
from privkd.data.scenario import Device, LabelledSet, Scenario, build_scenario, scenario_from
from privkd.data.sources import load, register

__all__ = [
    "Device",
    "LabelledSet",
    "Scenario",
    "Source",
    "Split",
    "build_scenario",
    "load",
    "register",
    "scenario_from",
    "split_indices",
]
