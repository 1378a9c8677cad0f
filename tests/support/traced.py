"""A project whose external tasks are traced, and which notes what is called around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.basics import DEADLINE, python_child
from tests.support.worker import Project

#: `note` adds a line to a file that all processes of the project share.
CODE = """
import os, time
from celery import current_task, signals
from celery_subproc_pool import SubprocTask
def note(*words):
    with open({notes!r}, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")
@signals.task_failure.connect(weak=False)
def on_failure(task_id, **_):
    note("failed", task_id, os.getpid())
"""

#: Has each job traced from its start.
WATCHED = """
@signals.task_prerun.connect(weak=False)
def on_prerun(task_id, **_):
    note("prerun", task_id, os.getpid())
@signals.task_postrun.connect(weak=False)
def on_postrun(task_id, **_):
    note("postrun", task_id, os.getpid())
"""

MANY = [*python_child("many"), '{"features": ["multiplex", "cancel"]}']


class TracedProject(Project):
    """A project with two groups: `obeys`, whose children have one job at a time, and `many`, whose
    child has many and can cancel them; and one tracer.

    Arguments:
        directory: where.
        code: more of the project's module, which has `CODE` already.
        tracers: settings of the tracers.
        size: how many children obey.
        conf: the rest of the configuration.
    """

    def __init__(
        self,
        directory: Path,
        code: str = "",
        tracers: Mapping[str, Any] | None = None,
        size: int = 1,
        **conf: Any,
    ) -> None:
        self._notes = directory / "notes"
        self._notes.touch()
        children = {
            "obeys": {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"], "size": size},
            "many": {
                "argv": MANY,
                "tasks": ["many.it"],
                "size": 1,
                "handshake": True,
                "max_in_flight": 100,
            },
        }
        settings = {"children": children, "tracers": {"size": 1, **(tracers or {})}}
        code = CODE.format(notes=str(self._notes)) + code
        super().__init__(directory, conf={"subproc_pool": settings, **conf}, code=code)

    def send(self, name: str, *steps: list[Any], **options: Any) -> Any:
        """Send a task for a child that obeys."""
        return self.app.send_task(name, [list(steps)], **options)

    def noted(self, *first: str) -> list[list[str]]:
        """Return what follows in the notes that begin with the words `first`."""
        notes = [line.split() for line in self._notes.read_text().splitlines()]
        return [words[len(first) :] for words in notes if words[: len(first)] == [*first]]

    def rows(self, group: str) -> list[dict[str, Any]]:
        """Return what `celery inspect subproc` says of the children of `group`."""
        replies = self.app.control.inspect([self.node], timeout=20)._request("subproc")
        [rows] = replies.values()
        return [row for row in rows if row["group"] == group]


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)
