"""Hostile input of every kind is read, or refused in one line: no traceback, no hang, nothing spent.

``pytest tests/test_fuzz.py --fuzz-examples 2000`` tries thousands, and counts them at its end.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from csv import writer as csv_writer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tally
import tomli_w
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from faults import Commands
from fuzzing import damaged, fuzzed, no_hang
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import Read, read
from running import SMALL, StopAt, play

from privkd import prepared
from privkd.config import Config, DataConfig, config_tree, load_config, parse_config
from privkd.data import build_scenario
from privkd.data.tokens import tokens_of_texts
from privkd.errors import ChannelError, ConfigError, DataError, InputError, PrivkdError, RunError
from privkd.journal import Journal
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Ledger
from privkd.runs.checkpoint import load_state, load_transcript, saved
from privkd.runs.folder import RunFolder
from privkd.secure.keys import public_hex
from privkd.secure.party import load_party
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import Upload, header_of, prepare, unseal

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 5), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3


def attempt(
    what: str, refusals: type[PrivkdError] | tuple[type[PrivkdError], ...], read: Callable[[], Any]
) -> Any:
    """What ``read`` returns, or ``None`` where it refuses in one line; anything else is a failure."""
    refused, found = "", None
    with no_hang():
        try:
            found = read()
        except refusals as error:
            refused = str(error) or "without a word"
    assert "\n" not in refused
    assert refused != "without a word"
    tally.note(what, "refused" if refused else "read")
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def png(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    writer.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def csv() -> bytes:
    rows = [
        f"{row[0, 0]},{row[1, 1] / 3},{'ab'[label % 2]}" for row, label in zip(IMAGES, LABELS, strict=True)
    ]
    return "\n".join(["first,second,label", *rows]).encode()


def leaf() -> bytes:
    users = {
        f"u{user}": {"x": (IMAGES[user::4, 0] / 7).tolist(), "y": LABELS[user::4].tolist()}
        for user in range(4)
    }
    return json.dumps({"users": [*users], "num_samples": [3] * 4, "user_data": users}).encode()


def arrow() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [{"bytes": png(image)} for image in IMAGES], "label": LABELS})
    buffer = io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


SAVED = {
    "state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}]}).encode(),
    "dataset_info.json": json.dumps(
        {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}
    ).encode(),
}
"""What describes a folder that ``datasets`` saved."""


def words(delimiter: str = ",") -> bytes:
    """A table as people have them: quotes, a mark at its beginning, text, words for flags, missing values."""
    rows = [
        delimiter.join(
            [f'"{row[0, 0]}"', ["red", "blue", ""][label], ["yes", "No"][label % 2], "NA", str(label)]
        )
        for row, label in zip(IMAGES, LABELS, strict=True)
    ]
    rows[0] = rows[0].replace("NA", "1.5")
    return "\r\n".join([delimiter.join(["first", "colour", "wet", "gap", "label"]), *rows]).encode(
        "utf-8-sig"
    )


def worded_parquet() -> bytes:
    texts = [["red", "blue", None][label] for label in LABELS]
    numbers = [None if label == 2 else float(label) for label in LABELS]
    return parquet(colour=texts, gap=numbers, b=IMAGES[:, 0, 0] / 3, label=LABELS)


POOLS = (
    ("1", "2.5", "-3e2", "0", "NA", "nan"),
    ("red", "blue", "dark blue, or grey", "", "?"),
    ("yes", "No", "YES", "no", "null"),
    ("2024-01-03", "2024-01-04"),
    ("1,5", "2,5", "1 000"),
    ("", "NA"),
    ("1e400", "inf", "=1+1", "'", '"', "\\", "\x00", "\ufeff", "1_000", "0x1f", "\u0663", "%"),
)
"""What stands in the cells of a column."""


@st.composite
def table(draw: st.DrawFn) -> list[list[str]]:
    """The lines of a table, each column of its own kind, and now and then a cell or a line of none."""
    count = draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(["a", "B c", "id", "day", ""]) | st.text(max_size=4), max_size=3))
    columns = [
        draw(st.lists(st.sampled_from(draw(st.sampled_from(POOLS))), min_size=count, max_size=count))
        for _ in names
    ]
    labels = draw(st.lists(st.sampled_from(["u", "v"]), min_size=count, max_size=count))
    lines = [list(line) for line in zip(*columns, labels, strict=True)]
    if draw(st.integers(0, 9)) == 0:
        lines[draw(st.integers(0, count - 1))][0] = draw(st.text(max_size=5))
    odd = draw(st.lists(st.lists(st.text(max_size=3), max_size=3), max_size=1)) if draw(st.booleans()) else []
    return [[*names, "label"], *lines, *odd]


def json_lines() -> bytes:
    lines = [{"text": f"text {row} \u00e9\ud83d\ude00", "label": "ab"[row % 2]} for row in range(12)]
    return "\n".join(map(json.dumps, lines)).encode()


FILES: dict[str, Callable[[], bytes]] = {
    "train-images-idx3-ubyte": lambda: idx(IMAGES),
    "train-images-idx3-ubyte.gz": lambda: gzip.compress(idx(IMAGES)),
    "a.npz": lambda: npz(x=IMAGES, y=LABELS),
    "floats.npz": lambda: npz(x=IMAGES / 7, y=LABELS),
    "a.csv": csv,
    "words.csv": words,
    "words.tsv": lambda: words("\t"),
    "words.parquet": worded_parquet,
    "a.parquet": lambda: parquet(a=IMAGES[:, 0, 0], b=IMAGES[:, 1, 0] / 3, label=LABELS),
    "images.parquet": lambda: parquet(img=[{"bytes": png(image)} for image in IMAGES], label=LABELS),
    "a.json": leaf,
    "data.arrow": arrow,
    "state.json": lambda: SAVED["state.json"],
    "dataset_info.json": lambda: SAVED["dataset_info.json"],
    "a.jsonl": json_lines,
    "0/a.txt": lambda: "Ein Text, \u4e00 zwei \U0001f600.".encode(),
    "0/a.png": lambda: png(IMAGES[0]),
    "0/a.jpg": lambda: png(IMAGES[0], "JPEG"),
    "0/a.gif": lambda: png(IMAGES[0], "GIF"),
}


def check(source: Read) -> None:
    """Whatever was read is a data set."""
    assert source.inputs.dtype in (torch.float32, torch.int64)
    assert bool(source.inputs.isfinite().all())
    assert source.labels.dtype == torch.int64
    assert len(source.inputs) == len(source.labels) > 0
    assert 0 <= int(source.labels.min()) <= int(source.labels.max()) < source.classes


class TestDataFiles:
    @pytest.mark.parametrize("name", FILES)
    def test_damaged(self, folder: Path, name: str) -> None:
        place = folder / name.replace("/", "-") / "set"
        path = place / name
        path.parent.mkdir(parents=True)
        if name.startswith("train"):
            (place / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
        if "/" in name:
            (place / "1").mkdir()
            other = ("b.txt", b"another") if name.endswith(".txt") else ("b.png", png(IMAGES[1]))
            (place / "1" / other[0]).write_bytes(other[1])
        if name in SAVED or name == "data.arrow":
            for described, content in (SAVED | {"data.arrow": arrow()}).items():
                (place / described).write_bytes(content)
        alone = path.parent == place and not (name.startswith("train") or (place / "data.arrow").exists())
        source = path if alone else place
        whole = FILES[name]()
        path.write_bytes(whole)
        filled = {"missing": "mean"} if name.startswith("words") else {}
        check(read(source, **filled))

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            path.write_bytes(content)
            found = attempt(f"data file, {path.suffix or 'idx'}", DataError, lambda: read(source, **filled))
            if found is not None:
                check(found)

        damage()

    @pytest.mark.parametrize("missing", ["refuse", "mean", "most-frequent", "drop"])
    def test_tables_of_any_cells(self, folder: Path, missing: str) -> None:
        """Whole files with whatever people may have written in a cell."""

        @fuzzed()
        @given(table(), st.sampled_from((".csv", ".tsv")))
        def tried(lines: list[list[str]], suffix: str) -> None:
            path = folder / f"cells{suffix}"
            text = io.StringIO(newline="")
            csv_writer(text, delimiter="," if suffix == ".csv" else "\t").writerows(lines)
            path.write_text(text.getvalue(), encoding="utf-8", errors="replace")
            found = attempt("table of any cells", InputError, lambda: read(path, missing=missing))
            if found is not None:
                check(found)

        tried()

    @pytest.mark.parametrize("role", ["public", "proxy", "test"])
    @pytest.mark.parametrize("name", ["a.npz", "a.csv", "a.json"])
    def test_damaged_beside_the_data(self, folder: Path, name: str, role: str) -> None:
        place = folder / f"beside-{role}-{name}"
        place.mkdir()
        own, path = place / f"own{Path(name).suffix}", place / name
        whole = FILES[name]()
        for file in (own, path):
            file.write_bytes(whole)
        settings = {"devices": 1, "device_test_records": 0, "records_per_device": 1, "gap": "none"}
        sizes = {"public": 2, "validation": 1, "proxy": 2, "test": 1}
        settings |= {f"{name}_records": size for name, size in sizes.items() if name != role}
        config = DataConfig.model_validate({"source": str(own), role: str(path), **settings})
        build_scenario(config, 0)

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            path.write_bytes(content)
            found = attempt("data file beside the data", InputError, lambda: build_scenario(config, 0))
            assert found is None or bool(found.proxy.isfinite().all())

        damage()

    def test_a_damaged_tokenizer(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokens, _ = tokens_of_texts(["some words of text"], DataConfig(length=8))
        assert tokens.tokenizer is not None
        texts = np.array(["words", "\u4e00" * 50, ""], dtype=object)

        def tokenized() -> torch.Tensor:
            return tokens_of_texts(["a text"], DataConfig(tokenizer=path, length=8))[0].ids(texts)

        @fuzzed()
        @given(damaged(tokens.tokenizer.encode()))
        def damage(content: bytes) -> None:
            path.write_bytes(content)
            found = attempt("tokenizer", (ConfigError, DataError), tokenized)
            assert found is None or (found.dtype == torch.int64 and int(found.min()) >= 0)

        damage()

    def test_a_line_of_json_that_unpacks_to_a_tower(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        for bomb in ("[" * 10**6, '{"a":' * 10**5, '"' + "a" * (17 << 20) + '"', "9" * 10**6):
            path.write_text(f'{{"text": "a", "label": {bomb}\n')
            assert attempt("JSON lines", DataError, lambda: read(path)) is None

    @pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.csv", "0/a.png", "train-images-idx3-ubyte"])
    def test_a_pickle_of_any_name_is_not_loaded(self, tmp_path: Path, name: str) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "exploded"),)

        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True)
        for content in (pickle.dumps(Bomb()), npz(x=np.array([Bomb()] * 12, dtype=object), y=LABELS)):
            path.write_bytes(content)
            assert attempt("pickle in place of data", DataError, lambda: read(path)) is None
        assert not (tmp_path / "exploded").exists()


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["auto", "inf", "nan", "-1", "1e309", "plain", "mlp", "digits", ""])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3),
)


def names_of(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all settings and groups."""
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += names_of(value, f"{prefix}{key}.")
    return found


NAMES = names_of(config_tree(Config()))


class TestConfiguration:
    def test_damaged_files(self, folder: Path) -> None:
        path, whole = folder / "run.toml", tomli_w.dumps(config_tree(Config())).encode()

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            path.write_bytes(content)
            attempt("configuration file", ConfigError, lambda: load_config(path))

        damage()

    def test_any_values_for_any_names(self) -> None:
        @fuzzed()
        @given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4))
        def values(settings: dict[str, Any]) -> None:
            found = attempt("settings", ConfigError, lambda: load_config(None, (), settings))
            if found is not None:
                assert parse_config(config_tree(found)) == found, (
                    "whatever is accepted can be written and read"
                )

        values()

    def test_any_accepted_number_opens_a_game_or_is_refused(self) -> None:
        """Nothing is trained: the plan is made, the models are tried, in bounded time."""
        numbers = st.integers(1, 10**9) | st.floats(1e-12, 1e9)
        names = [name for name in NAMES if "." in name and not name.startswith(("channel.", "data.source"))]

        @fuzzed()
        @given(st.dictionaries(st.sampled_from(names), numbers, min_size=1, max_size=2))
        def opens(settings: dict[str, Any]) -> None:
            attempt(
                "settings, up to the plan",
                PrivkdError,
                lambda: prepared.prepare(load_config(None, SMALL, settings)),
            )

        opens()


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that was stopped in its second round."""
    with pytest.raises(KeyboardInterrupt):
        play(folder / "runs" / "run", "privacy.epsilon=3", progress=StopAt(7))
    return folder / "runs" / "run"


def forge(path: Path, name: str) -> None:
    """Write the journal anew, as if the file had always been what it is now."""
    journal, digest = path / "journal.jsonl", hashlib.sha256((path / name).read_bytes()).hexdigest()
    records = list(Journal(journal))
    journal.unlink()
    forged = Journal(journal)
    for record in records:
        if record.get("round") == 1:
            record["files"][Path(name).stem] = digest
        forged.append(record)


class TestCheckpoints:
    @pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
    @pytest.mark.parametrize("name", ["rounds/001/cloud.safetensors", "rounds/001/wire.safetensors"])
    def test_of_a_run(self, folder: Path, run: Path, name: str, forged: bool) -> None:
        """Forged ones come with a journal that vouches for them: they are read with care all the same."""
        copy = folder / f"{Path(name).stem}-{forged}" / "run"
        shutil.copytree(run, copy)
        whole, journal = (run / name).read_bytes(), (run / "journal.jsonl").read_bytes()
        with RunFolder.resume(copy) as opened:
            teacher = prepared.prepare(opened.config).cloud.untrained_teacher()
        spent = Ledger.load(copy / "ledger.jsonl").spent(Unit.RECORD).high

        def read() -> None:
            with RunFolder.resume(copy) as opened:
                load_state(opened, saved(opened), teacher)
                load_transcript(opened, teacher)

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            (copy / "journal.jsonl").write_bytes(journal)
            (copy / name).write_bytes(content)
            if forged:
                forge(copy, name)
            found = attempt(f"checkpoint, {'forged' if forged else 'damaged'}", RunError, lambda: read() or 1)
            assert found is None or forged or content == whole

        damage()
        assert Ledger.load(copy / "ledger.jsonl").spent(Unit.RECORD).high == spent

    @pytest.mark.parametrize("name", ["journal.jsonl", "ledger.jsonl", "config.toml"])
    def test_records(self, folder: Path, run: Path, name: str) -> None:
        """The chain shows any change; a line that was torn off the end shows against the journal's head."""
        copy = folder / f"records-{name}" / "run"
        shutil.copytree(run, copy)
        whole = (run / name).read_bytes()

        def read() -> float:
            with RunFolder.resume(copy) as opened:
                head = saved(opened).ledger
                return Ledger.load(copy / "ledger.jsonl", at_least=head).spent(Unit.RECORD).high

        least = Ledger.load(run / "ledger.jsonl").spent(Unit.RECORD).high / 2

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            (copy / name).write_bytes(content)
            found = attempt(f"record of a run, {name}", RunError, read)
            assert found is None or name == "journal.jsonl" or found >= least, "no budget is reset"

        damage()


KEYS = [X25519PrivateKey.generate() for _ in range(2)]
TERMS = RoundTerms(
    round=3, keys=tuple(public_hex(key) for key in KEYS), entries=6, minimum=2, fraction_bits=4, bound=1000,
    sigma2=None, roster=("a", "b"), expires=int(time.time()) + 1000,
)  # fmt: skip


class TestUploads:
    def test_envelopes(self) -> None:
        whole = prepare(np.ones((2, 3)) / 3, TERMS, "a").envelopes[0]

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            attempt("upload, header", ChannelError, lambda: header_of(content))
            found = attempt("upload, sealed", ChannelError, lambda: unseal(content, KEYS[0]))
            assert found is None or content == whole, "nothing that was altered is opened"

        damage()

    def test_kept_uploads(self) -> None:
        whole = prepare(np.ones((2, 3)) / 3, TERMS, "a").pack()

        @fuzzed()
        @given(damaged(whole))
        def damage(content: bytes) -> None:
            attempt("upload, kept", ChannelError, lambda: Upload.unpack(content))

        damage()

    def test_terms(self) -> None:
        @fuzzed()
        @given(damaged(TERMS.pack()))
        def damage(content: bytes) -> None:
            attempt("terms of a round", ChannelError, lambda: RoundTerms.unpack(content))

        damage()

    def test_a_party_s_settings(self, folder: Path) -> None:
        from privkd.secure.keys import make_keys

        make_keys(folder / "keys")
        path = folder / "keys" / "party-0.toml"

        @fuzzed()
        @given(damaged(path.read_bytes()))
        def damage(content: bytes) -> None:
            (folder / "keys" / "damaged.toml").write_bytes(content)
            attempt("a party's settings", PrivkdError, lambda: load_party(folder / "keys" / "damaged.toml"))

        damage()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as server:
        yield server


class TestThroughTheCommand:
    """The same once more with the whole program around it, a few at a time."""

    def check(self, commands: Commands, folder: Path, what: str, *arguments: object) -> None:
        answer = commands.run("train", *arguments, "--out", folder / "out" / "run")
        assert "Traceback" not in answer.err
        assert answer.code in (0, 1, 2)
        if answer.code:
            assert len(answer.err.splitlines()) == 1, answer.err
            assert answer.err.startswith("privkd: ")
        assert not (folder / "out").exists(), "no run was begun, no budget opened"
        tally.note(what, "refused" if answer.code else "read")

    @pytest.mark.parametrize("name", ["a.npz", "a.csv"])
    def test_data(self, commands: Commands, folder: Path, name: str) -> None:
        path = folder / f"command-{name}"

        @fuzzed(commands=True)
        @given(damaged(FILES[name]()))
        def damage(content: bytes) -> None:
            path.write_bytes(content)
            self.check(commands, folder, "data file, by the command", "--data", path)

        damage()

    def test_settings(self, commands: Commands, folder: Path) -> None:
        @fuzzed(commands=True)
        @given(st.sampled_from(NAMES), VALUES)
        def values(name: str, value: Any) -> None:
            text = json.dumps(value)
            self.check(commands, folder, "settings, by the command", "--set", f"{name}={text}", "--dry-run")

        values()
