"""How a fresh interpreter becomes a process of its worker's project, seen from the child.

Layer: above `messages`; imports Celery, so it is itself imported only when the search path is
right. What prefork's `celery.concurrency.prefork.process_initializer` does for a forked process,
this does for one that was not forked; `launch` is the worker's side of it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import pickle
import runpy
import sys
import types
from typing import Any

from billiard import process as billiard_process
from billiard.common import REMAP_SIGTERM, TERM_SIGNAME, reset_signals
from celery import Celery, platforms, signals
from celery.app import trace
from celery.app.utils import find_app
from celery.local import Proxy

from ..settings import BOOTSTEPS
from ..wire.python import Boot
from .codec import Recipe
from .compat import block_joins, install_fixups
from .configuration import take_over
from .forks import let_copies_end
from .replay import Replay

__all__ = ("load",)

logger = logging.getLogger("celery_subproc_pool")

_alive: list[Replay] = []

#: As prefork: what a child resets of what it inherited, and what it leaves to the worker.
_RESET = ("SIGTERM", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGUSR1")


def load(boot: Boot, slot: int, first: bool = False) -> Celery:
    """Load the project, set up this process for it, and return the app.

    Arguments:
        boot: what the worker says.
        slot: this child's place among the Python children, from 0 on.
        first: whether it is for this child to say what is odd about the project, once for all.

    Raises:
        Exception: whatever importing the project raises.
    """
    _name_process(boot.hostname, slot)
    # As prefork, which leaves it to the worker what a Ctrl-C means, and a remapped SIGTERM.
    platforms.signals.reset(*_RESET)
    platforms.signals.ignore("SIGINT", *([TERM_SIGNAME] if REMAP_SIGTERM else []))
    app = _get_app(boot)
    app.set_current()
    app.set_default()
    replay = Replay(app, boot.hostname, boot.prelude)
    _set_up(app, boot, replay, first)
    # Celery holds receivers weakly: what bootsteps have connected must live.
    _alive.append(replay)
    for name, task in app.tasks.items():
        task.__trace__ = trace.build_tracer(name, task, app.loader, boot.hostname, app=app)
    signals.worker_process_init.send(sender=boot.hostname)
    _import_what_jobs_need(app, first)
    # From here on, a signal that ends the process lets `finally` blocks of a task run.
    reset_signals()
    let_copies_end()
    return app


def _set_up(app: Celery, boot: Boot, replay: Replay, first: bool) -> None:
    """Do what a worker does before it forks, in the same order."""
    replay.through("user_preload_options")
    if boot.options:
        app.config_from_cmdline(list(boot.options), namespace="worker")
    if boot.include:
        app.conf.include = tuple(boot.include)
    # Before more of the project is imported, which may read it; and again when all is done that may
    # have set something else than the worker has.
    take_over(app, boot.settings)
    block_joins()
    app.loader.init_worker()
    replay.through("celeryd_init", "worker_init")
    app.finalize()
    _complete(app, boot, first)
    install_fixups(app)
    app.loader.init_worker_process()
    _set_up_logging(app, boot.hostname)
    trace.setup_worker_optimizations(app, boot.hostname)
    replay.through(BOOTSTEPS, "celeryd_after_setup")
    lacking = take_over(app, boot.settings)
    if first:
        _complain(replay.complaints(), lacking)


def _name_process(hostname: str, slot: int) -> None:
    """Name this process for logs, and number it for ``%i`` in a log file's name."""
    billiard = billiard_process.current_process()
    billiard.index = slot
    name = f"SubprocPoolWorker-{slot + 1}"
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
    # A project may have it made when it is first used.
    return app._get_current_object() if isinstance(app, Proxy) else app


def _pickled(data: bytes) -> Celery:
    app = pickle.loads(data)
    assert isinstance(app, Celery)
    return app


def _load_main(boot: Boot) -> None:
    """Run the worker's ``__main__`` under another name, as `multiprocessing` does.

    What stands under ``if __name__ == "__main__"`` does not run.
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
    """Get the tasks that the worker has and that loading the app has not brought."""
    for name in [name for name in boot.tasks if name not in app.tasks]:
        reason = _get_task(app, name, boot)
        if name not in app.tasks and warn:
            logger.warning(
                "The task %s of the module %s is unknown to the Python children, and fails if it"
                " arrives: %s. Define it in a module, at its top level",
                name,
                boot.tasks[name],
                reason,
            )


def _get_task(app: Celery, name: str, boot: Boot) -> str:
    """Import or make a task; return why it can't be, if it can't."""
    reason = "importing the module does not define it"
    try:
        importlib.import_module(boot.tasks[name])
    except Exception as exc:
        reason = f"importing the module fails: {exc!r}"
    if name in app.tasks or name not in boot.recipes:
        return reason
    try:
        recipe: Recipe = pickle.loads(boot.recipes[name])
        if recipe.options is None:
            app.register_task(recipe.target())
        else:
            app.task(recipe.target, **recipe.options)
    except Exception as exc:
        reason = f"it can't be made anew: {exc!r}"
    return reason


def _import_what_jobs_need(app: Celery, warn: bool) -> None:
    """Import what prefork's worker has imported before it forks, and connect to nothing.

    Otherwise the first job does it, and a soft limit or a revoke in the midst of it may leave
    modules half made.
    """
    try:
        # The modules are those of these attributes.
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
            "The Python children do without the setting %s: %s. Set it in a module that loading the"
            " app imports",
            name,
            reason,
        )


def _set_up_logging(app: Celery, hostname: str) -> None:
    """Log as the worker does, which left in the environment how that is (celery/app/log.py)."""
    environ: Any = os.environ
    logfile = environ.get("CELERY_LOG_FILE") or None
    app.log.setup(
        int(environ.get("CELERY_LOG_LEVEL") or 0),
        logfile,
        bool(environ.get("CELERY_LOG_REDIRECT")),
        str(environ.get("CELERY_LOG_REDIRECT_LEVEL")),
        hostname=hostname,
    )
