"""The real engine with real children, without Celery. The test turns it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from celery_subproc_pool import config
from celery_subproc_pool.core import actions, model, outcomes
from celery_subproc_pool.core.outcomes import ChildFacts
from celery_subproc_pool.core.scheduler import Scheduler
from celery_subproc_pool.engine.supervisor import Supervisor
from celery_subproc_pool.wire import messages
from tests.support.basics import python_child, wait_for

OBEYS = python_child("obeys")


def answer(outcome: outcomes.Outcome) -> messages.Reply:
    """Return the reply in `outcome`. Fail if it has none."""
    assert isinstance(outcome, outcomes.Answered), outcome
    return outcome.reply


class Engine:
    """An engine with one group of children, `default`. It is its own listener.

    Arguments:
        argv: the command of the children.
        size: the number of children.
        timeout: the hard limit of each job, in seconds.
        limit: how many jobs may be open at a time; None is one for each child.
        environ: the environment that children start from; None is this process's.
        settings: other settings of the group.
    """

    def __init__(
        self,
        argv: list[str],
        size: int = 1,
        timeout: float = 60.0,
        limit: int | None = None,
        environ: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        child = config.load({"argv": argv, **settings}).children["default"]
        group = model.Group("default", child, size)
        self.timeout = timeout
        self.outcomes: dict[model.Job, outcomes.Outcome] = {}
        self.facts: dict[model.Job, ChildFacts | None] = {}
        self.accepted_pids: dict[model.Job, list[int | None]] = {}
        self.soft: list[tuple[model.Job, bool]] = []
        self.progress: list[tuple[model.Job, dict[str, Any]]] = []
        self.overruled_jobs: list[model.Job] = []
        self.changes: list[actions.Change] = []
        more = {} if environ is None else {"environ": environ}
        self.supervisor = Supervisor(Scheduler({"default": group}, limit or size), self, **more)

    def __enter__(self) -> Engine:
        self.supervisor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.supervisor.close()

    # -- performer.Listener

    def accepted(self, job: model.Job, child: model.Child, now: float) -> None:
        self.accepted_pids.setdefault(job, []).append(child.pid)

    def resolved(
        self,
        job: model.Job,
        outcome: outcomes.Outcome,
        facts: ChildFacts | None,
        unfinished: bool,
    ) -> None:
        assert not unfinished, "no job has a tracer here"
        assert job not in self.outcomes, "a job was resolved twice"
        self.outcomes[job] = outcome
        self.facts[job] = facts

    def finished(self, job: model.Job, reply: messages.Reply | None) -> None:
        raise AssertionError("no job has a tracer here")

    def soft_timed_out(self, job: model.Job, told: bool) -> None:
        self.soft.append((job, told))

    def overruled(self, job: model.Job) -> None:
        self.overruled_jobs.append(job)

    def progressed(self, job: model.Job, meta: dict[str, Any]) -> None:
        self.progress.append((job, meta))

    def child_changed(self, change: actions.Change) -> None:
        self.changes.append(change)

    def failed(self, error: Exception) -> None:
        raise error

    # -- for tests

    @property
    def pids(self) -> list[int]:
        """The pids of the children."""
        return self.supervisor.processes

    def turn_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Turn the engine until `condition`."""

        def turned() -> Any:
            self.supervisor.turn(self.supervisor.wait_time(0.05))
            return condition()

        return wait_for(turned, what)

    def submit(
        self, line: bytes, task_id: str = "job", soft_timeout: float | None = None
    ) -> model.Job:
        """Submit a job with the request `line`. Return it."""
        job = model.Job(task_id, "some.task", "default", self.timeout, soft_timeout)
        job.request = line
        self.supervisor.post(self.supervisor.scheduler.submit, job)
        return job

    def begin(self, *args: Any, task_id: str = "job", **options: Any) -> model.Job:
        """Submit a job with `args`. Return it."""
        line = messages.encode_request(task_id, {"task": "some.task", "args": args})
        return self.submit(line, task_id, **options)

    def outcome_of(self, job: model.Job) -> outcomes.Outcome:
        """Turn the engine until `job` is resolved. Return its outcome."""
        self.turn_until(lambda: job in self.outcomes, f"the outcome of {job}")
        return self.outcomes[job]

    def run(self, *args: Any, task_id: str = "job") -> outcomes.Outcome:
        """Do one job. Return its outcome."""
        return self.outcome_of(self.begin(*args, task_id=task_id))


def exit_status(outcome: outcomes.Outcome) -> int | None:
    """Return the exit status of the child of a lost job. The rest of the outcome depends on whether
    the exit or the end of stdout was seen first."""
    assert isinstance(outcome, outcomes.Lost), outcome
    return outcome.status
