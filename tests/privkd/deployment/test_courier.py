"""NVFlare's two classes and the carrier, with no engine behind them; kits, policies and commands."""

import json
import os
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("nvflare")

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from cli import app
from privkd.deployment import flare, kits
from privkd.deployment.carriers import Carrier
from privkd.deployment.desk import Desk, leave, missing, question
from privkd.deployment.flare import FlareCarrier, courier_command
from privkd.deployment.nvflare import Courier, Rounds
from privkd.deployment.sockets import Door
from privkd.errors import ConfigError, RunError

DEFAULTS = {
    "allow_log_streaming": True,
    "class_allow_list": ["nvflare.everything"],
    "components": [
        {"id": "job_manager", "args": {"uri_root": "/tmp/jobs"}},
        {"id": "site_log_streamer"},
        {"id": "log_receiver"},
    ],
    "servers": [{"max_num_clients": 100, "heart_beat_timeout": 600}],
    "snapshot_persistor": {"args": {"storage": {"args": {"root_dir": "/tmp/snapshots"}}}},
}


class TestCourier:
    def asked(self, content: Any, task: str = "round", signal: Signal | None = None) -> Shareable:
        data = Shareable()
        data["question"] = content
        return Courier().execute(task, data, None, signal or Signal())

    def test_bytes_go_to_the_sites_own_socket_and_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        door = Door(tmp_path / "device.sock", lambda message: message[::-1])
        monkeypatch.setenv("PRIVKD_DEVICE_SOCKET", str(door.path))
        reply = self.asked(b"abc")
        assert (reply.get_return_code(), reply["answer"]) == (ReturnCode.OK, b"cba")
        door.close()

    def test_a_device_that_is_away_is_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "device.sock"
        monkeypatch.setenv("PRIVKD_DEVICE_SOCKET", str(path))
        doors: list[Door] = []
        timer = threading.Timer(0.3, lambda: doors.append(Door(path, lambda message: message)))
        timer.start()
        assert self.asked(b"abc")["answer"] == b"abc"
        timer.join()
        doors[0].close()

    def test_a_job_that_ends_ends_the_trying(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PRIVKD_DEVICE_SOCKET", str(tmp_path / "nobody.sock"))
        signal = Signal()
        timer = threading.Timer(0.3, signal.trigger, [True])
        timer.start()
        assert self.asked(b"abc", signal=signal).get_return_code() == ReturnCode.TASK_ABORTED
        timer.join()

    @pytest.mark.parametrize(("content", "task"), [("text", "round"), (None, "round"), (b"x", "train")])
    def test_what_is_no_question_reaches_no_device(
        self, content: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[bytes] = []

        def note(message: bytes) -> bytes:
            asked.append(message)
            return b""

        door = Door(tmp_path / "device.sock", note)
        monkeypatch.setenv("PRIVKD_DEVICE_SOCKET", str(door.path))
        assert self.asked(content, task).get_return_code() == ReturnCode.TASK_UNSUPPORTED
        door.close()
        assert not asked


class Played(Rounds):
    """A controller whose engine plays the devices: ``online`` answer, ``joined`` are in the job."""

    def __init__(self, ticket: str, joined: list[str], online: list[str]) -> None:
        super().__init__(ticket)
        self.online = online
        clients = [SimpleNamespace(name=name) for name in joined]
        self.context = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_clients=lambda: clients))

    def send(self, task: Any, fl_ctx: Any, targets: Any = None, **_: Any) -> None:
        (name,) = targets
        if name not in self.online:
            return
        client_task = SimpleNamespace(task=task, client=SimpleNamespace(name=name), result=Shareable())
        task.before_task_sent_cb(client_task, fl_ctx)
        client_task.result["answer"] = b"re: " + task.data["question"]
        task.result_received_cb(client_task, fl_ctx)
        task.completion_status = "ok"


class TestRounds:
    @pytest.fixture
    def desk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
        path = tmp_path / "cloud.sock"
        monkeypatch.setenv("PRIVKD_CLOUD_SOCKET", str(path))
        desk = Desk(path)
        desk.lay_out({"a": b"1", "b": b"2"})
        return desk

    def test_each_device_is_asked_its_own_and_answers_reach_the_desk(self, desk: Desk) -> None:
        job = Played(desk.ticket(), ["a", "b"], ["a", "b"])
        job.control_flow(Signal(), job.context)
        assert desk.clear() == {"a": b"re: 1", "b": b"re: 2"}

    def test_a_device_outside_the_job_stays_uncollected(self, desk: Desk) -> None:
        job = Played(desk.ticket(), ["b"], ["a", "b"])
        job.control_flow(Signal(), job.context)
        assert desk.uncollected() == ["a"]

    def test_it_ends_with_the_ask(self, desk: Desk) -> None:
        job = Played(desk.ticket(), ["a", "b"], [])
        timer = threading.Timer(0.3, desk.clear)
        timer.start()
        job.control_flow(Signal(), job.context)
        timer.join()

    def test_it_ends_where_the_cloud_is_away(self, desk: Desk) -> None:
        job = Played(desk.ticket(), ["a"], [])
        desk.close()
        job.control_flow(Signal(), job.context)

    def test_what_comes_late_is_left_while_it_is_wanted(self, desk: Desk) -> None:
        job = Rounds(desk.ticket())
        result = Shareable()
        result["answer"] = b"late"
        job.process_result_of_unknown_task(SimpleNamespace(name="a"), "round", "", result, None)
        assert desk.missing() == ["b"]

    def test_a_result_without_bytes_is_none(self, desk: Desk) -> None:
        job = Rounds(desk.ticket())
        for result in (None, Shareable(), Shareable({"answer": "text"})):
            job.process_result_of_unknown_task(SimpleNamespace(name="a"), "round", "", result, None)
        assert desk.missing() == ["a", "b"]


class Engine:
    """NVFlare's commands: it takes jobs after ``refusals``, and runs each with whoever is online."""

    def __init__(self, path: Path, refusals: int = 0) -> None:
        self.path, self.refusals = str(path), refusals
        self.online: list[list[str]] = []
        self.jobs: list[dict[str, Any]] = []
        self.removed: list[str] = []

    def __call__(self, *words: str, seconds: float = 0.0) -> Mapping[str, Any]:
        if words[1] != "submit":
            self.removed += [words[3]] if words[1] == "delete" else []
            return {}
        if self.refusals:
            self.refusals -= 1
            raise RunError("the server is away")
        folder = Path(words[words.index("-j") + 1])
        meta = json.loads((folder / "meta.json").read_text())
        server = json.loads((folder / "app" / "config" / "config_fed_server.json").read_text())
        ticket = server["workflows"][0]["args"]["ticket"]
        self.jobs.append(meta)
        for name in self.online.pop(0):
            if name in missing(self.path, ticket):
                leave(self.path, ticket, name, question(self.path, ticket, name).upper())
        return {"job_id": str(len(self.jobs))}


class TestCarrier:
    @pytest.fixture
    def operator(self, tmp_path: Path) -> Path:
        (tmp_path / "operator" / "startup").mkdir(parents=True)
        (tmp_path / "operator" / "startup" / "fed_admin.json").write_text("{}")
        return tmp_path / "operator"

    @pytest.fixture
    def engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
        engine = Engine(tmp_path / "cloud.sock")
        monkeypatch.setattr(flare, "nvflare", engine)
        monkeypatch.setattr(flare, "_PAUSE", 0.05)
        monkeypatch.setattr(flare, "_GRACE", 0.2)
        return engine

    def test_one_job_for_all_and_none_once_all_have_answered(self, operator: Path, engine: Engine) -> None:
        carrier: Carrier = FlareCarrier(Path(engine.path), operator)
        engine.online = [["a", "b"], ["a"]]
        assert carrier.ask({"a": b"x", "b": b"y"}, 30.0) == {"a": b"X", "b": b"Y"}
        assert carrier.ask({"a": b"z"}, 30.0) == {"a": b"Z"}
        assert [job["deploy_map"]["app"] for job in engine.jobs] == [["server", "a", "b"], ["server", "a"]]
        assert all(job["min_clients"] == 1 for job in engine.jobs)
        assert engine.removed == ["1"], "a job that ended is not left at the server"
        assert carrier.ask({}, 30.0) == {}
        carrier.close()

    def test_who_was_away_is_put_in_a_job_of_its_own(self, operator: Path, engine: Engine) -> None:
        carrier = FlareCarrier(Path(engine.path), operator)
        engine.online = [["a"], ["b"]]
        assert carrier.ask({"a": b"x", "b": b"y"}, 30.0) == {"a": b"X", "b": b"Y"}
        assert engine.jobs[1]["deploy_map"]["app"] == ["server", "b"]
        carrier.close()

    def test_jobs_that_were_lost_are_replaced(
        self, operator: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flare, "_QUIET", 0.3)
        carrier = FlareCarrier(Path(engine.path), operator)
        engine.online = [[], ["a"]]
        assert carrier.ask({"a": b"x"}, 30.0) == {"a": b"X"}
        assert engine.removed == ["1"], "a device that comes back finds one job, not all of them"
        carrier.close()

    def test_a_server_that_is_away_is_tried_again(
        self, operator: Path, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        carrier = FlareCarrier(Path(engine.path), operator)
        engine.refusals, engine.online = 2, [["a"]]
        assert carrier.ask({"a": b"x"}, 30.0) == {"a": b"X"}
        assert "the server is away" in caplog.text
        carrier.close()

    def test_time_brings_what_came_and_takes_the_job_back(self, operator: Path, engine: Engine) -> None:
        carrier = FlareCarrier(Path(engine.path), operator)
        engine.online = [["a"], [], []]
        assert carrier.ask({"a": b"x", "b": b"y"}, 1.0) == {"a": b"X"}
        assert engine.removed == [str(number + 1) for number in range(len(engine.jobs))]
        carrier.close()

    def test_no_kit_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no operator's kit"):
            FlareCarrier(tmp_path / "cloud.sock", tmp_path)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (tmp_path / "kit" / "local").mkdir(parents=True)
    (tmp_path / "kit" / "startup").mkdir()
    (tmp_path / "kit" / "local" / "resources.json.default").write_text(json.dumps(DEFAULTS))
    return tmp_path / "kit"


class TestPolicy:
    @pytest.mark.parametrize(("role", "listed"), [("client", "Courier"), ("server", "Rounds")])
    def test_one_class_no_code_no_logs_no_commands(self, kit: Path, role: str, listed: str) -> None:
        (kit / "startup" / f"fed_{role}.json").write_text("{}")
        (kit / "local" / "resources.json").write_text('{"class_allow_list": ["*"]}')
        kits.enforce(kit)
        resources = json.loads((kit / "local" / "resources.json").read_text())
        assert resources["class_allow_list"] == [f"privkd.deployment.nvflare.{listed}"]
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["allow_log_streaming"] is False
        assert [one["id"] for one in resources["components"]] == ["job_manager"]
        rights = json.loads((kit / "local" / "authorization.json").read_text())["permissions"]
        forbidden = {"byoc", "shell_commands", "operate", "clone_job", "download_job"}
        assert {rights[role][right] for role in rights for right in forbidden} == {"none"}
        assert [role for role in rights if rights[role]["submit_job"] == "any"] == ["lead"]
        handlers = json.loads((kit / "local" / "log_config.json").read_text())["handlers"]
        assert not [one for one in handlers.values() if "filename" in one], "a log that could be sent away"

    def test_a_device_shows_the_operator_nothing(self, kit: Path) -> None:
        rights = kits.device_policy(kit)["authorization.json"]["permissions"]
        assert {rights[role]["view"] for role in rights} == {"none"}

    def test_the_servers_jobs_lie_in_its_kit_and_it_takes_a_fleet(self, kit: Path) -> None:
        resources = kits.server_policy(kit)["resources.json"]
        assert "/tmp/jobs" not in json.dumps(resources)
        assert "/tmp/snapshots" not in json.dumps(resources)
        assert resources["servers"][0]["max_num_clients"] >= 10_000

    def test_the_listed_classes_exist(self) -> None:
        assert f"{Courier.__module__}.{Courier.__qualname__}" == kits.COURIER_CLASS
        assert f"{Rounds.__module__}.{Rounds.__qualname__}" == kits.ROUNDS_CLASS


class TestCommand:
    def test_a_devices_kit_and_a_servers(self, kit: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no courier's kit"):
            courier_command(kit, tmp_path / "s")
        (kit / "startup" / "fed_client.json").write_text('{"client": {"fqsn": "clinic-7"}}')
        command, own = courier_command(kit, tmp_path / "s")
        assert {"uid=clinic-7", "secure_train=true"} <= set(command)
        assert own == {"PRIVKD_DEVICE_SOCKET": str(tmp_path / "s")}
        (kit / "startup" / "fed_client.json").rename(kit / "startup" / "fed_server.json")
        command, own = courier_command(kit, tmp_path / "s")
        assert "nvflare.private.fed.app.server.server_train" in command
        assert own == {"PRIVKD_CLOUD_SOCKET": str(tmp_path / "s")}

    def test_run_forgets_old_jobs_and_becomes_it(
        self, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (kit / "startup" / "fed_client.json").write_text('{"client": {"fqsn": "clinic-7"}}')
        old = kit / "48e2bfba-1b5a-4a5f-ae86-fb765628045b"
        old.mkdir()
        become: list[Any] = []
        monkeypatch.setattr(os, "execve", lambda *arguments: become.append(arguments))
        flare.run_courier(kit, tmp_path / "s")
        assert not old.exists()
        assert (kit / "local" / "resources.json").exists()
        assert become[0][2]["PYTHONSAFEPATH"] == "1"

    def test_without_nvflare_the_cure_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kits, "find_spec", lambda name: None)
        found = CliRunner().invoke(app, ["courier", "request", "clinic-7", "--out", str(tmp_path / "r")])
        assert found.exit_code == 2
        assert found.output.strip().endswith("pip install 'privkd[nvflare]'")

    @pytest.mark.parametrize("name", ["", "../up", "a.b", "a b", "x" * 64, "-a"])
    def test_a_name_that_makes_no_certificate_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="letters, digits"):
            kits.request(name, tmp_path)


@pytest.mark.slow
class TestCertificates:
    def test_keys_stay_where_they_were_made(self, tmp_path: Path) -> None:
        made = kits.make_authority(tmp_path / "cloud", "localhost", 8443)
        asked = kits.request("clinic-7", tmp_path / "device" / "request")
        signed = kits.approve(asked, tmp_path / "cloud")
        kit = kits.package(signed, asked.parent, made.fingerprint, tmp_path / "device" / "kit")
        key = (tmp_path / "device" / "request" / "clinic-7.key").read_bytes()
        assert (kit / "startup" / "client.key").read_bytes() == key
        assert b"PRIVATE" in key
        for travelled in (asked, signed):
            assert b"PRIVATE" not in contents(travelled)
        for secret in (*tmp_path.rglob("*.key"),):
            assert secret.stat().st_mode & 0o077 == 0
        assert json.loads((kit / "local" / "resources.json").read_text())["allow_log_streaming"] is False
        with pytest.raises(RunError, match="exists already"):
            kits.make_authority(tmp_path / "cloud", "localhost", 8443)
        wrong = made.fingerprint[:-2] + ("00" if made.fingerprint[-2:] != "00" else "11")
        with pytest.raises(RunError, match="ingerprint"):
            kits.package(signed, asked.parent, wrong, tmp_path / "device" / "other")

    def test_a_request_for_more_than_a_device_is_not_signed(self, tmp_path: Path) -> None:
        kits.make_authority(tmp_path / "cloud", "localhost", 8443)
        participant = {"name": "x@y.org", "type": "admin", "org": "cloud", "role": "lead"}
        asked = kits._request(participant, tmp_path / "request")
        with pytest.raises(ConfigError, match="not for a device's"):
            kits.approve(asked, tmp_path / "cloud")


def contents(path: Path) -> bytes:
    with zipfile.ZipFile(path) as packed:
        return b"".join(packed.read(name) for name in packed.namelist())
