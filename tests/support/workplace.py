"""A project with a queue of its own on a real broker."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from kombu import Connection, Queue

from tests.support.basics import CHILDREN, DEADLINE, python_child
from tests.support.cutting_proxy import CuttingProxy
from tests.support.worker import Project

BROKERS = {
    "redis": "redis://127.0.0.1:6379/9",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
}
BACKEND = "redis://127.0.0.1:6379/10"

#: External jobs are traced from their start if signals have receivers; otherwise they take the fast
#: path. The tests hold for both: on Redis the jobs are traced, on RabbitMQ they take the fast path.
OBSERVED = """
import os
os.environ["OBSERVED"] = "1"
"""

CODE = """
from celery_subproc_pool import SubprocTask
app.conf.include = ["ordinary_tasks"]
@app.task(base=SubprocTask, name="do.late", acks_late=True, reject_on_worker_lost=True)
def late(*args): ...
@app.task(name="python.late", acks_late=True, reject_on_worker_lost=True)
def python_late(path, signum):
    import os
    with open(path, "a") as file:
        file.write("run\\n")
    os.kill(os.getpid(), signum)
"""


class Workplace:
    """A project on a queue of its own.

    Arguments:
        directory: the project's.
        broker: the broker's name.
        code: added to the project's.
        proxy: the worker's connection to the broker, if that is to be cut.
        backend_proxy: its connection to the result backend, if that is to be held up.
        conf: added to the configuration.
    """

    def __init__(
        self,
        directory: Path,
        broker: str,
        code: str = "",
        proxy: CuttingProxy | None = None,
        backend_proxy: CuttingProxy | None = None,
        **conf: Any,
    ) -> None:
        self.log = directory / "jobs.log"
        self.log.touch()
        self.broker = broker
        self.queue = f"csp-test-{uuid.uuid4().hex}"
        obeys = {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"]}
        perl = {
            "argv": ["perl", str(CHILDREN / "log_jobs.pl")],
            "tasks": ["perl.it"],
            "env": {"LOG": str(self.log), "MEET": "4"},
        }
        full = {
            "subproc_pool": {"children": {"obeys": obeys, "perl": perl}},
            "task_default_queue": self.queue,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            **conf,
        }
        url = BROKERS[broker]
        way = None if proxy is None else proxy.url(url)
        code = (OBSERVED if broker == "redis" else "") + CODE + code
        stores = None if backend_proxy is None else backend_proxy.url(BACKEND)
        self.project = Project(directory, url, BACKEND, full, code, way, stores)
        self.app = self.project.app

    def send(self, name: str, *steps: list[Any], **options: Any) -> Any:
        return self.app.send_task(name, [list(steps)] if steps else [], **options)

    def close(self) -> None:
        with Connection(BROKERS[self.broker]) as connection:
            Queue(self.queue, channel=connection.default_channel).delete()
        self.app.close()


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE)
