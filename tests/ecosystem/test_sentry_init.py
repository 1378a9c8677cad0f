"""`sentry-sdk` reports failures of tasks if it is initialised as its documentation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Project

from .sink import http_sink

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

#: Where it is initialised. (`worker_process_init` is too late, on prefork as well.)
PLACES = {
    "import": "init_sentry()",
    "celeryd_init": "@signals.celeryd_init.connect\ndef init(**_): init_sentry()",
}


@pytest.mark.parametrize("pool", ["prefork", "celery_subproc_pool:Pool"])
@pytest.mark.parametrize("place", PLACES)
def test_failures_of_tasks_arrive(tmp_path: Path, place: str, pool: str) -> None:
    with http_sink() as sink:
        code = f"{INIT.format(dsn=sink.sentry_dsn)}\n{PLACES[place]}\n"
        project = Project(tmp_path, code=code)
        with project.worker("-P", pool, "-c", "1"):
            results = [project.app.send_task("failing", (number,)) for number in range(3)]
            for result in results:
                with pytest.raises(ValueError, match="no such order"):
                    result.get(timeout=DEADLINE, interval=0.02)
            wait_for(lambda: len(sink.sentry_items("event")) >= 3, "the events")
        found = [summary(event) for event in sink.sentry_items("event")]
        assert sorted(found) == [
            ("failing", "demo@1.0", "ValueError", f"('no such order', {number})", result.id)
            for number, result in enumerate(results)
        ]


def summary(event: dict[str, Any]) -> tuple[str, ...]:
    """Return the task, the release, the exception and the task's id of an event."""
    [error] = event["exception"]["values"]
    return (
        event["transaction"],
        event["release"],
        error["type"],
        error["value"],
        event["tags"]["celery_task_id"],
    )
