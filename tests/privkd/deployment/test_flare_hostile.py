"""A cloud that wants more than to be carried: its server forbids nothing, and what devices forbid holds.

The third device keeps NVFlare's own policy, and shows that each attack would have worked.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare")
pytest.importorskip("psutil")

from flare_rig import DEVICES, FlareRig

from privkd.deployment.kits import nvflare

pytestmark = pytest.mark.slow
GUARDED, OPEN = DEVICES[:2], DEVICES[2]
UNLISTED = "nvflare.app_common.executors.error_handling_executor.ErrorHandlingExecutor"
CODE = """
import time
from pathlib import Path
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller

class Thief(Executor):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def handle_event(self, event, fl_ctx):
        (Path(self.folder) / fl_ctx.get_identity_name()).touch()

    def execute(self, *arguments):
        pass

class Patient(Controller):
    def start_controller(self, fl_ctx):
        pass

    def stop_controller(self, fl_ctx):
        pass

    def control_flow(self, abort_signal, fl_ctx):
        time.sleep(15)
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[FlareRig]:
    rig = FlareRig()
    try:
        policy = rig.kit("cloud") / "local"
        resources = json.loads((policy / "resources.json").read_text())
        default = json.loads((policy / "resources.json.default").read_text())
        receiver = [one for one in default["components"] if one["id"] == "log_receiver"]
        resources |= {"class_allow_list": ["*"], "allow_log_streaming": True}
        resources["components"] += receiver
        (policy / "resources.json").write_text(json.dumps(resources))
        rights = {"format_version": "1.0", "permissions": {"lead": "any"}}
        (policy / "authorization.json").write_text(json.dumps(rights))
        for ours in (rig.kit(OPEN) / "local").glob("*.json"):
            ours.unlink()
        rig.start_all("cloud", OPEN)
        assert all(rig.until("cloud", f"New client {name}@") for name in DEVICES)
        yield rig
    finally:
        rig.close()


def submit(rig: FlareRig, folder: Path, executor: str, arguments: dict[str, Any], *, code: str = "") -> None:
    """Submit a job that names ``executor`` to every device, with code of its own if there is any."""
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    if code:
        (folder / "app" / "custom").mkdir()
        (folder / "app" / "custom" / "thief.py").write_text(code)
    common = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    one = {"tasks": ["round"], "executor": {"path": executor, "args": arguments}}
    flow = {"id": "x", "path": "thief.Patient" if code else "privkd.deployment.nvflare.Rounds", "args": {}}
    if not code:
        flow["args"] = {"ticket": "none"}
    (folder / "meta.json").write_text(
        json.dumps({"name": "x", "min_clients": 1, "deploy_map": {"app": ["server", *DEVICES]}})
    )
    (config / "config_fed_client.json").write_text(json.dumps(common | {"executors": [one]}))
    (config / "config_fed_server.json").write_text(json.dumps(common | {"workflows": [flow]}))
    startup = str(rig.base / "cloud" / "operator" / "startup")
    nvflare("job", "submit", "-j", str(folder), "--startup-kit", startup)


def soon(found: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Whether it comes true within ``seconds``."""
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.5)
    return found()


def test_code_of_a_job_runs_on_no_device_that_has_our_policy(hostile: FlareRig) -> None:
    stolen = hostile.base / "stolen"
    stolen.mkdir()
    stolen.chmod(0o777)
    submit(hostile, hostile.base / "job-code", "thief.Thief", {"folder": str(stolen)}, code=CODE)
    assert soon(lambda: (stolen / OPEN).exists()), "the attack is none"
    assert hostile.until("cloud", f"to be deployed to the clients: {','.join(DEVICES)} ")
    assert hostile.until("cloud", f"for clients: {OPEN}\n")
    assert hostile.until("cloud", "Server app stopped")
    assert [path.name for path in stolen.iterdir()] == [OPEN]


def test_a_class_that_is_not_listed_is_refused_and_no_word_of_it_leaves(hostile: FlareRig) -> None:
    submit(hostile, hostile.base / "job-class", UNLISTED, {})
    assert all(hostile.until(name, "is not in allow_list") for name in DEVICES)
    server = hostile.kit("cloud")
    assert soon(lambda: any(server.rglob(f"*{OPEN}*"))), "no log was streamed at all"
    assert any(b"Traceback" in path.read_bytes() for path in server.rglob(f"*{OPEN}*"))
    files = [path for path in server.rglob("*") if path.is_file()]
    for name in GUARDED:
        # A device's tracebacks name its folders.
        assert not [path for path in files if f"{name}/kit".encode() in path.read_bytes()]
        assert not list(server.rglob(f"*LOG*{name}*"))
        assert f"{name}/kit" not in hostile.log("cloud")
