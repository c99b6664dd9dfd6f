"""Text as token ids: readers, the tokenizer that public text teaches, and integers all the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privkd.config import DataConfig
from privkd.data import build_scenario, load
from privkd.data.constants import find_constants
from privkd.data.scenario import Scenario, scenario_from
from privkd.data.tokens import Tokens, tokens_of_texts
from privkd.errors import ConfigError, DataError

WORDS = {"sport": ["match", "goal", "team", "ball"], "law": ["court", "judge", "clause", "appeal"]}
SIZES = {
    "devices": 2, "records_per_device": 20, "device_test_records": 4, "public_records": 24,
    "validation_records": 8, "proxy_records": 24, "test_records": 16, "gap": "none",
}  # fmt: skip


def texts(count: int = 160) -> list[tuple[str, str]]:
    """Made-up texts of two subjects, with their labels."""
    rng = np.random.default_rng(0)
    labels = list(WORDS)
    return [
        (" ".join(rng.choice(WORDS[label], size=rng.integers(3, 9))) + f" no. {row}.", label)
        for row in range(count)
        for label in [labels[row % 2]]
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(folder: Path, **names: str) -> Path:
    text, label = names.get("text", "text"), names.get("label", "label")
    return write_lines(folder / "a.jsonl", [{text: body, label: of} for body, of in texts()])


def scenario(source: Path | str, **others: Any) -> Scenario:
    return build_scenario(DataConfig(source=str(source), **{**SIZES, **others}), 0)


def refuses(config: DataConfig, *words: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        build_scenario(config, 0)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


class TestReaders:
    def test_json_lines_are_read_and_what_was_taken_is_said(self, tmp_path: Path) -> None:
        found = load(DataConfig(source=str(lines(tmp_path))))
        assert found.records.inputs.tolist() == [text for text, _ in texts()]
        assert found.records.labels.tolist() == [label for _, label in texts()]
        assert found.taken["text"] == "field 'text'"
        assert found.taken["label"] == "field 'label'"
        assert found.taken["layout"] == "text"

    def test_other_fields_are_named_by_settings(self, tmp_path: Path) -> None:
        path = lines(tmp_path, text="body", label="topic")
        config = DataConfig(source=str(path), text="body", label="topic")
        assert load(config).records.inputs[0] == texts()[0][0]
        refuses(DataConfig(source=str(path)), "no field 'text'", "'body'", "--text NAME")
        refuses(DataConfig(source=str(path), text="body"), "called like a label", "--label NAME")
        refuses(DataConfig(source=str(path), text="bodies"), "data.text='bodies'", "'body', 'topic'")

    def test_numbers_and_flags_are_labels_too(self, tmp_path: Path) -> None:
        records = [{"text": "a", "label": label} for label in (1, 1.0, "1", True, 2)]
        found = load(DataConfig(source=str(write_lines(tmp_path / "a.jsonl", records))))
        assert found.records.labels.tolist() == ["1", "1", "1", "1", "2"]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("[1, 2]", "line 2 is no object"),
            ('{"text": "a", "label": ', "line 2 is not readable as JSON"),
            ('{"label": "law"}', "line 2: field 'text' is missing"),
            ('{"text": 3, "label": "law"}', "line 2: field 'text' is 3, no text"),
            ('{"text": "a"}', "line 2: field 'label' is missing"),
            ('{"text": "a", "label": {}}', "line 2: field 'label' is {}"),
            ('{"text": ' + "[" * 100_000, "line 2 is not readable as JSON"),
            ('{"text": "a", "label": ' + "1" * 5000 + "}", "line 2 is not readable as JSON"),
        ],
    )
    def test_a_damaged_line_is_named(self, tmp_path: Path, line: str, words: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a", "label": "law"}\n' + line + "\n", encoding="utf-8")
        refuses(DataConfig(source=str(path)), str(path), words)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "\xff\xfe", "label": "law"}\n')
        refuses(DataConfig(source=str(path)), "line 1", "UTF-8")

    def test_half_of_a_surrogate_pair_is_a_question_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a \\ud800", "label": "law"}\n', encoding="utf-8")
        assert load(DataConfig(source=str(path))).records.inputs[0] == "a ?"

    def test_a_folder_of_texts_has_classes_and_splits(self, tmp_path: Path) -> None:
        for split, count in (("train", 120), ("test", 20)):
            for row, (text, label) in enumerate(texts(count)):
                folder = tmp_path / split / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{row}.txt").write_text(text, encoding="utf-8")
        source = load(DataConfig(source=str(tmp_path)))
        assert source.test is not None
        assert (len(source.records.labels), len(source.test.labels)) == (120, 20)
        assert source.names is not None
        assert source.taken["test split"] == "folder 'test'"
        found = scenario(tmp_path, test_records=None)
        assert found.test.inputs.dtype == torch.int64
        (tmp_path / "train" / "law" / "0.txt").write_bytes(b"\xff")
        refuses(DataConfig(source=str(tmp_path)), "0.txt", "UTF-8")

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_a_table_has_a_column_of_text(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a{suffix}"
        rows = [(row, text, label) for row, (text, label) in enumerate(texts())]
        if suffix == ".csv":
            lines = ["id,body,label", *(f'{number},"{text}",{label}' for number, text, label in rows)]
            path.write_text("\n".join(lines), encoding="utf-8")
        else:
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            columns = dict(zip(("id", "body", "label"), map(list, zip(*rows, strict=True)), strict=True))
            parquet.write_table(pyarrow.table(columns), path)
        found = load(DataConfig(source=str(path), text="body"))
        assert found.records.inputs.tolist() == [text for text, _ in texts()]
        assert (found.taken["text"], found.taken["left out"]) == ("'body'", "'id'")

    def test_one_column_of_text_is_asked_about(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("body,label\n" + "\n".join(f"{text},{label}" for text, label in texts()))
        refuses(DataConfig(source=str(path), devices=2, device_test_records=2), "--text 'body'")

    def test_groups_are_whole(self, tmp_path: Path) -> None:
        records = [{"text": t, "label": c, "who": f"w{row % 40}"} for row, (t, c) in enumerate(texts(320))]
        path = write_lines(tmp_path / "a.jsonl", records)
        found = scenario(path, group="who", public_records=12, proxy_records=12, records_per_device=8)
        assert found.taken["group"] == "field 'who', as set"
        assert found.proxy.dtype == torch.int64

    def test_a_list_of_texts_is_a_source(self) -> None:
        from privkd.data.sources import records_of

        config = DataConfig(source="own:function", **SIZES)
        pairs = ([text for text, _ in texts()], [label for _, label in texts()])
        found = scenario_from(records_of(lambda: pairs, "own", config), config, 0)
        assert found.public.inputs.dtype == torch.int64
        with pytest.raises(DataError, match="the text of record 1 is missing"):
            records_of(lambda: (["a", None], ["x", "y"]), "own", config)


class TestTokenizer:
    def test_only_public_text_decides(self, tmp_path: Path) -> None:
        """Private records may be anything: what everybody sees stays as it is."""
        path = lines(tmp_path)
        before = scenario(path)
        config = DataConfig(source=str(path), **SIZES)
        source = load(config)
        sets = [part.inputs for part in (before.public, before.validation, before.test)]
        public = {tuple(row) for part in (*sets, before.proxy) for row in part.tolist()}
        ids = before.constants.features(source.records.inputs)
        private = [row for row in range(len(ids)) if tuple(ids[row].tolist()) not in public]
        assert len(private) > 20
        for row in private:
            source.records.inputs[row] = "zebra " * 50
        after = scenario_from(source, config, 0)
        assert after.constants == before.constants
        assert torch.equal(after.proxy, before.proxy)

    def test_the_same_text_gives_the_same_bytes_in_any_process(self) -> None:
        script = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_text import texts\n"
            "from privkd.config import DataConfig\n"
            "from privkd.data.tokens import tokens_of_texts\n"
            "print(tokens_of_texts([text for text, _ in texts()], DataConfig())[0].digest)"
        )
        own = tokens_of_texts([text for text, _ in texts()], DataConfig())[0].digest
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == own

    def test_padding_and_length(self) -> None:
        tokens, said = tokens_of_texts(["one two", "three"], DataConfig(length=5))
        ids = tokens.ids(np.array(["one", "", "one " * 40], dtype=object))
        assert ids.shape == (3, 5)
        assert ids[1].tolist() == [0] * 5
        assert bool((ids[2] > 0).all())
        assert "the first 5 of each text" in said

    def test_no_text_is_unknown_and_none_is_padding(self) -> None:
        tokens, _ = tokens_of_texts(["plain words"], DataConfig(length=64))
        ids = tokens.ids(np.array(["\u65e5\u672c [PAD] \U0001f600"], dtype=object))[0]
        content = int((ids > 0).sum())
        assert content > 10
        assert bool((ids[:content] > 0).all()), "a text that spells the padding is no padding"
        assert int(ids.max()) < tokens.vocabulary

    def test_one_is_brought_along(self, tmp_path: Path) -> None:
        tokens, _ = tokens_of_texts([text for text, _ in texts()], DataConfig(length=9))
        assert tokens.tokenizer is not None
        path = tmp_path / "tokenizer.json"
        path.write_text(tokens.tokenizer, encoding="utf-8")
        found = scenario(lines(tmp_path), tokenizer=path, length=9)
        assert found.constants.tokens == tokens
        path.write_text("{}")
        refuses(DataConfig(source=str(lines(tmp_path)), tokenizer=path, **SIZES), "not a readable tokenizer")
        refuses(DataConfig(source=str(lines(tmp_path)), tokenizer=tmp_path / "none", **SIZES), "not readable")

    def test_one_whose_id_0_is_no_padding_is_refused(self, tmp_path: Path) -> None:
        library = pytest.importorskip("tokenizers")
        path = tmp_path / "tokenizer.json"
        library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
        refuses(DataConfig(source=str(lines(tmp_path)), tokenizer=path, **SIZES), "id 0 is 'a'", "[PAD]")

    def test_settings_of_text_are_for_text(self) -> None:
        refuses(DataConfig(vocabulary=100), "data.vocabulary", "neither text nor")
        refuses(DataConfig(tokens=True), "data.tokens")
        refuses(DataConfig(text="a"), "data.text")


class TestTokenIds:
    def source(self, folder: Path, ids: np.ndarray) -> Path:
        path = folder / "a.npz"
        np.savez(path, x=ids, y=np.arange(len(ids)) % 2)
        return path

    def test_whole_numbers_stay_what_they_are(self, tmp_path: Path) -> None:
        """2**24 + 1 is no float32."""
        ids = np.arange(160 * 6).reshape(160, 6) + 2**24 + 1
        found = scenario(self.source(tmp_path, ids), tokens=True, vocabulary=2**20)
        assert found.public.inputs.dtype == torch.int64
        tokens = Tokens(2**25, 6)
        assert torch.equal(tokens.ids(ids), torch.from_numpy(ids))

    def test_larger_ones_are_unknown(self, tmp_path: Path) -> None:
        ids = np.ones((160, 4), dtype=np.int64)
        source = load(DataConfig(source=str(self.source(tmp_path, ids)), tokens=True))
        public = np.arange(40)
        source.records.inputs[100:] = 77
        constants = find_constants(source, public, DataConfig(source="own", tokens=True))
        assert constants.vocabulary == 3
        assert constants.features(source.records.inputs)[120].tolist() == [2] * 4
        assert constants.features(source.records.inputs)[0].tolist() == [1] * 4

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        floats = self.source(tmp_path, np.ones((160, 4)))
        refuses(DataConfig(source=str(floats), tokens=True), "whole numbers [record, position]", "float64")
        negative = self.source(tmp_path, np.full((160, 4), -1))
        refuses(DataConfig(source=str(negative), tokens=True), "token id -1 is negative")


def test_the_style_gap_is_refused(tmp_path: Path) -> None:
    refuses(DataConfig(source=str(lines(tmp_path)), **{**SIZES, "gap": "style"}), "gap='style'")


def test_the_embedded_texts_are_balanced_and_apart() -> None:
    from privkd.data.docstrings import EACH, LIBRARIES

    source = load(DataConfig(source="docstrings"))
    labels, counts = np.unique(source.records.labels, return_counts=True)
    assert labels.tolist() == sorted(LIBRARIES)
    assert counts.tolist() == [EACH] * len(LIBRARIES)
    texts_ = source.records.inputs.tolist()
    assert len(set(texts_)) > 0.99 * len(texts_)
