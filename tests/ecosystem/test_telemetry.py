"""Agents that queue what they have to tell, and send it from a thread: nothing is lost when a child
ends. Each sends to a sink of the test's own. With CSP_TEST_POOL=prefork: what users expect; but New
Relic, whose agent in a process of prefork has no time to start for one job, loses most of ten.
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
#: Seconds that Sentry's sink takes to answer.
LATENCY = 0.1


@pytest.fixture
def sentry() -> Iterator[Sink]:
    """Return a sink that is as far away as a real one."""
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
    """Have ten jobs fail."""
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
