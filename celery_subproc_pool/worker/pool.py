"""The pool that Celery sees: an adapter, without policy.

Layer: above `drivers`, `jobs` and `tasks`. It turns `apply_async` into jobs of the engine, and
what becomes of them into Celery's callbacks, all called on the thread that turns the engine.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import click
from billiard.einfo import ExceptionInfo
from celery import signals as celery_signals
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE, signals
from celery.utils.functional import noop
from celery.utils.log import get_logger
from celery.utils.nodenames import gethostname
from celery.worker import state

from .. import PACKAGE, config
from ..core import stats
from ..core.actions import Change, Started
from ..core.model import Child, Group, JobState
from ..core.outcomes import ChildFacts, Outcome
from ..core.scheduler import Scheduler
from ..engine.reports import some_of
from ..engine.supervisor import Supervisor
from ..errors import ConfigError, SpawnError
from ..python_child import codec
from ..wire import messages
from ..wire.messages import CancelReason
from . import banner, control, greetings, launch, outcome, reporting
from .calls import CallJob
from .drivers import HubDriver, ThreadDriver, wait_for_children
from .events import ChildEvents
from .fast_path import Shortcut, Untraced
from .intake import guard_consumer, seconds
from .jobs import Callbacks, PoolJob
from .requests import deserialized_body, is_cancelled, is_tracer, store_revoked_again
from .routes import Routes
from .threads import TracingThreads

__all__ = ("Pool",)

logger = get_logger(__name__)

#: Seconds that a remote control command waits for the engine: less than whoever sent it does.
ANSWER_PATIENCE = 0.5

#: Seconds that a cold shutdown waits for results that are being stored.
STORE_GRACE = 5.0


class Pool(BasePool, control.Controlled):
    """Runs tasks on warm child processes that speak line-delimited JSON.

    Use: ``celery -A proj worker -P celery_subproc_pool:Pool``, with the children described by
    the setting ``subproc_pool``.

    Raises:
        ConfigError: a setting is wrong. On the command line, it is shown as one line.
    """

    # With an event loop, Celery hands over a task when it has a slot of this semaphore.
    uses_semaphore = True
    # A shutdown from a signal handler may interrupt the engine's turn: it is left to the loop.
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self._settings = config.load(self.app.conf.get(config.ROOT))
            self._routes = Routes(self.app, self._settings)
            #: The worker's limits, in seconds.
            self._timeout = self._option_in_seconds("timeout", "task_time_limit")
            self._soft_timeout = self._option_in_seconds("soft_timeout", "task_soft_time_limit")
        except ConfigError as exc:
            if click.get_current_context(silent=True) is not None:
                raise click.ClickException(str(exc)) from None
            raise
        self._untraced = Untraced(self.app, self._hostname, self._routes.tracked)
        # Not by `app.tasks` for each job: that takes a lock.
        self._tasks = self.app.tasks
        self._semaphore = self.options.get("semaphore")
        #: Not over yet. This keeps them alive: Celery does not.
        self._jobs: set[PoolJob] = set()
        #: The job that Celery is being told of as accepted, and how it asked to end it.
        self._accepting: PoolJob | None = None
        self._accepting_signal: int | str | None = None
        #: In a cold shutdown: until when results may be stored.
        self._patience: float | None = None
        self._tracers = TracingThreads("subproc-tracer")
        self._supervisor: Supervisor | None = None
        self._driver: HubDriver | ThreadDriver | None = None
        #: Without an event loop, `apply_async` waits for it instead of the semaphore.
        self._slot_freed = threading.Condition()
        #: Groups whose children can't be told of soft limits, once the log has been told.
        self._soft_limits_warned: set[str] = set()
        #: Groups of whose children one has said that it is ready.
        self._greeted: set[str] = set()
        self._events = ChildEvents()
        #: Celery's, once the worker is ready.
        self._consumer: Any = None
        #: Celery's worker, once it is set up.
        self._worker: Any = None
        celery_signals.celeryd_after_setup.connect(self._on_after_setup)
        celery_signals.worker_ready.connect(self._on_worker_ready)

    def _option_in_seconds(self, option: str, setting: str) -> float | None:
        try:
            return seconds(self.options.get(option), setting)
        except ValueError as exc:
            raise ConfigError(str(exc)) from None

    # -- life

    def on_start(self) -> None:
        """Spawn the children.

        Raises:
            WorkerShutdown: one can't be spawned; the log says which and why.
        """
        try:
            groups = launch.groups(
                self.app,
                self._settings,
                self._routes,
                self._hostname,
                self.limit,
                self.options.get("maxtasksperchild"),
                self.options.get("max_memory_per_child"),
                self._worker,
            )
            self._show_banner(groups)
            scheduler = Scheduler(groups, self.limit, random.random)
            supervisor = Supervisor(scheduler, self, owner=self._hostname)
            try:
                supervisor.start()
                wait_for_children(supervisor)
            except BaseException:
                supervisor.close()
                raise
        except (ConfigError, SpawnError) as exc:
            logger.critical("The pool can't start: %s", exc)
            raise WorkerShutdown(EX_FAILURE) from None
        self._supervisor = supervisor
        guard_consumer(self.app)
        threaded = self.options.get("threads", True)
        self._driver = ThreadDriver(supervisor) if threaded else HubDriver(supervisor)
        self._driver.start()

    @property
    def _hostname(self) -> str:
        _, hostname = self.options.get("initargs") or (None, None)
        return str(hostname or gethostname())

    def _show_banner(self, groups: dict[str, Group]) -> None:
        command = launch.command_of(self.app)
        if command is not None and not command.obj.quiet:
            banner.show(self._describe(group) for group in groups.values())

    def _describe(self, group: Group) -> str:
        tasks: Iterable[str] = ["all others"]
        if group.name in self._settings.children:
            tasks = banner.external_tasks(group.name, group.settings, self._routes.external)
        size = banner.size_of(group.settings, len(group.slots))
        return banner.describe(group.name, group.settings.command, size, tasks)

    def _on_after_setup(self, instance: Any, **_: Any) -> None:
        if instance.pool is self:
            self._worker = instance

    def _on_worker_ready(self, sender: Any, **_: Any) -> None:
        if sender.pool is self:
            self._consumer = sender
            self._events.attach(sender)

    def did_start_ok(self) -> bool:
        """Return whether every group that is to have children has one, or had: what comes later
        heals by itself."""
        groups = self._engine.scheduler.groups.values()
        return all(group.children or group.came_up for group in groups if group.slots)

    def register_with_event_loop(self, loop: Any) -> None:
        """Have kombu's hub `loop` turn the engine. Called again after a lost connection."""
        if self._driver is not None:
            self._driver.attach(loop)

    def on_close(self) -> None:
        """Take no more jobs; those that were not accepted stay with the broker."""
        supervisor = self._supervisor
        if supervisor is None:
            return
        if self._semaphore is not None:
            # What waits for a slot must not be handed over when one becomes free.
            self._semaphore.clear()
        supervisor.post(supervisor.scheduler.close)
        with self._slot_freed:
            self._slot_freed.notify_all()

    def on_stop(self) -> None:
        """Let the accepted jobs end, then the children. A warm shutdown."""
        supervisor, driver = self._supervisor, self._driver
        if supervisor is None or driver is None:
            return
        self.on_close()
        if not supervisor.failed:
            driver.drain(self._has_unfinished_jobs)
        if not supervisor.turning:
            self._end()

    def on_terminate(self) -> None:
        """Kill the children, whatever they do. A cold shutdown."""
        self._end()

    def flush(self) -> None:
        """Drop the jobs that were not accepted yet: the broker will deliver them again."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.post(_timeless(supervisor.scheduler.flush))

    def _has_unfinished_jobs(self) -> bool:
        """Return whether a shutdown has jobs to wait for.

        In a cold one, which may also come in the midst of a warm one, all jobs were cancelled:
        what is left are results that are being stored, maybe in a backend that hangs.
        """
        if self._has_failed:
            return False
        if state.should_terminate and self._patience is None:
            self._patience = time.monotonic() + STORE_GRACE
        return bool(self._jobs) and (self._patience is None or time.monotonic() < self._patience)

    def _end(self) -> None:
        """Give back all resources; kill what is left."""
        supervisor, self._supervisor = self._supervisor, None
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.halt()
        if supervisor is not None:
            supervisor.close()
        self._tracers.close()

    # -- jobs

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Any,
        callback: Callable[[tuple[int, Any, float]], None] = noop,
        error_callback: Callable[[ExceptionInfo], None] = noop,
        accept_callback: Callable[[int, float], None] = noop,
        timeout_callback: Callable[..., None] = noop,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        waitforslot: bool = False,
        **_: Any,
    ) -> PoolJob | None:
        """Take in a task, as `celery.worker.request.Request.execute_using_pool` gives it; or any
        other callable.

        Arguments:
            target: Celery's tracer, or what a Python child is to call.
            args: its arguments. The tracer's: the task's name, its id, and the rest of the message.
            kwargs: its keyword arguments; the tracer has none.
            callback: called with the tracer's ``(failed, retval, runtime)``, or with what the
                callable returned: as JSON holds it, otherwise its repr.
            error_callback: called with an `ExceptionInfo` if the tracer could not finish, or the
                callable.
            accept_callback: called with the child's pid and the monotonic time, when a child
                has the job.
            timeout_callback: called with ``soft`` and ``timeout`` when a limit is over.
            soft_timeout: the request's or task's soft limit, in seconds.
            timeout: the request's or task's hard limit, in seconds.
            waitforslot: whether to wait while as many jobs are under way as the concurrency
                allows. Celery asks so where there is no event loop: it paces the consumer,
                which sends its acknowledgements between two tasks.

        Returns:
            The job, with `terminate(signum)`; None once the pool is closed.
        """
        if waitforslot:
            self._wait_for_slot()
        supervisor = self._supervisor
        if self._state != self.RUN or supervisor is None or supervisor.failed:
            return None
        callbacks = Callbacks(accept_callback, callback, error_callback, timeout_callback)
        call = None
        if not is_tracer(target, args, error_callback):
            call = CallJob(self, target, callbacks)
        job = call or PoolJob(self, target, args, callbacks)
        self._jobs.add(job)
        groups = supervisor.scheduler.groups
        try:
            if call is None:
                self._prepare(job, groups, timeout, soft_timeout)
            else:
                self._limit_call(call, timeout, soft_timeout)
                call.prepare(args, kwargs, config.PYTHON in groups)
        except Exception as exc:
            # Whatever it is, it ends this job, and not the consumer.
            logger.error("%s can't be given to a child: %r", job.title, exc, exc_info=True)
            # The engine never has it, and is asked nothing of it either.
            job.state = JobState.CLOSED
            supervisor.call(partial(self._conclude, job, partial(reporting.refused, job, exc)))
        else:
            supervisor.post(supervisor.scheduler.submit, job)
        return job

    def _prepare(self, job: PoolJob, groups: Mapping[str, Group], hard: Any, soft: Any) -> None:
        """Find out who does `job`, within which limits, and with which request.

        Raises:
            Exception: the job can't be done, whatever the reason.
        """
        job.group = name = self._routes.find(job.task_name, config.PYTHON in groups)
        if name is not None:
            self._limit(job, hard, soft, groups[name].settings.timeout)
        if name == config.PYTHON:
            job.traced_here = False
            job.request = codec.encode_task(job.task_id, job.arguments)
        elif name is not None:
            body = deserialized_body(job.callbacks.error_callback)
            shortcut = self._untraced.shortcut(job.arguments, groups[name].tells_progress, body)
            if shortcut is not None:
                job.traced_here = False
                job.request, job.shortcut = shortcut.line, shortcut

    def _limit(self, job: PoolJob, hard: Any, soft: Any, default: float | None) -> None:
        """Set the limits of `job`: those that Celery has found, or its group's hard one."""
        own_hard, own_soft = job.arguments[2].get("timelimit") or (None, None)
        # Celery notes a task's limits when the worker starts; the remote control command
        # `time_limit` sets them anew, at the task.
        task = self._tasks[job.task_name]
        hard = seconds(hard if own_hard else task.time_limit, "the hard time limit")
        soft = seconds(soft if own_soft else task.soft_time_limit, "the soft time limit")
        job.timeout = hard or self._timeout or default
        job.soft_timeout = soft or self._soft_timeout

    def _limit_call(self, call: CallJob, hard: Any, soft: Any) -> None:
        """Set the limits of `call`: those that its caller has given, or the worker's."""
        call.timeout = seconds(hard, "timeout") or self._timeout
        call.soft_timeout = seconds(soft, "soft_timeout") or self._soft_timeout

    def terminate_job(self, pid: int, signal: int | str | None = None) -> None:
        """Do nothing: a pid does not tell which job is meant. Never raises.

        While one job of a child has its result stored, the child has the next one already. And
        Celery asks before it has noted that it asked, so that the end of the job would be told
        twice. `Request.terminate` and `Request.cancel` call `PoolJob.terminate` at their end.

        In the callback that accepts a job, Celery may not have the `PoolJob` yet, but there it
        is clear which one is meant: it ends after the callback. On another thread, somebody else's
        job is meant, maybe of the same child.
        """
        supervisor, job = self._supervisor, self._accepting
        if supervisor is None or job is None or not supervisor.on_own_thread:
            return
        if job.pid == pid:
            self._accepting_signal = signal or "SIGTERM"

    # -- for jobs: `jobs.Owner`

    def terminate_jobs(self, jobs: Sequence[PoolJob], signum: int | str | None) -> None:
        """End `jobs`, with the signal `signum` (default SIGTERM) for their children."""
        supervisor = self._supervisor
        number = signals.signum(signum or "SIGTERM")
        if supervisor is not None:
            for job in jobs:
                stops = state.should_terminate not in (None, False) or is_cancelled(job)
                reason = CancelReason.SHUTDOWN if stops else CancelReason.REVOKED
                supervisor.terminate(job, number, reason)

    def provide(self, job: PoolJob, line: bytes) -> None:
        """`job` has its request line."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.post(supervisor.scheduler.provide, job, line)

    def traced(self, job: PoolJob) -> None:
        """The tracing thread of `job` is through."""
        supervisor = self._supervisor
        if supervisor is None:
            return
        if job.traced_here:
            supervisor.post(supervisor.scheduler.finish, job)
        else:
            supervisor.call(partial(self.finished, job))

    # -- the engine's callbacks: `supervisor.Listener`

    def accepted(self, job: PoolJob, child: Child | None, now: float) -> None:
        """`job` is handed to `child`: tell Celery, then trace it."""
        job.pid = os.getpid() if child is None or child.pid is None else child.pid
        self._accepting = job
        try:
            job.callbacks.accept_callback(job.pid, now)
        except Exception:
            reporting.acceptance_failed(job)
        finally:
            self._accepting = None
            self._end_if_asked(job)
            if job.traced_here:
                self._start(job, job.trace)

    def _end_if_asked(self, job: PoolJob) -> None:
        signum, self._accepting_signal = self._accepting_signal, None
        if signum is not None:
            self.terminate_jobs([job], signum)

    def _start(self, job: PoolJob, work: Callable[[], Callable[[], None] | None]) -> None:
        """Have `work` done for `job`, in a thread, since it may block."""
        try:
            self._tracers.run(work)
        except RuntimeError as exc:
            # The system gives no more threads: the job fails, and its child is free again.
            job.ending = partial(job.callbacks.error_callback, outcome.exception_info(exc))
            self.traced(job)

    def resolved(self, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
        """The time of `job` with a child is over."""
        try:
            self._resolve(job, result, facts)
        except Exception as exc:
            # A fault of ours, for Celery's are seen to: it must not cost the job's slot for good.
            logger.exception("%s can't be brought to its end", job.title)
            self._give_up(job, exc)

    def _resolve(self, job: PoolJob, result: Outcome, facts: ChildFacts | None) -> None:
        report = partial(reporting.report, self.app, job, result, facts)
        answer = None if job.group == config.PYTHON else reporting.for_tracer(result, facts)
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
            job.answer(answer)
            self._start(job, job.trace)

    def _give_up(self, job: PoolJob, error: Exception) -> None:
        """Let `job` fail with `error`, unless it has ended."""
        if job.traced_here:
            job.answer(error)
        elif job in self._jobs:
            failed = partial(job.callbacks.error_callback, outcome.exception_info(error))
            self._conclude(job, failed)

    def _succeed(self, job: PoolJob, reply: messages.Ok) -> None:
        """Bring a job that was not traced to its good end: in a thread, if that may block."""
        shortcut = job.shortcut
        assert shortcut is not None
        runtime = time.monotonic() - job.begun_at
        job.ending = partial(self._report_success, job, shortcut, reply.result, runtime)
        if shortcut.stores:
            self._start(job, partial(self._store, job, shortcut, reply))
        else:
            self.finished(job)

    def _store(
        self, job: PoolJob, shortcut: Shortcut, reply: messages.Ok
    ) -> Callable[[], None] | None:
        """Store the result of a job that was not traced. Called in a thread.

        Returns:
            As `PoolJob.trace`, which has the job fail, as Celery would, if that can't be done.
        """
        try:
            self._untraced.store(shortcut, reply.result)
        except Exception:
            job.answer(reply)
            return job.trace()
        return partial(self.traced, job)

    def _report_success(
        self, job: PoolJob, shortcut: Shortcut, result: Any, runtime: float
    ) -> None:
        """Tell Celery that a job which was not traced has succeeded."""
        job.callbacks.callback(self._untraced.succeed(shortcut, result, runtime))

    def unwound(self, job: PoolJob, report: Callable[[], None]) -> None:
        """`job`, which was abandoned, stores nothing any more: its end can be told by `report`."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.call(partial(self._conclude, job, report))

    def overruled(self, job: PoolJob) -> None:
        """The child of `job`, which was revoked, is through with it. A Python child has stored an
        end of its own, over what Celery has stored."""
        if job.group == config.PYTHON:
            store_revoked_again(job)

    def progressed(self, job: PoolJob, meta: dict[str, Any]) -> None:
        """The child of `job` told how far it is."""
        if job.traced_here:
            job.progress(meta)

    def child_changed(self, change: Change) -> None:
        """A child came into service, or another has replaced it."""
        group = change.child.group
        if isinstance(change, Started) and group.settings.handshake and group.name != config.PYTHON:
            self._greet(change.child)
        self._events.send(change)

    def _greet(self, child: Child) -> None:
        """Act on what `child` said in its handshake."""
        name = child.group.name
        new = self._routes.announce(name, child.tasks) if child.tasks else []
        if new:
            logger.info("The children of %s announce the tasks %s", name, some_of(new))
            guard_consumer(self.app)
            if self._consumer is not None:
                self._consumer.update_strategies()
        if name in self._greeted:
            return
        self._greeted.add(name)
        for complaint in greetings.complaints(child, self._routes.takes_tasks(name)):
            logger.warning("The children of the group %s %s. This is said once", name, complaint)

    def _conclude(self, job: PoolJob, report: Callable[[], None]) -> None:
        """Tell Celery how `job` ended, and let the next one have its place."""
        try:
            report()
        except Exception as exc:
            reporting.end_failed(job, exc)
        finally:
            self._release(job)

    def failed(self, error: Exception) -> None:
        """The engine itself has failed, and stands still: end the worker, which is of no use
        without it. What was not acknowledged, the broker delivers again."""
        logger.critical(
            "The pool's engine failed, which is a bug of celery_subproc_pool; the worker shuts"
            " down. %d jobs were in flight; those that are acknowledged late come again: %r",
            len(self._jobs),
            error,
            exc_info=True,
        )
        # Not `should_terminate`, after which the exit status is 0. There is nothing to wait for.
        state.should_stop = EX_FAILURE
        with self._slot_freed:
            self._slot_freed.notify_all()

    def finished(self, job: PoolJob) -> None:
        """The tracer of `job` brought it to its end: tell Celery."""
        # No job refers to itself any more: it need not wait for the garbage collector.
        ending, job.ending = job.ending, None
        assert ending is not None
        self._conclude(job, ending)

    def soft_timed_out(self, job: PoolJob, told: bool) -> None:
        """The soft limit of `job` is over."""
        job.callbacks.timeout_callback(soft=True, timeout=job.soft_timeout)
        if not told and job.group is not None and job.group not in self._soft_limits_warned:
            self._soft_limits_warned.add(job.group)
            logger.warning(
                "The children of the group %s can't be told of soft time limits, and go on: set"
                " %s.children.%s.soft_timeout_signal if they know what to do with a signal, or let"
                " them announce 'cancel' in a handshake. This is said once",
                job.group,
                config.ROOT,
                job.group,
            )

    def _wait_for_slot(self) -> None:
        with self._slot_freed:
            self._slot_freed.wait_for(self._need_not_wait)

    def _need_not_wait(self) -> bool:
        return len(self._jobs) < self.limit or self._state != self.RUN or self._has_failed

    @property
    def _has_failed(self) -> bool:
        """Whether the engine has: nothing that it has in hand comes to an end."""
        return self._supervisor is not None and self._supervisor.failed

    def _release(self, job: PoolJob) -> None:
        self._jobs.remove(job)
        if self._semaphore is None:
            with self._slot_freed:
                self._slot_freed.notify()
            return
        try:
            self._semaphore.release()
        except Exception:
            # Celery had the next job ready for this slot, and failed with it.
            logger.exception("Celery can't begin the job that waited for a slot; the next one may")
            self._semaphore.release()

    # -- restart

    def restart(self) -> None:
        """Replace all children, while jobs go on: Celery's remote control command `pool_restart`,
        after it has reloaded modules."""
        self.restart_group(None)

    def restart_group(self, name: str | None) -> list[str]:
        """Replace the children of the group `name` by fresh ones, or those of all groups.

        A successor boots beside each child and takes its place when it works; if it can't start,
        the old one stays. Returns before that.

        Returns:
            The names of the groups.

        Raises:
            ConfigError: there is no such group; or a task, which may be new, asks for children that
                there are not. Nothing was replaced.
        """
        engine = self._engine
        groups = engine.scheduler.groups
        if name is not None and name not in groups:
            raise ConfigError(
                f"expected one of this worker's groups ({', '.join(groups)}), got {name!r}"
            )
        chosen = list(groups) if name is None else [name]
        if config.PYTHON in chosen:
            self._load_tasks_anew(engine)
        logger.info("Restarting the children of %s", ", ".join(chosen))
        engine.post(engine.scheduler.restart, [groups[each] for each in chosen])
        return chosen

    def _load_tasks_anew(self, engine: Supervisor) -> None:
        """Let the next children know the tasks that the worker knows by now."""
        self._routes.renew()
        guard_consumer(self.app)
        boot = launch.boot_line(
            self.app, self._settings.python, self._hostname, self._routes.external
        )
        engine.post(engine.scheduler.change_boot, config.PYTHON, boot)

    # -- size

    def grow(self, n: int = 1) -> None:
        """Add `n` children to every group without a size of its own.

        Nothing happens once the worker stops: the autoscaler's thread may come late, and would end
        the process if this raised.
        """
        supervisor = self._supervisor
        if supervisor is None:
            return
        supervisor.post(supervisor.scheduler.grow, n)
        self.limit += n
        if self._semaphore is not None:
            self._semaphore.grow(n)
        with self._slot_freed:
            self._slot_freed.notify_all()

    def shrink(self, n: int = 1) -> None:
        """Take away `n` children that are not busy, of every group without a size of its own.

        Raises:
            ValueError: there are not as many.
        """
        self._engine.scheduler.check_shrink(n)
        self._engine.post(self._engine.scheduler.shrink, n)
        self.limit -= n
        if self._semaphore is not None:
            self._semaphore.shrink(n)

    # -- facts

    @property
    def _engine(self) -> Supervisor:
        if self._supervisor is None:
            raise RuntimeError("the pool is not running")
        return self._supervisor

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        supervisor = self._supervisor
        info["processes"] = supervisor.processes if supervisor is not None else []
        info["max-tasks-per-child"] = self.options.get("maxtasksperchild") or "N/A"
        info["put-guarded-by-semaphore"] = bool(self.putlocks)
        info["timeouts"] = (self._soft_timeout or 0, self._timeout or 0)
        info["writes"], info["groups"] = self._numbers()
        return info

    def _numbers(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what was written, as `facts.writes`, and the numbers of each group."""
        supervisor = self._supervisor
        if supervisor is None:
            return stats.writes((), 0), {}
        groups = supervisor.scheduler.groups

        def look() -> tuple[dict[str, Any], dict[str, Any]]:
            written = stats.writes(groups.values(), supervisor.writing)
            return written, {name: stats.group_facts(group) for name, group in groups.items()}

        return supervisor.ask(look, ANSWER_PATIENCE)

    def child_rows(self) -> list[dict[str, Any]]:
        """Return a row for each child, as `facts.rows`: what `inspect subproc` shows."""
        engine = self._engine
        groups = engine.scheduler.groups.values()
        return engine.ask(
            lambda: stats.rows(groups, time.monotonic(), engine.memory_of), ANSWER_PATIENCE
        )


def _timeless(event: Callable[[], Any]) -> Callable[[float], Any]:
    """Adapt an event that does not care when it happens."""
    return lambda now: event()


control.register()

# The name that `-P` takes, that `inspect stats` shows, and that the worker's banner ends with.
Pool.__module__ = PACKAGE
