"""The tasks of the embedded session worker's app."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from celery import Celery, Task

from celery_subproc_pool import ChildTaskError, SubprocTask


class Twice(SubprocTask):
    """Asks its child twice, which is once too often."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)


def plain(task: Task, fail: bool = False) -> dict[str, Any]:
    """Say where it runs, after one retry if it is to `fail`."""
    if fail and not task.request.retries:
        raise task.retry(exc=ValueError("once"))
    return {"pid": os.getpid(), "retries": task.request.retries, "name": task.name}


class PlainClass(Task):
    """A task that is a class, registered by hand."""

    name = "plain.class"

    def run(self) -> int:
        return os.getpid()


def define(app: Celery) -> None:
    """Define them on `app`, and on no other app of this process."""
    task = partial(app.task, shared=False)

    @task(base=SubprocTask, name="do.stub", child="single")
    def stub(*args: Any) -> str:
        return "the body ran"

    @task(name="do.ordinary")
    def ordinary(*args: Any) -> str:
        return "the body ran"

    @task(
        base=SubprocTask,
        name="do.autoretry",
        autoretry_for=(ChildTaskError,),
        default_retry_delay=0.2,
        max_retries=2,
    )
    def autoretry(*args: Any) -> None: ...

    # A moment: Celery sends a retry before it stores that there is one, which must not come last.
    @task(base=SubprocTask, name="do.thrice", max_retries=3, default_retry_delay=0.2)
    def thrice(*args: Any) -> None: ...

    @task(base=SubprocTask, name="do.ignored", ignore_result=True)
    def ignored(*args: Any) -> None: ...

    @task(base=SubprocTask, name="do.started", track_started=True)
    def started(*args: Any) -> None: ...

    @task(base=SubprocTask, name="do.late", acks_late=True)
    def late(*args: Any) -> None: ...

    @task(base=Twice, name="do.twice")
    def twice(*args: Any) -> None: ...

    # No import makes them tasks: a Python child has to be told how.
    task(plain, name="plain.task", bind=True, max_retries=1, default_retry_delay=0.2)
    app.register_task(PlainClass())

    @task(name="plain.closure")
    def closure() -> None: ...
