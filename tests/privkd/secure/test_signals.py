"""What ends a run with services ends them too, and none of their keys and sealed uploads stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import SMALL

SETTINGS = (*SMALL, "channel.kind=secure", "channel.parties=services", "rounds=3")
SECONDS = 120.0


def command(*arguments: str, temporary: Path) -> "subprocess.Popen[str]":
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "privkd", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def left(temporary: Path) -> list[str]:
    """The files: libraries leave empty folders of their own."""
    return sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())


def await_uploads(temporary: Path, process: "subprocess.Popen[str]") -> list[int]:
    """Until a round holds sealed uploads; the services' processes."""
    until, log = time.monotonic() + SECONDS, "privkd-parties-*/state-0/rounds/*/uploads"
    while not any(path.stat().st_size for path in temporary.glob(log)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    assert list(temporary.glob("privkd-parties-*/*.key"))
    processes = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in processes if _parent(pid) == process.pid]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_of_a_round_leaves_nothing_and_the_run_resumes(
    tmp_path: Path, number: signal.Signals
) -> None:
    temporary, run = tmp_path / "temporary", tmp_path / "run"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    process = command("train", "--out", str(run), *settings, temporary=temporary)
    children = await_uploads(temporary, process)
    process.send_signal(number)
    time.sleep(0.05)
    if number is not signal.SIGINT:
        process.send_signal(signal.SIGHUP)  # as a terminal does that closes
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "stopped; nothing more was spent, and --resume goes on" in " ".join(error.split())
    assert len(children) == 2
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children)
    assert left(temporary) == []
    if number is signal.SIGTERM:
        again = command("train", "--resume", str(run), temporary=temporary)
        error = again.communicate(timeout=SECONDS)[1]
        assert again.returncode == 0, error
        assert left(temporary) == []


def test_whoever_is_killed_has_the_services_tidy_up(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    process = command("train", "--out", str(tmp_path / "run"), *settings, temporary=temporary)
    children = await_uploads(temporary, process)
    process.kill()
    process.communicate()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in children):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.05)
    assert left(temporary) == []


@pytest.mark.slow
def test_a_service_that_is_told_to_end_alone_leaves_the_others_files(tmp_path: Path) -> None:
    """It is started again, and takes up what it had."""
    temporary = tmp_path / "temporary"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    process = command("train", "--out", str(tmp_path / "run"), *settings, temporary=temporary)
    children = await_uploads(temporary, process)
    os.kill(children[0], signal.SIGTERM)
    error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, error
    assert left(temporary) == []
