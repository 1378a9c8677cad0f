"""Agents that queue what they have to tell, and send it from a thread: nothing is lost when a child
ends. Each sends to a sink of the test's own. With CSP_TEST_POOL=prefork: what users expect; but New
Relic, whose agent in a process of prefork has no time to start for one job, loses most of ten.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.conftest import DEADLINE, wait_for
from tests.worker import Project

pytestmark = pytest.mark.ecosystem

POOL = ("-P", os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool"))
JOBS = 10
#: Seconds that Sentry's sink takes to answer.
LATENCY = 0.1


class Sink(BaseHTTPRequestHandler):
    """Takes Sentry's envelopes."""

    #: How many items have come, by type.
    items: ClassVar[Counter[str]] = Counter()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.take(body)
        # As far away as a real one.
        time.sleep(LATENCY)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def take(self, envelope: bytes) -> None:
        """Note the types of an envelope's items: each is a line of headers, and a payload."""
        _, _, rest = envelope.partition(b"\n")
        while rest.strip():
            line, _, rest = rest.partition(b"\n")
            header = json.loads(line)
            rest = rest[header["length"] :].lstrip(b"\n")
            self.items[header["type"]] += 1

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def sentry() -> Iterator[str]:
    """Return the address of a sink that is empty."""
    Sink.items.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://key@127.0.0.1:{server.server_port}/1"
    server.shutdown()
    thread.join()
    server.server_close()


SENTRY = """
import sentry_sdk
sentry_sdk.init({dsn!r}, traces_sample_rate=1.0, auto_session_tracking=False)
"""
FAIL = """
@app.task(name="fail")
def fail(number):
    raise ValueError(number)
"""


def fail_all(project: Project) -> None:
    """Have ten jobs fail."""
    results = [project.app.send_task("fail", (number,)) for number in range(JOBS)]
    for result in results:
        with pytest.raises(ValueError, match=r"^\d$"):
            result.get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize("recycling", [True, False])
def test_sentry(tmp_path: Path, sentry: str, recycling: bool) -> None:
    project = Project(tmp_path, code=SENTRY.format(dsn=sentry) + FAIL)
    words = ("--max-tasks-per-child", "1") if recycling else ()
    with project.worker(*POOL, "-c", "2", *words) as worker:
        fail_all(project)
        assert worker.stop() == 0
    wait_for(lambda: Sink.items["event"] == JOBS, "the events")
    assert (Sink.items["event"], Sink.items["transaction"]) == (JOBS, JOBS)


NEW_RELIC = """
import newrelic.agent
newrelic.agent.initialize()
"""


def errors_sent(audit: Path) -> int:
    """Return how many failures the agents of all processes have sent, as each counts its own."""
    counts = re.findall(
        r"Supportability/Events/TransactionError/Sent', [^\[]*\[(\d+),", audit.read_text()
    )
    return sum(map(int, counts))


@pytest.mark.parametrize("recycling", [True, False])
def test_new_relic(tmp_path: Path, recycling: bool) -> None:
    """In its developer mode, the agent sends to nobody; what it would is in a file."""
    audit = tmp_path / "audit"
    project = Project(tmp_path, code=NEW_RELIC + FAIL)
    words = ("--max-tasks-per-child", "1") if recycling else ()
    environ = {
        "NEW_RELIC_DEVELOPER_MODE": "true",
        "NEW_RELIC_AUDIT_LOG": str(audit),
        "NEW_RELIC_STARTUP_TIMEOUT": "10",
    }
    with project.worker(*POOL, "-c", "2", *words, **environ) as worker:
        fail_all(project)
        assert worker.stop() == 0
    assert errors_sent(audit) == JOBS
