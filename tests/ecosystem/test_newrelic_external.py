"""New Relic's agent sees the tasks that external children do, however it was started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.worker import Project

pytest.importorskip("newrelic")
pytestmark = pytest.mark.ecosystem

#: The agent does not connect to its vendor. It writes what it would send to a file.
SETTINGS = """
[newrelic]
app_name = proj
license_key = {key}
developer_mode = true
startup_timeout = 10
audit_log_file = {log}
transaction_tracer.enabled = false
"""

CODE = """
from celery_subproc_pool import SubprocTask
@app.task(base=SubprocTask, name="do.declared", ignore_result=True)
def declared(*args): ...
@app.task(name="do.ordinary", ignore_result=True)
def ordinary(*args): ...
"""


class NewRelicProject(Project):
    """A project whose commands are run by ``newrelic-admin run-program``, as its users do."""

    def command(self, *words: str) -> list[str]:
        admin = Path(sys.executable).with_name("newrelic-admin")
        return [str(admin), "run-program", *super().command(*words)]


NAMES = ["do.declared", "do.ordinary", "do.registered"]


def test_external_tasks_are_transactions(tmp_path: Path) -> None:
    settings, audit = tmp_path / "newrelic.ini", tmp_path / "audit.log"
    settings.write_text(SETTINGS.format(key="0" * 40, log=audit))
    group = {"argv": python_child("obeys"), "tasks": ["do.*", "do.registered"]}
    conf = {"subproc_pool": {"children": {"obeys": group}}}
    project = NewRelicProject(tmp_path, conf=conf, code=CODE)
    with project.worker("-P", "subproc", "-c", "1", NEW_RELIC_CONFIG_FILE=str(settings)) as worker:
        for name in NAMES * 2:
            result = project.app.send_task(name, [[["reply", {"result": 42}]]])
        done = f"Task {NAMES[-1]}[{result.id}] succeeded"
        wait_for(lambda: done in worker.log, "the last one")
        worker.process.terminate()
        worker.process.wait(DEADLINE)
    # The agent sends what it has gathered at the end.
    sent = audit.read_text() if audit.exists() else ""
    for name in NAMES:
        assert f"OtherTransaction/Celery/{name}" in sent
