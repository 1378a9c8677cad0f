"""Sentry's own integration sees the tasks that external children do: those that succeed, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.worker import HEADER, Project

from .sink import http_sink

pytest.importorskip("sentry_sdk")
pytestmark = pytest.mark.ecosystem

#: Before all other code, as Sentry's documentation says for an app that is imported.
INIT = """
import sentry_sdk
sentry_sdk.init("{dsn}", traces_sample_rate=1.0)
"""

CODE = """
from celery_subproc_pool import SubprocTask
@app.task(base=SubprocTask, name="do.declared", ignore_result=True)
def declared(*args): ...
@app.task(base=SubprocTask, name="do.stored")
def stored(*args): ...
@app.task(name="do.ordinary", ignore_result=True)
def ordinary(*args): ...
"""


class SentryProject(Project):
    """A project that starts Sentry's client first."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self._dsn = dsn
        group = {"argv": python_child("obeys"), "tasks": ["do.*", "do.registered"]}
        conf = {"subproc_pool": {"children": {"obeys": group}}}
        super().__init__(directory, conf=conf, code=CODE)

    def _write(self, code: str, **facts: Any) -> None:
        text = INIT.format(dsn=self._dsn) + HEADER.format(**facts) + code
        (self.directory / "proj.py").write_text(text)


NAMES = ["do.declared", "do.stored", "do.ordinary", "do.registered"]


def test_external_tasks_that_succeed_are_transactions(tmp_path: Path) -> None:
    with http_sink() as sink:
        project = SentryProject(tmp_path, sink.sentry_dsn)
        with project.worker("-P", "subproc", "-c", "1"):
            sent = {}
            for name in NAMES * 2:
                result = project.app.send_task(name, [[["reply", {"result": 42}]]])
                sent[result.id] = name
            wait_for(lambda: len(sink.sentry_items("transaction")) >= 8, "the transactions")
        transactions = sink.sentry_items("transaction")
    seen = {}
    for transaction in transactions:
        assert transaction["contexts"]["trace"]["op"] == "queue.task.celery"
        assert transaction["contexts"]["trace"]["status"] == "ok"
        seen[transaction["tags"]["celery_task_id"]] = transaction["transaction"]
    assert seen == sent
    assert len(transactions) == len(sent)
    assert not sink.sentry_items("event")


def test_an_external_task_that_fails_is_an_event_with_the_childs_words(tmp_path: Path) -> None:
    reply = {"status": "error", "message": "bad", "type": "Perl::Err", "traceback": "at line 3"}
    with http_sink() as sink:
        project = SentryProject(tmp_path, sink.sentry_dsn)
        with project.worker("-P", "subproc", "-c", "1"):
            result = project.app.send_task("do.stored", [[["reply", reply]]])
            wait_for(lambda: sink.sentry_items("event"), "the event")
            wait_for(lambda: sink.sentry_items("transaction"), "the transaction")
            with pytest.raises(Exception, match=r"^Perl::Err: bad$"):
                result.get(timeout=DEADLINE, interval=0.02)
        [event] = sink.sentry_items("event")
        [transaction] = sink.sentry_items("transaction")
    cause, error = event["exception"]["values"]
    # Sentry takes an exception's `message`, if it has one, before its text.
    assert (error["type"], error["value"]) == ("ChildTaskError", "bad")
    assert "at line 3" in cause["value"]
    assert event["tags"]["celery_task_id"] == result.id
    assert transaction["contexts"]["trace"]["status"] == "internal_error"
