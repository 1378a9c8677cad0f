"""Agents that queue records and send them from a thread lose nothing when a child ends.

Each agent sends to the test's own sink. `CSP_TEST_POOL=prefork` shows what users expect. Only New
Relic's agent loses most of ten records there: in a process for one job, it has no time to start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Project

from .sink import Sink, http_sink

pytestmark = pytest.mark.ecosystem

POOL = ("-P", os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool"))
JOBS = 10
#: Seconds until Sentry's sink answers.
LATENCY = 0.1


@pytest.fixture
def sentry() -> Iterator[Sink]:
    """Return a sink that answers as late as a distant server."""
    with http_sink(LATENCY) as sink:
        yield sink


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
    """Run ten jobs that fail."""
    results = [project.app.send_task("fail", (number,)) for number in range(JOBS)]
    for result in results:
        with pytest.raises(ValueError, match=r"^\d$"):
            result.get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize("recycling", [True, False])
def test_sentry(tmp_path: Path, sentry: Sink, recycling: bool) -> None:
    project = Project(tmp_path, code=SENTRY.format(dsn=sentry.sentry_dsn) + FAIL)
    words = ("--max-tasks-per-child", "1") if recycling else ()
    with project.worker(*POOL, "-c", "2", *words) as worker:
        fail_all(project)
        assert worker.stop() == 0
    wait_for(lambda: len(sentry.sentry_items("event")) == JOBS, "the events")
    assert len(sentry.sentry_items("transaction")) == JOBS


NEW_RELIC = """
import newrelic.agent
newrelic.agent.initialize()
"""


def errors_sent(audit: Path) -> int:
    """Return how many failures the agents have sent. Each process counts its own."""
    counts = re.findall(
        r"Supportability/Events/TransactionError/Sent', [^\[]*\[(\d+),", audit.read_text()
    )
    return sum(map(int, counts))


@pytest.mark.parametrize("recycling", [True, False])
def test_new_relic(tmp_path: Path, recycling: bool) -> None:
    """In its developer mode, the agent writes what it would send to a file."""
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
