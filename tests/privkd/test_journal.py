import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privkd.errors import RunError
from privkd.journal import Head, Journal

RECORDS = [{"n": 0, "text": "zürich"}, {"n": 1, "list": [1.5, None, True]}, {"n": 2}, {"n": 3}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    for record in RECORDS:
        journal.append(record)
    return file


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_records_survive(path: Path) -> None:
    journal = Journal(path)
    assert list(journal) == RECORDS
    assert len(journal) == len(RECORDS)
    journal.append({"n": 4})
    assert list(Journal(path)) == [*RECORDS, {"n": 4}] == list(journal)


def test_every_line_is_json(path: Path) -> None:
    assert [json.loads(line)["record"] for line in lines(path)] == RECORDS


def test_no_file_is_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new.jsonl")
    assert list(journal) == []
    assert not journal.path.exists()


def test_creation_leaves_nothing_else_behind(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]


def test_a_torn_last_line_is_dropped_wherever_it_is_cut(path: Path) -> None:
    whole = path.read_bytes()
    last = lines(path)[-1]
    for kept in range(1, len(last)):
        path.write_bytes(whole[: -len(last) + kept])
        journal = Journal(path)
        assert list(journal) == RECORDS[:-1]
    journal.append({"n": "new"})
    assert list(Journal(path)) == [*RECORDS[:-1], {"n": "new"}]


def test_reading_leaves_a_torn_tail_alone(path: Path) -> None:
    torn = path.read_bytes() + b'{"chain":"12'
    path.write_bytes(torn)
    Journal(path)
    assert path.read_bytes() == torn


def test_zeros_after_a_power_cut_are_a_torn_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert list(Journal(path)) == RECORDS


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(path: Path, data: st.DataObject) -> None:
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 2))  # without the last newline: that is a torn tail
    value = data.draw(st.integers(0, 255).filter(lambda v: v != whole[at]))
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    number = whole[:at].count(b"\n") + 1
    with pytest.raises(RunError, match=f"line {number}: damaged or altered"):
        Journal(damaged)


@pytest.mark.parametrize(
    ("order", "number"),
    [([1, 2, 3], 1), ([0, 2, 3], 2), ([0, 2, 1, 3], 2), ([0, 1, 1, 2], 3), ([0, 1, 3], 3), ([3], 1)],
    ids=str,
)
def test_removed_swapped_and_repeated_lines_are_found(path: Path, order: list[int], number: int) -> None:
    every = lines(path)
    path.write_bytes(b"".join(every[i] for i in order))
    with pytest.raises(RunError, match=f"line {number}:"):
        Journal(path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b'{"chain":"12', b"\x00" * 300, b"[" * 100_000 + b"\n", b"\xff\n"]
)
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunError, match="line 1"):
        Journal(path)


def test_a_forged_first_line_of_nested_json_is_refused(path: Path) -> None:
    every = lines(path)
    start, end = every[0].split(b'"record":')[0], b"}\n"
    path.write_bytes(start + b'"record":' + b"[" * 100_000 + end)
    with pytest.raises(RunError, match="line 1"):
        Journal(path)


def test_lines_cut_off_the_end_show_against_a_head(path: Path) -> None:
    heads = [Journal(path).head]
    every = lines(path)
    path.write_bytes(b"".join(every[:2]))
    shorter = Journal(path)
    assert not shorter.has(heads[0])
    assert shorter.has(shorter.head)
    assert shorter.has(Head(1, json.loads(every[0])["chain"]))
    assert not shorter.has(Head(1, json.loads(every[1])["chain"]))
    assert not shorter.has(Head(0, "0" * 64))
    assert not shorter.has(Head(-1, json.loads(every[1])["chain"]))


def test_an_empty_journal_is_continued_by_any(path: Path, tmp_path: Path) -> None:
    assert Journal(path).has(Journal(tmp_path / "none").head)


def test_two_writers_are_refused(path: Path) -> None:
    first, second = Journal(path), Journal(path)
    first.append({"n": "first"})
    with pytest.raises(RunError, match="changed"):
        second.append({"n": "second"})
    assert list(Journal(path)) == [*RECORDS, {"n": "first"}]


def test_two_creators_are_refused(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    first.append({"n": "first"})
    with pytest.raises(RunError, match="nothing was recorded"):
        second.append({"n": "second"})
    assert list(Journal(tmp_path / "j")) == [{"n": "first"}]
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_a_file_that_vanished_is_not_started_afresh(path: Path) -> None:
    journal = Journal(path)
    path.unlink()
    with pytest.raises(RunError, match="nothing was recorded"):
        journal.append({"n": 4})
    assert not path.exists()


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    journal = Journal(tmp_path / "j")
    if existing:
        journal.append({"n": 0})
    before = [p.read_bytes() for p in tmp_path.iterdir()]
    really_write = os.write

    def half_then_full(descriptor: int, data: memoryview) -> int:
        really_write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(RunError, match="No space left on device; nothing was recorded"):
            journal.append({"n": 1})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == before
    journal.append({"n": 2})
    assert list(Journal(tmp_path / "j")) == ([{"n": 0}] if existing else []) + [{"n": 2}]


def test_a_failed_sync_is_not_a_success(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="Input/output error"):
            journal.append({"n": 4})
    assert list(Journal(path)) == list(journal) == RECORDS


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: really_write(descriptor, data[:7]))
    Journal(path).append({"n": 4})
    assert list(Journal(path)) == [*RECORDS, {"n": 4}]


def test_the_file_and_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    really_sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(tmp_path / "j")
    journal.append({"n": 0})
    file, folder = (tmp_path / "j").stat().st_ino, tmp_path.stat().st_ino
    assert synced == [file, folder]
    journal.append({"n": 1})
    assert synced == [file, folder, file]


def limited_child(path: Path) -> str:
    """Appends until the operating system refuses to let the file grow."""
    return (
        "import sys; from pathlib import Path\n"
        "from privkd.errors import RunError\n"
        "from privkd.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}))\n"
        "try:\n"
        "    while True:\n"
        "        journal.append({'n': len(journal)}); print(len(journal), flush=True)\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )


def test_a_real_limit_of_the_file_size_is_survived(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    path = tmp_path / "j"
    child = subprocess.run(
        [sys.executable, "-c", limited_child(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    *counts, message = child.stdout.splitlines()
    assert "cannot write to" in message
    assert len(Journal(path)) == int(counts[-1])
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("existing", [True, False])
def test_a_read_only_disk_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    journal = Journal(tmp_path / "j")
    if existing:
        journal.append({"n": 0})

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RunError, match="Read-only file system; nothing was recorded"):
            journal.append({"n": 1})
    assert len(Journal(tmp_path / "j")) == len(journal) == int(existing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="cannot write"):
            Journal(tmp_path / "j").append({"n": 0})
    finally:
        tmp_path.chmod(0o700)


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory; nothing was recorded"):
        Journal(tmp_path / "none" / "j").append({"n": 0})


def test_a_folder_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read"):
        Journal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_cannot_hold_is_a_mistake_of_the_caller(path: Path, value: object) -> None:
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        Journal(path).append({"value": value})
    assert path.read_bytes() == before


def test_a_reader_cannot_change_what_was_recorded(path: Path) -> None:
    journal = Journal(path)
    record = {"n": [4]}
    journal.append(record)
    record["n"].append(5)
    assert list(journal)[-1] == {"n": [4]}
