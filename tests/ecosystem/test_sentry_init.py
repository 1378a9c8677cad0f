"""`sentry-sdk`, initialised where its documentation does it: failures of tasks arrive."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEADLINE, wait_for
from tests.worker import Project

pytestmark = pytest.mark.ecosystem

INIT = """
import sentry_sdk
from celery import signals

def init_sentry():
    sentry_sdk.init(dsn={dsn!r}, release="demo@1.0", traces_sample_rate=0)

@app.task(name="failing")
def failing(number):
    raise ValueError("no such order", number)
"""

#: Where it is initialised. (In `worker_process_init` it is too late, on prefork as well.)
PLACES = {
    "import": "init_sentry()",
    "celeryd_init": "@signals.celeryd_init.connect\ndef init(**_): init_sentry()",
}


class Sink(ThreadingHTTPServer):
    """Takes in the envelopes that an SDK sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Envelopes)
        self.events: list[dict[str, Any]] = []

    @property
    def dsn(self) -> str:
        return f"http://key@127.0.0.1:{self.server_port}/1"


class _Envelopes(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        lines = body.split(b"\n")
        for header, payload in zip(lines[1::2], lines[2::2], strict=False):
            if json.loads(header).get("type") == "event":
                assert isinstance(self.server, Sink)
                self.server.events.append(json.loads(payload))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def sink() -> Iterator[Sink]:
    with Sink() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("pool", ["prefork", "celery_subproc_pool:Pool"])
@pytest.mark.parametrize("place", PLACES)
def test_failures_of_tasks_arrive(tmp_path: Path, place: str, pool: str) -> None:
    with sink() as server:
        code = f"{INIT.format(dsn=server.dsn)}\n{PLACES[place]}\n"
        project = Project(tmp_path, code=code)
        with project.worker("-P", pool, "-c", "1"):
            results = [project.app.send_task("failing", (number,)) for number in range(3)]
            for result in results:
                with pytest.raises(ValueError, match="no such order"):
                    result.get(timeout=DEADLINE, interval=0.02)
            wait_for(lambda: len(server.events) >= 3, "the events")
        found = [summary(event) for event in server.events]
        assert sorted(found) == [
            ("failing", "demo@1.0", "ValueError", f"('no such order', {number})", result.id)
            for number, result in enumerate(results)
        ]


def summary(event: dict[str, Any]) -> tuple[str, ...]:
    """Return what it is about: the task, the release, the exception, the task's id."""
    [error] = event["exception"]["values"]
    return (
        event["transaction"],
        event["release"],
        error["type"],
        error["value"],
        event["tags"]["celery_task_id"],
    )
