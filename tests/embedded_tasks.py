"""The tasks of the embedded session worker's app."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_subproc_pool import ChildTaskError, SubprocTask


class Twice(SubprocTask):
    """Asks its child twice, which is once too often."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)


def define(app: Celery) -> None:
    """Define them on `app`."""

    @app.task(base=SubprocTask, name="do.stub", child="single")
    def stub(*args: Any) -> str:
        return "the body ran"

    @app.task(name="do.ordinary")
    def ordinary(*args: Any) -> str:
        return "the body ran"

    @app.task(
        base=SubprocTask,
        name="do.autoretry",
        autoretry_for=(ChildTaskError,),
        default_retry_delay=0,
        max_retries=2,
    )
    def autoretry(*args: Any) -> None: ...

    @app.task(base=SubprocTask, name="do.thrice", max_retries=3, default_retry_delay=0)
    def thrice(*args: Any) -> None: ...

    @app.task(base=SubprocTask, name="do.ignored", ignore_result=True)
    def ignored(*args: Any) -> None: ...

    @app.task(base=SubprocTask, name="do.started", track_started=True)
    def started(*args: Any) -> None: ...

    @app.task(base=SubprocTask, name="do.late", acks_late=True)
    def late(*args: Any) -> None: ...

    @app.task(base=Twice, name="do.twice")
    def twice(*args: Any) -> None: ...

    @app.task(name="plain.task")
    def plain() -> str:
        return "the body ran"
