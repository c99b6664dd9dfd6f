"""Files beside the data: public records, unlabelled inputs and a test set of their own."""

from dataclasses import replace
from pathlib import Path

from privkd.config import DataConfig
from privkd.data.columns import Beside
from privkd.data.dataset import Source, check_alike
from privkd.data.sources import is_named, load
from privkd.errors import DataError

_NOT_OF_A_FILE = {"public": None, "proxy": None, "test": None}
"""Settings that are about the roles of records, not about how a file is read."""


def load_all(config: DataConfig) -> Source:
    """The data and what is given beside them, which has their columns, shape and type.

    Raises:
        ConfigError: as `load`.
        DataError: as `load`; or a file beside the data has other columns, another shape or another type, or
            brings splits where it is one of them itself.
    """
    data = load(config)
    if config.public is None:
        return _with_sets(data, config)
    public = _beside(data, config, "public", config.public)
    file = _called(config.public)
    said = {"public records": f"all of {file}", **_otherwise(data, public, "public")}
    if data.test is None:
        brought = "" if public.test is None else f"that of {file}, {public.taken['test split']}"
        said["test split"] = brought or f"drawn from {file}"
        data = replace(data, test=public.test)
    whole = _with_sets(replace(data, taken={**data.taken, **said}), config)
    shown = replace(public, test=whole.test)
    if is_named(config.source):  # All the world knows what it knows of such a data set.
        shown = replace(shown, divisor=public.divisor or data.divisor)
        shown = replace(shown, classes=public.classes or data.classes)
    return replace(whole, public=shown)


def load_public(config: DataConfig) -> Source:
    """What a cloud holds whose devices are elsewhere: the public records, and what is given beside them.

    Raises:
        ConfigError: as `load`.
        DataError: as `load_all`.
    """
    if config.public is None:
        return _with_sets(load(config), config)
    alone = config.model_copy(update={"source": config.public})
    return _with_sets(load(alone), alone)


def _with_sets(data: Source, config: DataConfig) -> Source:
    """``data`` with the test set and the proxy inputs of their own, where they are given."""
    said = dict(data.taken)
    if config.test is not None:
        own = _alone(_beside(data, config, "test", config.test), "test")
        over = " in place of the one that came with the data" if data.test is not None else ""
        said |= {"test split": f"{_called(config.test)}{over}", **_otherwise(data, own, "test")}
        data = replace(data, test=own.records, whole=data.whole and own.whole)
    if config.proxy is not None:
        own = _alone(_beside(data, config, "proxy", config.proxy), "proxy")
        said |= {"proxy inputs": f"those of {_called(config.proxy)}", **_otherwise(data, own, "proxy")}
        data = replace(data, proxy=own.records)
    return replace(data, taken=said)


def _beside(data: Source, config: DataConfig, role: str, source: str) -> Source:
    """The file of ``role``, read for the columns of ``data``."""
    settings = {name: getattr(config, name) for name in DataConfig.model_fields} | _NOT_OF_A_FILE
    asked = {
        "source": source,
        "label": data.label or config.label,
        "features": data.columns,
        "labelled": role != "proxy",
    }
    found = load(Beside(**settings | asked))
    name = f"{source} (data.{role})"
    if bool(found.columns) != bool(data.columns) and data.records.inputs.ndim == 2:
        raise DataError(
            f"{name}: a table here or in the data, and arrays in the other, so that nothing tells whether "
            "their columns are the same; write both as tables, or both as arrays"
        )
    check_alike(name, found.records, data.records)
    if found.whole != data.whole and data.records.inputs.ndim > 2:
        raise DataError(
            f"{name}: whole numbers here or in the data, and fractions in the other, which are not scaled "
            "alike; store both alike"
        )
    return found


def _alone(found: Source, role: str) -> Source:
    if found.test is not None:
        raise DataError(
            f"{found.name} (data.{role}): holds splits, and which one is the {role} set is not said; name "
            "the file or folder of that one"
        )
    return found


def _called(source: str) -> str:
    return repr(Path(source).name)


def _otherwise(data: Source, own: Source, role: str) -> dict[str, str]:
    """What was taken for something else in an own file than in the data, by its name."""
    return {
        f"{name} of data.{role}": words
        for name, words in own.taken.items()
        if name in ("header", "layout", "image", "left out", "features") and words != data.taken.get(name)
    }
