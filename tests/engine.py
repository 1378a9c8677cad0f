"""The real engine with real children, turned by the test; Celery is not needed for it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from celery_subproc_pool import config, protocol, records
from celery_subproc_pool.live import ChildFacts
from celery_subproc_pool.scheduler import Scheduler
from celery_subproc_pool.supervisor import Supervisor

from .conftest import wait_for


def answer(outcome: records.Outcome) -> protocol.Reply:
    """Return the reply in an outcome that must have one."""
    assert isinstance(outcome, records.Answered), outcome
    return outcome.reply


class Engine:
    """One group of children.

    Arguments:
        argv: the child.
        size: how many of them.
        environ: what they inherit; None is this process' environment.
        timeout: the hard limit of each job, in seconds.
        limit: how many jobs may be under way; None is one for each child.
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
        group = records.Group("default", child, size)
        self.timeout = timeout
        self.outcomes: dict[records.Job, records.Outcome] = {}
        self.facts: dict[records.Job, ChildFacts | None] = {}
        self.accepted_pids: dict[records.Job, list[int | None]] = {}
        self.soft: list[tuple[records.Job, bool]] = []
        self.progress: list[tuple[records.Job, dict[str, Any]]] = []
        self.overruled_jobs: list[records.Job] = []
        self.changes: list[records.Change] = []
        self.current: records.Job | None = None
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

    # -- supervisor.Listener

    def accepted(self, job: records.Job, child: records.Child | None, now: float) -> None:
        self.accepted_pids.setdefault(job, []).append(child.pid if child is not None else None)

    def settled(self, job: records.Job, outcome: records.Outcome, facts: ChildFacts | None) -> None:
        assert job not in self.outcomes, "a job was settled twice"
        self.outcomes[job] = outcome
        self.facts[job] = facts

    def finished(self, job: records.Job) -> None:
        pass

    def soft_timed_out(self, job: records.Job, told: bool) -> None:
        self.soft.append((job, told))

    def overruled(self, job: records.Job) -> None:
        self.overruled_jobs.append(job)

    def progressed(self, job: records.Job, meta: dict[str, Any]) -> None:
        self.progress.append((job, meta))

    def child_changed(self, change: records.Change) -> None:
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

    def submit(self, task_id: str = "job", soft_timeout: float | None = None) -> records.Job:
        """Submit a job, without a request yet."""
        job = records.Job(task_id, "some.task", "default", self.timeout, soft_timeout)
        self.supervisor.post(self.supervisor.scheduler.submit, job)
        return job

    def request(self, job: records.Job, *args: Any) -> None:
        """Give a job its request, as its tracer would."""
        line = protocol.encode_request(job.task_id, {"task": job.task_name, "args": args})
        self.supervisor.post(self.supervisor.scheduler.provide, job, line)

    def begin(self, *args: Any, task_id: str = "job", **options: Any) -> records.Job:
        """Submit a job with its request."""
        job = self.current = self.submit(task_id, **options)
        self.request(job, *args)
        return job

    def outcome_of(self, job: records.Job) -> records.Outcome:
        """Turn the engine until `job` is settled; finish it; return its outcome."""
        self.turn_until(lambda: job in self.outcomes, f"the outcome of {job}")
        self.supervisor.post(self.supervisor.scheduler.finish, job)
        return self.outcomes[job]

    def run(self, *args: Any, task_id: str = "job") -> records.Outcome:
        """Do one job."""
        return self.outcome_of(self.begin(*args, task_id=task_id))

    def abandon_request(self) -> None:
        """Finish the current job, whose tracer failed before it wanted the child."""
        assert self.current is not None
        self.supervisor.post(self.supervisor.scheduler.finish, self.current)
