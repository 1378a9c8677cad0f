"""A project with a queue of its own on a real broker."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kombu import Connection, Queue

from tests.support.basics import CHILDREN, DEADLINE, python_child, wait_for
from tests.support.cutting_proxy import CuttingProxy
from tests.support.worker import Project, Worker

BROKERS = {
    "redis": "redis://127.0.0.1:6379/9",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
}
POOL = ("-P", "celery_subproc_pool:Pool")
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


def control(place: Workplace, command: str, **arguments: Any) -> Any:
    """Send a remote control command to the worker; return its reply."""
    node = place.project.node
    replies = place.app.control.broadcast(
        command, arguments, destination=[node], reply=True, timeout=DEADLINE, limit=1
    )
    assert replies, f"{command} was not replied to"
    return replies[0][node]


@contextmanager
def working(place: Workplace, *words: str, **environ: str) -> Iterator[Worker]:
    """A worker of its own for one test."""
    ping = partial(place.app.control.ping, [place.project.node], timeout=1.0, limit=1)
    with closing(place), place.project.worker(*POOL, *words, **environ) as worker:
        # On Redis, it says that it is ready a moment before it listens.
        wait_for(ping, "the worker to listen")
        yield worker


@contextmanager
def listening(place: Workplace) -> Iterator[list[dict[str, Any]]]:
    """The events of the place's worker, as they come."""
    events: list[dict[str, Any]] = []

    def note(event: dict[str, Any]) -> None:
        if event["hostname"] == place.project.node:
            events.append(event)

    with place.app.connection_for_read() as connection:
        receiver = place.app.events.Receiver(connection, handlers={"*": note})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        try:
            # It listens from the moment when the worker's heartbeat comes, at the latest.
            wait_for(lambda: events, "the first event")
            yield events
        finally:
            receiver.should_stop = True
            thread.join(DEADLINE)
