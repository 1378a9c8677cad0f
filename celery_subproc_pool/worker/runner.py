"""Runs jobs: from `apply_async`, through the engine, to Celery's last callback.

Which thread calls what:

- The caller of `apply_async` calls `submit`. It is Celery's consumer; with an event loop, its
  thread is the engine's, too.
- Any thread calls `terminate_jobs`. It only leaves a message for the engine.
- The engine's thread calls everything else: the methods of the engine's `Listener`, and what
  follows from them. All callbacks of Celery are called there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from celery import Celery
from celery.platforms import EX_FAILURE, signals
from celery.utils.log import get_logger
from celery.worker import state

from ..core.actions import Change, Started
from ..core.model import Child, JobState, Tracing
from ..core.outcomes import ChildFacts, Lost, Outcome, TimedOut
from ..core.scheduler import Scheduler
from ..engine.supervisor import Supervisor
from ..settings import ASYNCIO, PYTHON, TRACERS
from ..wire.json_lines import encode
from ..wire.messages import CancelReason, Ok, Reply
from ..wire.python import SILENT, Answer, Notice, Traced
from . import outcome, reporting
from .admission import Admission
from .calls import CallJob
from .events import ChildNews
from .jobs import Callbacks, PoolJob
from .requests import (
    is_cancelled,
    is_tracer,
    store_revoked_again,
    stores_failure,
)
from .slots import Slots
from .waiting import WaitingRoom

__all__ = ("Runner",)

logger = get_logger(__name__)


class Runner:
    """Runs the jobs of one worker. It is the engine's `Listener`, and the `jobs.Owner` of jobs.

    Arguments:
        app: the worker's app.
        scheduler: the engine's.
        admission: makes jobs.
        slots: the jobs under way.
        waiting: where jobs wait for others of their group.
        news: is told what becomes of children.
        hostname: the worker's node name.
    """

    def __init__(
        self,
        app: Celery,
        scheduler: Scheduler,
        admission: Admission,
        slots: Slots,
        waiting: WaitingRoom,
        news: ChildNews,
        hostname: str,
    ) -> None:
        self._app = app
        self._scheduler = scheduler
        self._admission = admission
        self._fast_path = admission.fast_path
        self.slots = slots
        self._waiting = waiting
        self._news = news
        #: The job that Celery is being told of as accepted; and the signals by which Celery asks
        #: to end it meanwhile.
        self._accepting: tuple[PoolJob, list[int | str]] | None = None
        self._closed = False
        self.engine = Supervisor(scheduler, self, owner=hostname)

    def close(self) -> None:
        """Kill the children that are left, and give back all resources."""
        self._closed = True
        self.engine.close()

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
            job = PoolJob(self, args, callbacks)
        else:
            job = CallJob(self, target, callbacks)
        try:
            self._admission.prepare(job, args, kwargs, hard, soft)
        except Exception as exc:
            # Whatever it is, it ends this job, and not the consumer.
            logger.error("%s can't be given to a child: %r", job.title, exc, exc_info=True)
            # The engine ignores requests to end a job that is closed. It never gets this one.
            job.state = JobState.CLOSED
            self.slots.occupy(job)
            self.engine.call(partial(self._conclude, job, partial(reporting.refused, job, exc)))
        else:
            self._take_in(job)
        return job

    def _take_in(self, job: PoolJob) -> None:
        """Give `job` to the engine, or let it wait for others of its group."""
        if self._waiting.admit(job):
            self.slots.occupy(job)
            self.engine.post(self._scheduler.submit, job)
        else:
            self.engine.call(self.slots.let_next_in)

    def drop_waiting(self) -> None:
        """Forget the jobs that the engine has not got: they stay with the broker."""
        self._waiting.clear()

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """End `jobs`, with the signal `signum` (default SIGTERM) for their children."""
        number = signals.signum(signum or "SIGTERM")
        for job in jobs:
            stops = state.should_terminate not in (None, False) or is_cancelled(job)
            reason = CancelReason.SHUTDOWN if stops else CancelReason.REVOKED
            if not self._closed:
                self.engine.terminate(job, number, reason)

    # -- accepted

    def accepted(self, job: PoolJob, child: Child, now: float) -> None:
        """Tell Celery that `child` has `job`. Then begin its trace, if it needs one."""
        job.pid = child.pid or 0
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
            if job.tracing is Tracing.ALWAYS:
                self._trace(job)

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

    def _trace(self, job: PoolJob, then: bytes = b"") -> None:
        """Have `job` traced, and let its tracer read the line `then` after that."""
        try:
            request = self._admission.trace_request(job)
        except Exception as exc:
            # Its message can't be sent.
            logger.error("%s can't be given to a tracer: %r", job.title, exc, exc_info=True)
            self._give_up(job, exc)
        else:
            self.engine.post(self._scheduler.trace, job, request + then)

    # -- in a child

    def progressed(self, job: PoolJob, meta: dict[str, Any]) -> None:
        """Let the tracer of `job` store what its child told of its progress."""
        self.engine.post(self._scheduler.tell, job, encode(Notice(id=job.task_id, progress=meta)))

    def soft_timed_out(self, job: PoolJob, told: bool) -> None:
        """Tell Celery that the soft limit of `job` is over; warn if its child was not `told`."""
        job.callbacks.timeout_callback(soft=True, timeout=job.soft_timeout)
        if not told and job.group is not None:
            self._news.untold_of_soft_limit(job.group)

    def overruled(self, job: PoolJob) -> None:
        """Store again that `job` is revoked: a Python child may have stored its own result over
        it."""
        if job.group in (PYTHON, ASYNCIO):
            store_revoked_again(job)

    def child_changed(self, change: Change) -> None:
        """Pass on what became of a child. Note whether tasks are watched in tracers."""
        child = change.child
        if isinstance(change, Started) and child.group.name == TRACERS:
            self._fast_path.tracers_are_silent = SILENT in child.unknown_features
        self._news.changed(change)

    # -- at the end

    def resolved(
        self, job: PoolJob, result: Outcome, facts: ChildFacts | None, unfinished: bool
    ) -> None:
        """Act on how the time of `job` with its child ended; `unfinished` if the end of its trace
        follows."""
        if job not in self.slots.jobs:
            # It was given up.
            return
        try:
            self._resolve(job, result, facts, unfinished)
        except Exception as exc:
            # Errors of Celery's callbacks are caught elsewhere: this one is our bug. It must not
            # cost the job's slot for good.
            logger.exception("%s can't be brought to its end", job.title)
            self._give_up(job, exc)

    def _resolve(
        self, job: PoolJob, result: Outcome, facts: ChildFacts | None, unfinished: bool
    ) -> None:
        answer = None
        if job.tracing is not Tracing.NEVER:
            answer = reporting.answer_for_tracer(job, result, facts)
        if answer is not None:
            self._take_answer(job, answer)
        else:
            job.ending = partial(self._report, job, result, facts)
            job.probes = _needs_probe(job, result)
            if not unfinished:
                self.finished(job, None)

    def _probe(self, job: PoolJob) -> None:
        """Have a tracer look whether the result backend answers. `finished` follows."""
        probe = encode(Notice(id=job.task_id, probe=job.task_name))
        self.engine.post(self._scheduler.follow_up, job, probe)

    def _take_answer(self, job: PoolJob, answer: Answer) -> None:
        if job.tracing is Tracing.UNLESS_OK and isinstance(answer.reply, Ok):
            runtime = time.monotonic() - job.begun_at
            report = partial(self._report_success, job, answer.reply.result, runtime)
            self._conclude(job, report)
            return
        line = encode(Notice(id=job.task_id, answer=answer))
        if job.trace is None:
            # The fast path ends here: a tracer takes over, with the answer at hand.
            self._trace(job, line)
        else:
            self.engine.post(self._scheduler.tell, job, line)

    def _report_success(self, job: PoolJob, result: Any, runtime: float) -> None:
        assert job.fast is not None
        job.callbacks.callback(self._fast_path.succeed(job.fast, result, runtime))

    def _report(
        self, job: PoolJob, result: Outcome, facts: ChildFacts | None, last: Reply | None
    ) -> None:
        """Tell Celery how the time of `job` with its child ended. If the limit was over when its
        trace was about to end, the trace counts: it has stored its state."""
        if isinstance(result, TimedOut) and isinstance(last, Traced):
            reporting.report_traced(self._app, job, last)
        else:
            reporting.report(self._app, job, result, facts)

    def _give_up(self, job: PoolJob, error: Exception) -> None:
        """Let `job` fail with `error`, unless Celery was told of its end."""
        if job in self.slots.jobs:
            failed = partial(job.callbacks.error_callback, outcome.exception_info(error))
            self._conclude(job, failed)
        self.engine.post(self._scheduler.give_up, job, repr(error))

    def finished(self, job: PoolJob, reply: Reply | None) -> None:
        """Tell Celery how `job` ended, whose trace is over, or which has had none."""
        if job not in self.slots.jobs:
            # It was given up.
            return
        if job.probes and not isinstance(reply, Traced):
            job.probes = False
            self._probe(job)
            return
        # The job must not refer to itself, or only the garbage collector could free it.
        ending, job.ending = job.ending, None
        if ending is None:
            ending = partial(reporting.report_traced, self._app, job)
        self._conclude(job, partial(ending, reply))

    def _conclude(self, job: PoolJob, report: Callable[[], None]) -> None:
        """Tell Celery how `job` ended, by calling `report`, and let the next one in."""
        try:
            report()
        except Exception as exc:
            reporting.end_failed(job, exc)
        finally:
            self._make_room(job)

    def _make_room(self, job: PoolJob) -> None:
        """Let another job have the slot of `job`, which is over."""
        follower = self._waiting.leave(job)
        if follower is None:
            self.slots.release(job)
        else:
            self.slots.pass_on(job, follower)
            self.engine.post(self._scheduler.submit, follower)

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


def _needs_probe(job: PoolJob, result: Outcome) -> bool:
    """Return whether the worker is about to store that an external job has failed. If the backend
    hangs, it is to hold up a tracer, and not the worker."""
    failed = isinstance(result, TimedOut) or (isinstance(result, Lost) and not result.stranded)
    if not failed or job.tracing is Tracing.NEVER or state.should_terminate:
        return False
    return stores_failure(job)
