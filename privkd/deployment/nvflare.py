"""The one door to NVFlare: an executor beside a device, a controller beside the cloud. Both carry bytes.

NVFlare loads them by name, in a process of its own for each job: this module imports neither torch nor numpy.
Where the sockets are says each site's environment, never the job, so that a server can reach nothing else.
"""

import os
import time
from contextlib import suppress
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply

from privkd.deployment.desk import leave, missing, question
from privkd.deployment.sockets import call

DEVICE_SOCKET, CLOUD_SOCKET = "PRIVKD_DEVICE_SOCKET", "PRIVKD_CLOUD_SOCKET"
_TASK, _QUESTION, _ANSWER = "round", "question", "answer"
_SECONDS = 86_400.0
"""The longest that a device may train before its courier gives up."""
_PAUSE = 0.5
"""Between two looks: of the controller at the desk, of the executor for a device that is away."""


class Courier(Executor):
    """Beside a device: bytes of a task to its socket, and the answer back. No word of an error leaves."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: Any, abort_signal: Any) -> Shareable:
        """The device's answer; one that is away is tried again until the job ends, as it answers alike."""
        message = shareable.get(_QUESTION)
        if task_name != _TASK or not isinstance(message, bytes):
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        while not abort_signal.triggered:
            with suppress(OSError):
                reply = make_reply(ReturnCode.OK)
                reply[_ANSWER] = call(os.environ[DEVICE_SOCKET], message, _SECONDS)
                return reply
            time.sleep(_PAUSE)
        return make_reply(ReturnCode.TASK_ABORTED)


class Rounds(Controller):
    """Beside the cloud: a task for each question that lies on its desk, and the answers back to it."""

    def __init__(self, ticket: str) -> None:
        """``ticket`` names the questions that this job is for."""
        super().__init__(task_check_period=0.1)
        self._ticket = ticket
        self._desk = os.environ.get(CLOUD_SOCKET, "")

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing is to be prepared."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Leave no task."""
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Send to those of this job, until all have answered or are lost, or the cloud wants no more."""
        own = {client.name for client in fl_ctx.get_engine().get_clients()}
        with suppress(OSError):
            tasks = [self._sent(name, fl_ctx) for name in missing(self._desk, self._ticket) if name in own]
            while not abort_signal.triggered and any(task.completion_status is None for task in tasks):
                if not missing(self._desk, self._ticket):
                    return
                time.sleep(_PAUSE)

    def _sent(self, device: str, fl_ctx: Any) -> Task:
        # The question is collected where the device comes for it, so that the cloud knows who did.
        task = Task(_TASK, Shareable(), before_task_sent_cb=self._collect, result_received_cb=self._received)
        self.send(task, fl_ctx, targets=[device])
        return task

    def _collect(self, client_task: ClientTask, fl_ctx: Any) -> None:
        asked = question(self._desk, self._ticket, client_task.client.name)
        client_task.task.data[_QUESTION] = asked

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: Any
    ) -> None:
        """What comes late is left too; the desk knows whether it is still wanted."""
        self._leave(client.name, result)

    def _received(self, client_task: ClientTask, fl_ctx: Any) -> None:
        self._leave(client_task.client.name, client_task.result)

    def _leave(self, device: str, result: Any) -> None:
        if isinstance(result, Shareable) and isinstance(answer := result.get(_ANSWER), bytes):
            with suppress(OSError):
                leave(self._desk, self._ticket, device, answer)
