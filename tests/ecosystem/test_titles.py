"""What `ps` shows of a worker's processes where `setproctitle` is installed: as on prefork."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.basics import DEADLINE, python_child
from tests.support.worker import Project

pytest.importorskip("setproctitle")

pytestmark = pytest.mark.ecosystem

CODE = """
@app.task(name="nothing")
def nothing(): ...
"""


@pytest.mark.parametrize(
    ("pool", "kind"),
    [("prefork", "ForkPoolWorker"), ("celery_subproc_pool:Pool", "SubprocPoolWorker")],
)
def test_the_titles_of_processes(tmp_path: Path, pool: str, kind: str) -> None:
    project = Project(tmp_path, code=CODE)
    with project.worker("-P", pool, "-c", "2") as worker:
        for _ in range(2):
            project.app.send_task("nothing").get(timeout=DEADLINE, interval=0.02)
        # psutil cuts a title at its spaces if it fills all the room that there was.
        titles = sorted(" ".join(child.cmdline()).rstrip() for child in worker.children())
        assert titles == [f"[celeryd: {project.node}:{kind}-{number}]" for number in (1, 2)]
        templates = [" ".join(each.cmdline()).rstrip() for each in worker.templates()]
        ours = kind == "SubprocPoolWorker"
        assert templates == [f"[celeryd: {project.node}:{kind}Template-1]"] * ours


def test_the_title_of_a_tracer(tmp_path: Path) -> None:
    children = {"obeys": {"argv": python_child("obeys"), "tasks": ["do.it"]}}
    settings = {"children": children, "tracers": {"size": 1}}
    project = Project(tmp_path, conf={"subproc_pool": settings})
    with project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker:
        # It stores this result.
        project.app.send_task("do.it").get(timeout=DEADLINE, interval=0.02)
        [tracer] = worker.tracers()
        title = " ".join(tracer.cmdline()).rstrip()
        assert title == f"[celeryd: {project.node}:SubprocTracer-1]"
        [child] = worker.children()
        assert child.pid != tracer.pid
