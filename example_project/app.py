"""The Celery app: two kinds of external child, with broker and results in a folder.

By hand, in two terminals::

    celery -A example_project.app worker -P celery_subproc_pool:Pool -c 4
    celery -A example_project.app call text.stats --args='["/etc/services"]'
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.transport import filesystem
from kombu.utils.json import dumps

#: The environment variable that names the folder for messages and results.
FOLDER_VARIABLE = "EXAMPLE_PROJECT_FOLDER"

FOLDER = Path(
    os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir(), "celery-example-project")
)
QUEUE, RESULTS, CONTROL = FOLDER / "queue", FOLDER / "results", FOLDER / "control"

CHILDREN = Path(__file__).with_name("children")
PERL = shutil.which("perl")
TEXT_CHILD = [PERL, f"{CHILDREN}/textstats.pl"] if PERL else ["sh", f"{CHILDREN}/textstats.sh"]

#: How many jobs the gate lets through at once, and how many in a second.
GATE_BURST, GATE_RATE = 10, 20


class AtomicChannel(filesystem.Channel):  # type: ignore[misc]
    """Write each message completely before it appears.

    kombu's own channel does not: a busy worker may open a message before its text is in it.
    """

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{time.monotonic_ns() // 1_000_000}_{uuid.uuid4()}"
        unfinished = QUEUE / f"{name}.unfinished"
        unfinished.write_text(dumps(payload))
        unfinished.rename(QUEUE / f"{name}.{queue}.msg")


class Transport(filesystem.Transport):  # type: ignore[misc]
    """A broker that is a folder."""

    Channel = AtomicChannel


for folder in (QUEUE, RESULTS, CONTROL):
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)

app = Celery("example_project")
app.conf.update(
    broker_url="filesystem://localhost",
    broker_transport="example_project.app:Transport",
    broker_transport_options={
        "data_folder_in": str(QUEUE),
        "data_folder_out": str(QUEUE),
        "control_folder": str(CONTROL),
        "polling_interval": 0.02,
    },
    # With a polled broker, Celery sends acks between two polls, and a full prefetch window waits
    # for them (seen with Celery 5.3). Only one worker uses the folder: it may take all messages.
    worker_prefetch_multiplier=0,
    result_backend=f"file://{RESULTS}",
    subproc_pool={
        "children": {
            "text": {"argv": TEXT_CHILD, "tasks": ["text.*"], "timeout": 20.0},
            "gate": {
                "argv": ["sh", f"{CHILDREN}/gate.sh", str(GATE_BURST), str(GATE_RATE)],
                "tasks": ["gate.pass"],  # an exact name: it needs no Python function
                "size": 1,  # the token bucket lives in the child
                "timeout": 5.0,
            },
        },
    },
)


@app.task(name="text.stats")  # type: ignore[untyped-decorator]
def text_stats(path: str) -> Any:
    """Count the words of a file.

    On celery_subproc_pool, this body never runs. On any other pool, it starts the same program
    for one job.
    """
    return ask_new_process(path)


def ask_new_process(path: str) -> Any:
    """Start the text program, send it one request, and return its result."""
    request = {"id": "1", "payload": {"task": "text.stats", "args": [path], "kwargs": {}}}
    done = subprocess.run(
        TEXT_CHILD,
        input=json.dumps(request, ensure_ascii=False, separators=(",", ":")) + "\n",
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    reply = json.loads(done.stdout)
    if reply["status"] != "ok":
        raise RuntimeError(reply["message"])
    return reply["result"]
