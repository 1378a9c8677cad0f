"""Where the `celery` command meets the pool: `-P celery_subproc_pool:Pool`, `celery subproc`.

Layer: top. Celery 5 takes for `-P` only the names it knows. The `celery` command loads its plug-in
commands before it parses options, this module among them: that is the moment to add ours.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click
from celery import concurrency

from . import config
from .errors import ConfigError

__all__ = ("POOL_NAMES", "add_pool_names", "subproc")

#: What `-P` takes: the pool by its path, and for short.
POOL_NAMES = ("celery_subproc_pool:Pool", "subproc")


def add_pool_names() -> None:
    """Let Celery's `-P` take the names of this pool. The one patch of Celery that there is."""
    for name in POOL_NAMES:
        concurrency.ALIASES[name] = POOL_NAMES[0]
    try:
        from celery.bin.worker import WORKERS_POOL

        others = tuple(name for name in WORKERS_POOL.choices if name not in POOL_NAMES)
        WORKERS_POOL.choices = (*others, *POOL_NAMES)
    except (ImportError, AttributeError) as exc:
        click.echo(
            f"celery_subproc_pool: this version of Celery keeps the names of its pools elsewhere"
            f" ({exc}); use -P custom with CELERY_CUSTOM_WORKER_POOL={POOL_NAMES[0]}",
            err=True,
        )


add_pool_names()


@click.group()
def subproc() -> None:
    """Look after the pool of child processes (-P celery_subproc_pool:Pool)."""


@subproc.command()
@click.pass_context
def check(ctx: click.Context) -> None:
    """Check the setting subproc_pool, and say which children take which tasks."""
    from . import launch
    from .tasks import bind_tasks, needs_python_children, tasks_without_children

    app = ctx.obj.app
    try:
        settings = config.load(app.conf.get(config.ROOT))
        app.loader.import_default_modules()
        app.finalize()
        groups = bind_tasks(app, settings)
        python = needs_python_children(app, settings, groups)
        if python:
            launch.check_executable(settings.python)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from None
    for name, child in settings.children.items():
        _show(name, child.command, child.size, child.tasks)
    if python:
        tasks = tasks_without_children(app, groups) or ["whatever comes"]
        _show(config.PYTHON, launch.command(settings.python), settings.python.size, tasks)
    else:
        click.echo(f"{config.PYTHON}: no child, for there is no task for one")


def _show(name: str, command: Sequence[str], size: int | None, tasks: Sequence[str]) -> None:
    click.echo(f"{name}: {shlex.join(command)}")
    many = "as many as -c says" if size is None else size
    click.echo(f"    size: {many}; tasks: {', '.join(tasks)}")
