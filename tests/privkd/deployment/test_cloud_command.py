"""``privkd cloud``, as an operator types it, and the process that it is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sites import NAMES, Site, site

from cli import app
from privkd.deployment.cloud import is_running
from privkd.deployment.cloud_settings import Roster
from privkd.secure.authority import Authority
from privkd.secure.certificates import fingerprint, load_certificate, load_request, name_of, request

SAYS_NOTHING = "patience_seconds = 600"


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        app(["cloud", *words])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def deserted(tmp_path: Path) -> Site:
    """A published cloud to which no device answers for a long time."""
    return site(tmp_path, change=lambda text: text.replace("patience_seconds = 60", SAYS_NOTHING))


def test_from_nothing_to_a_published_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(capsys, "init")[0] == 0
    text = Path("cloud.toml").read_text().replace('kind = "secure"', 'kind = "plain"')
    Path("cloud.toml").write_text(text)
    assert typed(capsys, "publish")[2].startswith("privkd: ")
    for name in NAMES:
        assert typed(capsys, "enrol", name)[0] == 0
    code, out, _ = typed(capsys, "publish")
    assert code == 0
    name = out.splitlines()[0].removeprefix("run ")
    shown = json.loads(typed(capsys, "status", "--json")[1])
    assert (shown["run"], shown["enrolled"], shown["done"]) == (name, [*NAMES], 0)
    assert (shown["asked"], shown["running"], shown["finished"]) == (None, False, False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--config", "nowhere.toml"), "privkd cloud init"),
        (("enrol", "../ada"), "device '../ada'"),
        (("run", "--rounds", "0"), "rounds=0"),
        (("stop",), "no cloud is running"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    typed(capsys, "init")
    code, _, err = typed(capsys, *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_status_says_which_certificates_end_soon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stem, days in (("soon", 10), ("late", 300)):
        Authority.create(tmp_path / stem, days=days).issue(tmp_path, stem, name=stem)
    found = site(tmp_path)
    for name, stem in (("ada", "soon"), ("bob", "late"), ("cy", "nowhere")):
        typed(capsys, "enrol", name, "--certificate", f"{tmp_path / stem}.pem", "--config", f"{found.config}")
    shown = json.loads(typed(capsys, "status", "--json", "--config", f"{found.config}")[1])
    ending = {row["of"]: row["days"] for row in shown["ending"]}
    assert set(ending) == {"ada", "cy"}
    assert 9 < ending["ada"] < 10
    assert ending["cy"] is None


def test_a_request_is_approved_and_enrolled_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed(capsys, "init")
    Authority.create(tmp_path / "authority")
    asked = str(request("ada", tmp_path / "ada"))
    for words, said in (
        (("bob", "--request", asked), "the request of ada, not of bob"),
        (("ada", "--request", asked, "--fingerprint", "00"), "not 00"),
        (("ada", "--request", asked, "--authority", "nowhere"), "nowhere"),
    ):
        code, _, err = typed(capsys, "enrol", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert not Path("roster.json").exists(), "who is refused is not enrolled"
    told = fingerprint(load_request(Path(asked)).key)
    for _ in range(2):
        code, out, _ = typed(capsys, "enrol", "ada", "--request", asked, "--fingerprint", told)
        assert (code, told in out, "ada is device 0 of 1" in out) == (0, True, True)
    (enrolled,) = Roster.at(Path("roster.json")).devices
    assert enrolled.certificate == tmp_path / "authority" / "issued" / "ada.pem"
    assert name_of(load_certificate(enrolled.certificate)) == "ada"
    other = str(request("ada", tmp_path / "other"))
    assert "another key" in typed(capsys, "enrol", "ada", "--request", other)[2]


def test_over_nvflare_a_name_has_no_dot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed(capsys, "init")
    assert typed(capsys, "enrol", "ward.7")[0] == 0
    text = Path("cloud.toml").read_text().replace('engine = "socket"', 'engine = "nvflare"')
    Path("cloud.toml").write_text(text)
    code, _, err = typed(capsys, "enrol", "ward.8")
    assert (code, err.count("\n")) == (2, 1)
    assert "over NVFlare, letters, digits, - and _ alone" in err
    assert typed(capsys, "enrol", "ward-8")[0] == 0


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_while_it_waits_goes_on_later(deserted: Site, blow: signal.Signals) -> None:
    """Charges are booked by then and nobody has answered: the round is asked again, and is charged once."""
    code = "import sys; from privkd.__main__ import main; sys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, "cloud", "run", "--config", str(deserted.config)]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment,
        # A shell has what it runs in the background ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "asking 3 devices" in line:
            break
    assert is_running(deserted.folder)
    time.sleep(0.5)
    process.send_signal(blow)
    said = process.stderr.read()
    assert process.wait(60) == (-9 if blow is signal.SIGKILL else 130)
    lines = [line for line in said.splitlines() if line.startswith("privkd: ")]
    assert "Traceback" not in said
    assert len(lines) == (blow is not signal.SIGKILL)
    assert all("privkd cloud run --config" in line for line in lines)
    assert not is_running(deserted.folder)
    done = deserted.run()
    assert [release.devices for release in deserted.releases()] == [NAMES, NAMES]
    assert {row.parties for row in done.result.ledger} == {3}
