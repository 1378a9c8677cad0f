"""The pool that Celery sees: Celery's contract for pools (`BasePool`), and the pool's life.

Celery calls it on the consumer's thread; with an event loop, that is the engine's thread too. The
autoscaler calls `grow` and `shrink` on a thread of its own, and an embedding program may stop the
pool from any thread. `runner` has what becomes of jobs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from billiard.einfo import ExceptionInfo
from celery import signals
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.utils.functional import noop
from celery.utils.log import get_logger
from celery.utils.nodenames import gethostname

from .. import PACKAGE, config
from ..core import stats
from ..core.scheduler import Scheduler
from ..errors import ConfigError, SpawnError
from ..python_child.coroutines import await_tasks, run_to_end
from ..settings import ROOT
from . import banner, control, launch
from .admission import Admission, WorkerLimits, seconds
from .events import ChildNews
from .intake import guard_consumer
from .jobs import Callbacks, PoolJob
from .prefetch import Prefetch
from .requests import is_revoked
from .routes import Routes
from .runner import Runner
from .session import Session, start_children
from .slots import slots_for
from .waiting import room_for

__all__ = ("Pool",)

logger = get_logger(__name__)


class Pool(BasePool, control.Controlled):
    """Runs tasks on warm child processes that speak line-delimited JSON.

    Use: ``celery -A proj worker -P celery_subproc_pool:Pool``. The setting ``subproc_pool``
    describes the children.

    Raises:
        ConfigError: a setting is wrong. On the command line, one line says so.
    """

    # With an event loop, Celery hands over a task when this semaphore has room.
    uses_semaphore = True
    # A shutdown from a signal handler may interrupt the engine's turn: the loop does it.
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self._settings = config.load(self.app.conf.get(ROOT))
            self._routes = Routes(self.app, self._settings)
            self._limits = _limits_of(self.options)
        except ConfigError as exc:
            if click.get_current_context(silent=True) is not None:
                raise click.ClickException(str(exc)) from None
            raise
        self._hostname = _hostname_of(self.options)
        self._news = ChildNews(self.app, self._routes, self)
        self._session: Session | None = None
        self._prefetch = Prefetch()
        #: Celery's worker, once it is set up.
        self._worker: Any = None
        signals.celeryd_after_setup.connect(self._on_after_setup)
        signals.worker_ready.connect(self._news.on_worker_ready)

    def _must_run(self) -> Session:
        session = self._session
        if session is None:
            raise RuntimeError("the pool is not running")
        return session

    def _on_after_setup(self, instance: Any, **_: Any) -> None:
        if instance.pool is self:
            self._worker = self._prefetch.worker = instance

    # -- life

    def on_start(self) -> None:
        """Spawn the children.

        Raises:
            WorkerShutdown: a child can't be spawned; the log says which and why.
        """
        try:
            runner = self._launch()
        except (ConfigError, SpawnError) as exc:
            logger.critical("The pool can't start: %s", exc)
            raise WorkerShutdown(EX_FAILURE) from None
        guard_consumer(self.app)
        # Celery calls hooks and errbacks of jobs that are lost, timed out or revoked here.
        await_tasks(self.app, run_to_end)
        self._session = Session(runner, self.options.get("threads", True))

    def _launch(self) -> Runner:
        """Return a runner whose children are up."""
        options, routes, hostname = self.options, self._routes, self._hostname
        groups = launch.groups(
            self.app,
            self._settings,
            routes,
            hostname,
            self.limit,
            options.get("maxtasksperchild"),
            options.get("max_memory_per_child"),
            self._worker,
        )
        command = launch.command_of(self.app)
        banner.show(command, self._settings, routes.external, groups, self.limit)
        admission = Admission(self.app, routes, groups, self._limits, hostname)
        scheduler = Scheduler(groups, self.limit, random.random)
        slots = slots_for(self.limit, options.get("semaphore"))
        waiting = room_for(groups, self.limit, is_revoked, self._prefetch)
        slots.resize(waiting.ahead)
        runner = Runner(self.app, scheduler, admission, slots, waiting, self._news, hostname)
        start_children(runner)
        return runner

    def did_start_ok(self) -> bool:
        """Return whether each group that needs children has one, or has had one that came up."""
        groups = self._must_run().engine.scheduler.groups.values()
        return all(group.children or group.came_up for group in groups if group.must_start)

    def register_with_event_loop(self, loop: Any) -> None:
        """Let kombu's hub `loop` turn the engine; called again after a lost connection."""
        session = self._session
        if session is not None:
            session.driver.attach(loop)

    def on_close(self) -> None:
        """Take no more jobs. Those that were not accepted stay with the broker."""
        session = self._session
        if session is not None:
            # First: the jobs that the engine drops must not let in those that wait for a slot.
            session.slots.close()
            session.runner.drop_waiting()
            session.engine.post(session.engine.scheduler.close)

    def on_stop(self) -> None:
        """Let the accepted jobs end, then the children: a warm shutdown."""
        session = self._session
        if session is None:
            return
        self.on_close()
        session.drain()
        # In a signal handler, the turn that it has interrupted goes on.
        if not session.engine.turning:
            self.on_terminate()

    def on_terminate(self) -> None:
        """Kill the children, whatever they do, and free all resources: a cold shutdown."""
        session, self._session = self._session, None
        if session is not None:
            # A consumer in another thread must not wait for a slot for good.
            session.slots.close()
            session.end()

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
        """Take in a task, as `celery.worker.request.Request.execute_using_pool` gives it; or
        another callable.

        Arguments:
            target: Celery's tracer, or the callable for a Python child.
            args, kwargs: its arguments. The tracer's are the task's name, its id, and the rest of
                the message.
            callback, error_callback, accept_callback, timeout_callback: see `jobs.Callbacks`.
            soft_timeout, timeout: the request's or task's soft and hard limit, in seconds.
            waitforslot: whether to wait for a free slot, see `slots`.

        Returns:
            The job, with `terminate(signum)`; None once the pool is closed.
        """
        session = self._session
        if waitforslot and session is not None:
            session.slots.wait()
        if self._state != self.RUN or session is None or session.engine.failed:
            return None
        callbacks = Callbacks(accept_callback, callback, error_callback, timeout_callback)
        return session.runner.submit(target, args, kwargs, callbacks, timeout, soft_timeout)

    def terminate_job(self, pid: int, signal: int | str | None = None) -> None:
        """Do nothing, except for the job that Celery is being told of as accepted. Never raises.

        A pid does not tell which job is meant: while the result of a job is stored, its child has
        the next job already. Celery calls `PoolJob.terminate`, too: that ends the job. Only inside
        of the accept callback it may not have the `PoolJob` yet; but there it is clear which job is
        meant.
        """
        session = self._session
        if session is not None:
            session.runner.terminate_accepted(pid, signal)

    def flush(self) -> None:
        """Drop the jobs that were not accepted yet: the broker will deliver them again."""
        session = self._session
        if session is not None:
            session.runner.drop_waiting()
            session.engine.post(session.engine.scheduler.flush)

    # -- restart

    def restart(self) -> None:
        """Replace all children, while jobs go on: the remote control command `pool_restart`."""
        self.restart_group(None)

    def restart_group(self, name: str | None) -> list[str]:
        """Replace the children of the group `name` by fresh ones; those of all groups if None.

        A successor boots beside each child and takes its place when it is ready. If it can't start,
        the old child stays. This method returns before that.

        Returns:
            The names of the groups.

        Raises:
            ConfigError: there is no such group; or a task, which may be new, names a group that
                does not exist. Nothing was replaced.
        """
        return self._must_run().restart(name, self._boot_line_anew)

    def _boot_line_anew(self, group: str) -> bytes:
        """Route the tasks that there are by now; return the first line for the children of `group`,
        Python children or tracers."""
        self._routes.renew()
        guard_consumer(self.app)
        await_tasks(self.app, run_to_end)
        return launch.boot_line(
            self.app, self._settings, group, self._hostname, self._routes.external
        )

    # -- size

    def grow(self, n: int = 1) -> None:
        """Add `n` to the concurrency, and to each group without a size the children that it needs.

        Do nothing once the pool has ended: the autoscaler's thread may come late, and it would end
        the process if this raised.
        """
        session = self._session
        if session is not None:
            self._resize(session, session.engine.scheduler.grow, n, by=n)

    def shrink(self, n: int = 1) -> None:
        """Take `n` off the concurrency, and the children that are not needed then from every group
        without a size.

        Raises:
            ValueError: too few can be removed: a busy child with one job at a time can't.
        """
        session = self._must_run()
        session.engine.scheduler.check_shrink(n)
        self._resize(session, session.engine.scheduler.shrink, n, by=-n)

    def _resize(self, session: Session, event: Callable[..., Any], n: int, by: int) -> None:
        """Change the concurrency by `by` in all places that have it: the engine, by its `event`
        for `n`; `limit`, which Celery reads; and the slots."""
        session.engine.post(event, n)
        self.limit += by
        session.slots.resize(by)

    # -- facts

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        session = self._session
        info["processes"] = session.engine.processes if session is not None else []
        info["max-tasks-per-child"] = self.options.get("maxtasksperchild") or "N/A"
        info["put-guarded-by-semaphore"] = bool(self.putlocks)
        info["timeouts"] = (self._limits.soft or 0, self._limits.hard or 0)
        info["writes"], info["groups"] = stats.writes((), 0), {}
        if session is not None:
            info["writes"], info["groups"] = session.numbers()
        return info

    def child_rows(self) -> list[dict[str, Any]]:
        """Return a row for each child, as `stats.rows`: what `inspect subproc` shows."""
        return self._must_run().rows()


def _hostname_of(options: Mapping[str, Any]) -> str:
    """Return the worker's node name, from the `options` that Celery gives to its pool."""
    _, hostname = options.get("initargs") or (None, None)
    return str(hostname or gethostname())


def _limits_of(options: Mapping[str, Any]) -> WorkerLimits:
    """Return the time limits of a worker, from the `options` that Celery gives to its pool.

    Raises:
        ConfigError: one is not a number of seconds.
    """
    try:
        return WorkerLimits(
            seconds(options.get("timeout"), "task_time_limit"),
            seconds(options.get("soft_timeout"), "task_soft_time_limit"),
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from None


control.register()

# The name that `-P` takes, that `inspect stats` shows, and that the worker's banner ends with.
Pool.__module__ = PACKAGE
