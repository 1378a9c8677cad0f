"""A result backend that stops answering, under load: it holds up a tracer, and not the worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded

from tests.support.basics import wait_for
from tests.support.cutting_proxy import CuttingProxy
from tests.support.workplace import BROKERS, Workplace, get

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

#: Writes a line for each end that Celery tells of.
CODE = """
from celery import signals
@signals.task_postrun.connect(weak=False)
@signals.task_failure.connect(weak=False)
def note(task_id, **facts):
    with open({path!r}, "a") as file:
        file.write(f"{{task_id}} {{facts['signal'].name}}\\n")
"""

#: Jobs that come while the backend is held up.
JOBS = 60


@pytest.fixture
def proxy() -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(6379)
    yield proxy
    proxy.close()


@pytest.mark.parametrize(
    "broker", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in BROKERS]
)
def test_a_backend_that_hangs_holds_up_no_worker(
    tmp_path: Path, proxy: CuttingProxy, broker: str
) -> None:
    ends = tmp_path / "ends"
    ends.touch()
    place = Workplace(
        tmp_path, broker, CODE.format(path=str(ends)), backend_proxy=proxy, broker_heartbeat=2
    )
    control = place.app.control
    node = place.project.node
    try:
        with place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "8") as worker:
            get(place.send("do.it", ["reply", {"result": "first"}]))
            over = place.send("do.it", ["wait", str(tmp_path / "never")], time_limit=3)
            wait_for(lambda: over.id in worker.log, "the job that goes on for too long")
            proxy.hold()
            sent: list[Any] = [place.send("do.it", ["reply", {"result": n}]) for n in range(JOBS)]
            wait_for(lambda: "its job took longer than 3 s" in worker.log, "the limit")
            wait_for(lambda: "stands still" in worker.log, "the warning")
            for _ in range(5):
                assert control.inspect([node], timeout=1).ping()
            [rows] = control.inspect([node], timeout=1)._request("subproc").values()
            assert any(row["stands_still"] for row in rows)
            proxy.go_on()
            assert [get(result) for result in sent] == list(range(JOBS))
            with pytest.raises(TimeLimitExceeded):
                get(over)
            wait_for(lambda: "goes on, after" in worker.log, "the end of the warning")
            assert "missed heartbeat" not in worker.log
        told = Counter(line.split()[0] for line in ends.read_text().splitlines())
        assert {told[result.id] for result in sent} == {1}
    finally:
        place.close()
