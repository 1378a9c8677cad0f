"""Runs jobs: from `apply_async`, through the engine, to Celery's last callback.

Which thread calls what:

- The caller of `apply_async` calls `submit`. It is Celery's consumer; with an event loop, its
  thread is the engine's, too.
- Any thread calls `terminate_jobs`. Tracing threads call the rest of `jobs.Owner`: `provide`,
  `traced` and `unwound`. All four only leave a message for the engine.
- The engine's thread calls everything else: the methods of the engine's `Listener`, and what
  follows from them. All callbacks of Celery are called there.
- `PoolJob.trace` and `PoolJob.store` run in tracing threads, because they may block.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from celery import Celery
from celery.platforms import EX_FAILURE, signals
from celery.utils.log import get_logger
from celery.worker import state

from ..core.actions import Change
from ..core.model import Child, JobState
from ..core.outcomes import ChildFacts, Outcome
from ..core.scheduler import Scheduler
from ..engine.supervisor import Supervisor
from ..settings import PYTHON
from ..wire import messages
from ..wire.messages import CancelReason
from . import outcome, reporting
from .admission import Admission
from .calls import CallJob
from .events import ChildNews
from .fast_path import FastRequest
from .jobs import Callbacks, PoolJob
from .requests import is_cancelled, is_tracer, store_revoked_again
from .slots import Slots
from .threads import TracingThreads

__all__ = ("Runner",)

logger = get_logger(__name__)


class Runner:
    """Runs the jobs of one worker. It is the engine's `Listener`, and the `jobs.Owner` of jobs.

    Arguments:
        app: the worker's app.
        scheduler: the engine's.
        admission: makes jobs.
        slots: the jobs under way.
        news: is told what becomes of children.
        hostname: the worker's node name.
    """

    def __init__(
        self,
        app: Celery,
        scheduler: Scheduler,
        admission: Admission,
        slots: Slots,
        news: ChildNews,
        hostname: str,
    ) -> None:
        self._app = app
        self._scheduler = scheduler
        self._admission = admission
        self._fast_path = admission.fast_path
        self.slots = slots
        self._news = news
        self._tracers = TracingThreads("subproc-tracer")
        #: The job that Celery is being told of as accepted; and the signals by which Celery asks
        #: to end it meanwhile.
        self._accepting: tuple[PoolJob, list[int | str]] | None = None
        self._closed = False
        self.engine = Supervisor(scheduler, self, owner=hostname)

    def close(self) -> None:
        """Kill the children that are left, and give back all resources."""
        self._closed = True
        self.engine.close()
        self._tracers.close()

    # -- into the engine

    def submit(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        callbacks: Callbacks,
        hard: float | None,
        soft: float | None,
    ) -> PoolJob:
        """Make a job and give it to the engine, or let it fail if no child can do it.

        Arguments:
            target: Celery's tracer, or what a Python child is to call.
            args, kwargs: its arguments.
            callbacks: tell Celery what becomes of the job.
            hard, soft: the request's or task's time limits, in seconds.
        """
        # There must be a job that can fail, before it is known whether a child can do it.
        if is_tracer(target, args, callbacks.error_callback):
            job = PoolJob(self, target, args, callbacks)
        else:
            job = CallJob(self, target, callbacks)
        self.slots.occupy(job)
        try:
            self._admission.prepare(job, args, kwargs, hard, soft)
        except Exception as exc:
            # Whatever it is, it ends this job, and not the consumer.
            logger.error("%s can't be given to a child: %r", job.title, exc, exc_info=True)
            # The engine ignores requests to end a job that is closed. It never gets this one.
            job.state = JobState.CLOSED
            self.engine.call(partial(self._conclude, job, partial(reporting.refused, job, exc)))
        else:
            self.engine.post(self._scheduler.submit, job)
        return job

    def provide(self, job: PoolJob, line: bytes) -> None:
        """Give the engine the request line of `job`."""
        self._tell(self.engine.post, self._scheduler.provide, job, line)

    def traced(self, job: PoolJob) -> None:
        """Tell the engine that the tracing thread of `job` is done, and `job.ending` is set."""
        if job.traced_here:
            self._tell(self.engine.post, self._scheduler.finish, job)
        else:
            self._tell(self.engine.call, partial(self.finished, job))

    def unwound(self, job: PoolJob, report: Callable[[], None]) -> None:
        """Let `report` tell Celery how `job` ended. It was abandoned, and stores no more states."""
        self._tell(self.engine.call, partial(self._conclude, job, report))

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """End `jobs`, with the signal `signum` (default SIGTERM) for their children."""
        number = signals.signum(signum or "SIGTERM")
        for job in jobs:
            stops = state.should_terminate not in (None, False) or is_cancelled(job)
            reason = CancelReason.SHUTDOWN if stops else CancelReason.REVOKED
            self._tell(self.engine.terminate, job, number, reason)

    def _tell(self, tell: Callable[..., None], *arguments: Any) -> None:
        """Tell the engine something, unless it is closed: a tracing thread may outlive it."""
        if not self._closed:
            tell(*arguments)

    # -- accepted

    def accepted(self, job: PoolJob, child: Child | None, now: float) -> None:
        """Tell Celery that `child` has `job`. If the worker traces it, start the trace."""
        job.pid = os.getpid() if child is None or child.pid is None else child.pid
        signums: list[int | str] = []
        self._accepting = job, signums
        try:
            job.callbacks.accept_callback(job.pid, now)
        except Exception:
            reporting.acceptance_failed(job)
        finally:
            self._accepting = None
            if signums:
                self.terminate_jobs([job], signums[-1])
            if job.traced_here:
                self._start(job, job.trace)

    def terminate_accepted(self, pid: int, signum: int | str | None) -> None:
        """End the job that Celery is being told of, if it has the process `pid`, after that.

        Celery notes why it ends a job after it has asked for it: so the reason is found out later.
        On another thread than the engine's, another job is meant.
        """
        accepting = self._accepting
        if accepting is None or not self.engine.on_own_thread:
            return
        job, signums = accepting
        if job.pid == pid:
            signums.append(signum or "SIGTERM")

    def _start(self, job: PoolJob, work: Callable[[], Callable[[], None] | None]) -> None:
        """Do `work` for `job` in a tracing thread, because it may block."""
        try:
            self._tracers.run(work)
        except RuntimeError as exc:
            # The system gives no more threads: the job fails, and its child is free again.
            job.ending = partial(job.callbacks.error_callback, outcome.exception_info(exc))
            self.traced(job)

    # -- in a child

    def progressed(self, job: PoolJob, meta: dict[str, Any]) -> None:
        """Let the tracing thread of `job` store what its child told of its progress."""
        if job.traced_here:
            job.progress(meta)

    def soft_timed_out(self, job: PoolJob, told: bool) -> None:
        """Tell Celery that the soft limit of `job` is over; warn if its child was not `told`."""
        job.callbacks.timeout_callback(soft=True, timeout=job.soft_timeout)
        if not told and job.group is not None:
            self._news.untold_of_soft_limit(job.group)

    def overruled(self, job: PoolJob) -> None:
        """Store again that `job` is revoked: a Python child has stored its own result over it."""
        if job.group == PYTHON:
            store_revoked_again(job)

    def child_changed(self, change: Change) -> None:
        """Pass on what became of a child."""
        self._news.changed(change)

    # -- at the end

    def resolved(self, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
        """Act on how the time of `job` with its child ended."""
        try:
            self._resolve(job, result, facts)
        except Exception as exc:
            # Errors of Celery's callbacks are caught elsewhere: this one is our bug. It must not
            # cost the job's slot for good.
            logger.exception("%s can't be brought to its end", job.title)
            self._give_up(job, exc)

    def _resolve(self, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
        report = partial(reporting.report, self._app, job, result, facts)
        answer = None if job.group == PYTHON else reporting.for_tracer(result, facts)
        if job.traced_here:
            if answer is not None:
                job.answer(answer)
            elif job.abandon(report):
                self._conclude(job, report)
        elif answer is None:
            self._conclude(job, report)
        elif isinstance(answer, messages.Ok):
            self._succeed(job, answer)
        else:
            # The fast path ends here: the tracer takes over, with the answer at hand.
            job.answer(answer)
            self._start(job, job.trace)

    def _give_up(self, job: PoolJob, error: Exception) -> None:
        """Let `job` fail with `error`, unless it has ended."""
        if job.traced_here:
            job.answer(error)
        elif job in self.slots.jobs:
            failed = partial(job.callbacks.error_callback, outcome.exception_info(error))
            self._conclude(job, failed)

    def _succeed(self, job: PoolJob, reply: messages.Ok) -> None:
        """Let a job on the fast path succeed, after its result is stored."""
        fast = job.fast
        assert fast is not None
        runtime = time.monotonic() - job.begun_at
        job.ending = partial(self._report_success, job, fast, reply.result, runtime)
        if fast.stores:
            store = partial(self._fast_path.store, fast, reply.result)
            self._start(job, partial(job.store, store, reply))
        else:
            self.finished(job)

    def _report_success(self, job: PoolJob, fast: FastRequest, result: Any, runtime: float) -> None:
        job.callbacks.callback(self._fast_path.succeed(fast, result, runtime))

    def finished(self, job: PoolJob) -> None:
        """Tell Celery how the tracing thread has ended `job`."""
        # The job must not refer to itself, or only the garbage collector could free it.
        ending, job.ending = job.ending, None
        assert ending is not None
        self._conclude(job, ending)

    def _conclude(self, job: PoolJob, report: Callable[[], None]) -> None:
        """Tell Celery how `job` ended, by calling `report`, and let the next one in."""
        try:
            report()
        except Exception as exc:
            reporting.end_failed(job, exc)
        finally:
            self.slots.release(job)

    def failed(self, error: Exception) -> None:
        """End the worker: the engine has failed, and no job will end any more.

        The broker delivers again what was not acknowledged.
        """
        logger.critical(
            "The pool's engine failed, which is a bug of celery_subproc_pool; the worker shuts"
            " down. %d jobs were in flight; those that are acknowledged late come again: %r",
            len(self.slots.jobs),
            error,
            exc_info=True,
        )
        # `should_terminate` would make the exit status 0. There is nothing to wait for.
        state.should_stop = EX_FAILURE
        self.slots.close()
