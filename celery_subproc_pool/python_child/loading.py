"""Loads the worker's project into a fresh interpreter, as `worker.launch` says in the boot line.

It does what `celery.concurrency.prefork.process_initializer` does for a forked process, and before
that what a forked process inherits. It imports Celery: import it only when the search path is set.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing.util
import os
import pickle
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any

from billiard import process as billiard_process
from billiard import util as billiard_util
from billiard.common import REMAP_SIGTERM, TERM_SIGNAME, reset_signals
from celery import Celery, platforms, signals
from celery.app import trace
from celery.app.utils import find_app
from celery.local import Proxy

from ..settings import BOOTSTEPS
from ..wire.python import Boot
from .compat import block_joins, install_fixups
from .configuration import take_over
from .coroutines import await_tasks, run_to_end
from .forks import let_copies_end
from .recipes import make_task
from .replay import Replay

__all__ = ("after_fork", "begin", "load", "name_process")

logger = logging.getLogger("celery_subproc_pool")

#: Keeps the bootsteps alive: Celery holds the receivers that they connect weakly.
_alive: list[Replay] = []

#: The signals that a prefork process resets first (celery/concurrency/prefork.py:
#: `WORKER_SIGRESET`).
_RESET = ("SIGTERM", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGUSR1")


def load(
    boot: Boot,
    first: bool = False,
    prepare: Callable[[Celery], None] | None = None,
    is_template: bool = False,
) -> Celery:
    """Load the project and set up this process for it, as far as forked children can share that.

    Arguments:
        boot: the boot line.
        first: whether this process logs what is odd about the project. One does, for all.
        prepare: is called before Celery's tracers are built; by default, it lets coroutines run to
            their end.
        is_template: whether this process forks children.

    Returns:
        The project's app.

    Raises:
        Exception: whatever importing the project raises.
    """
    # As prefork: Ctrl-C and a remapped SIGTERM are for the worker.
    platforms.signals.reset(*_RESET)
    platforms.signals.ignore("SIGINT", *([TERM_SIGNAME] if REMAP_SIGTERM else []))
    app = _get_app(boot)
    app.set_current()
    app.set_default()
    replay = Replay(app, boot.hostname, boot.prelude)
    _set_up(app, boot, replay, first, logs=not (is_template and _own_log_files()))
    _alive.append(replay)
    (prepare or _let_coroutines_run)(app)
    _import_what_jobs_need(app, first)
    return app


def begin(app: Celery, boot: Boot, forked: bool) -> None:
    """Do what each child does for itself, after `load`.

    Arguments:
        app: the project's app.
        boot: the boot line.
        forked: whether a template has forked this process.
    """
    app.loader.init_worker_process()
    # Not before: a tracer keeps the pid of the process in which it was built.
    for name, task in app.tasks.items():
        task.__trace__ = trace.build_tracer(name, task, app.loader, boot.hostname, app=app)
    if forked and _own_log_files():
        _set_up_logging(app, boot.hostname)
    signals.worker_process_init.send(sender=boot.hostname)
    # From here on, SIGTERM raises `SystemExit`, and a task's `finally` blocks run.
    reset_signals()
    let_copies_end()


def after_fork() -> None:
    """Do in a forked child what `multiprocessing` and billiard do in theirs. Python itself does
    what is registered with `os.register_at_fork`, and seeds `random` anew."""
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    billiard_util._run_after_forkers()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _let_coroutines_run(app: Celery) -> None:
    # Hooks may be coroutine functions: tasks that are run in asyncio children.
    await_tasks(app, run_to_end)


def _set_up(app: Celery, boot: Boot, replay: Replay, first: bool, logs: bool) -> None:
    """Do what a worker does before it forks, in the same order."""
    replay.through("user_preload_options")
    if boot.options:
        app.config_from_cmdline(list(boot.options), namespace="worker")
    if boot.include:
        app.conf.include = tuple(boot.include)
    # Now, because modules imported below may read settings; and again at the end, because what
    # happens below may change them.
    take_over(app, boot.settings)
    block_joins()
    app.loader.init_worker()
    replay.through("celeryd_init", "worker_init")
    app.finalize()
    _complete(app, boot, first)
    install_fixups(app)
    if logs:
        _set_up_logging(app, boot.hostname)
    trace.setup_worker_optimizations(app, boot.hostname)
    replay.through(BOOTSTEPS, "celeryd_after_setup")
    lacking = take_over(app, boot.settings)
    if first:
        _complain(replay.complaints(), lacking)


def name_process(name: str, hostname: str, slot: int) -> None:
    """Name this process for logs and `ps`, and number it for ``%i`` in a log file's name."""
    billiard = billiard_process.current_process()
    billiard.index = slot
    name = f"{name}-{slot + 1}"
    billiard._name = name
    multiprocessing.current_process().name = name
    platforms.set_mp_process_title("celeryd", hostname=hostname)


def _get_app(boot: Boot) -> Celery:
    if boot.pickled_app is not None:
        return _pickled(boot.pickled_app)
    if boot.main_module is not None or boot.main_path is not None:
        _load_main(boot)
    if boot.app is None:
        raise LookupError("the worker did not say which app to load")
    app: Celery = find_app(boot.app)
    # The project may make its app on first use.
    return app._get_current_object() if isinstance(app, Proxy) else app


def _pickled(data: bytes) -> Celery:
    app = pickle.loads(data)
    assert isinstance(app, Celery)
    return app


def _load_main(boot: Boot) -> None:
    """Run the worker's ``__main__`` under another name, as `multiprocessing` does.

    Code under ``if __name__ == "__main__"`` does not run.
    """
    name = "__mp_main__"
    module = types.ModuleType(name)
    if boot.main_module is not None:
        content = runpy.run_module(boot.main_module, run_name=name, alter_sys=True)
    else:
        assert boot.main_path is not None
        content = runpy.run_path(boot.main_path, run_name=name)
    module.__dict__.update(content)
    sys.modules["__main__"] = sys.modules[name] = module


def _complete(app: Celery, boot: Boot, warn: bool) -> None:
    """Make the tasks that the worker has and loading the app did not make."""
    for name in [name for name in boot.tasks if name not in app.tasks]:
        reason = _get_task(app, name, boot)
        if name not in app.tasks and (warn or boot.traces):
            logger.warning(
                "The %s lack the task %s of the module %s, and %s if it arrives: %s. Define it at"
                " the top level of a module",
                "tracers" if boot.traces else "Python children",
                name,
                boot.tasks[name],
                "its options and hooks do not count" if boot.traces else "it fails",
                reason,
            )


def _get_task(app: Celery, name: str, boot: Boot) -> str:
    """Import the task's module, or make the task from its recipe.

    Returns:
        Why that failed. It counts only if the app still lacks the task.
    """
    reason = "importing the module does not define it"
    try:
        importlib.import_module(boot.tasks[name])
    except Exception as exc:
        reason = f"importing the module fails: {exc!r}"
    if name in app.tasks or name not in boot.recipes:
        return reason
    try:
        make_task(app, boot.recipes[name])
    except Exception as exc:
        reason = f"it can't be made from its class or function: {exc!r}"
    return reason


def _import_what_jobs_need(app: Celery, warn: bool) -> None:
    """Import what prefork's worker has imported before it forks. Connect to nothing.

    Otherwise the first job would import it, and a soft limit or a revoke during the import may
    leave modules half imported.
    """
    try:
        # Reading these attributes imports their modules.
        _ = app.backend, app.amqp, app.events
        app.connection_for_write().get_transport_cls()
    except Exception as exc:
        if warn:
            logger.warning("Jobs in the Python children may fail to store or to send: %r", exc)


def _complain(complaints: list[str], lacking: dict[str, str]) -> None:
    for complaint in complaints:
        logger.warning("%s", complaint)
    for name, reason in lacking.items():
        logger.warning(
            "The Python children lack the setting %s: %s. Set it in a module that loading the app"
            " imports",
            name,
            reason,
        )


def _own_log_files() -> bool:
    """Return whether each child has a log file of its own: its name has the child's number."""
    name = os.environ.get("CELERY_LOG_FILE") or ""
    return "%i" in name or "%I" in name


def _set_up_logging(app: Celery, hostname: str) -> None:
    """Log as the worker does. It left its options in the environment (celery/app/log.py)."""
    environ: Any = os.environ
    logfile = environ.get("CELERY_LOG_FILE") or None
    app.log.setup(
        int(environ.get("CELERY_LOG_LEVEL") or 0),
        logfile,
        bool(environ.get("CELERY_LOG_REDIRECT")),
        str(environ.get("CELERY_LOG_REDIRECT_LEVEL")),
        hostname=hostname,
    )
