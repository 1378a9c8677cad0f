"""What the `celery` command gets: `-P celery_subproc_pool:Pool`, and `celery subproc`.

Celery 5 takes only names that it knows for `-P`. The `celery` command loads plug-in commands, this
module among them, before it parses options. So importing this module adds the pool's names, and its
commands for `celery control` and `celery inspect`.

Every `celery` command imports this module. Import heavy modules in the functions that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from celery import concurrency
from celery.signals import worker_init

from . import PACKAGE, config
from .errors import ConfigError
from .settings import ASYNCIO, PYTHON, ROOT
from .worker import banner, control

__all__ = ("POOL_NAMES", "add_pool_names", "subproc")

#: The pool's names for `-P`: its path, and a short one.
POOL_NAMES = ("celery_subproc_pool:Pool", "subproc")


def add_pool_names() -> None:
    """Let Celery's `-P` take the names of this pool. This is the only patch of Celery."""
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


@worker_init.connect  # type: ignore[untyped-decorator]
def size_by_cpus(sender: Any, **_: Any) -> None:
    """Give ``-c auto`` the meaning that it has on prefork."""
    name = sender.pool_cls if isinstance(sender.pool_cls, str) else sender.pool_cls.__module__
    if concurrency.ALIASES.get(name, name) in (POOL_NAMES[0], PACKAGE):
        from .worker.compat import resolve_auto_concurrency

        resolve_auto_concurrency(sender)


add_pool_names()
control.register()


@click.group()
def subproc() -> None:
    """Look after the pool of child processes (-P celery_subproc_pool:Pool)."""


@subproc.command()
@click.pass_context
def check(ctx: click.Context) -> None:
    """Check the setting subproc_pool, and show which children take which tasks."""
    from .worker import launch
    from .worker.routes import Routes

    app = ctx.obj.app
    try:
        settings = config.load(app.conf.get(ROOT))
        app.loader.import_default_modules()
        app.finalize()
        routes = Routes(app, settings)
        if routes.need_python_children:
            launch.check_executable(settings.python)
        if routes.need_asyncio_children:
            launch.check_executable(settings.asyncio, ASYNCIO)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from None
    for name, child in settings.children.items():
        _show(name, child.command, child.size, banner.external_tasks(name, child, routes.external))
    if routes.need_python_children:
        tasks = routes.synchronous or ["any task"]
        _show(PYTHON, launch.command(settings.python), settings.python.size, tasks)
    else:
        click.echo(f"{PYTHON}: no child, as no task needs one")
    if routes.need_asyncio_children:
        aio = settings.asyncio
        _show(ASYNCIO, launch.command(aio, ASYNCIO), aio.size or 1, routes.asynchronous)


def _show(name: str, command: Sequence[str], size: int | None, tasks: Iterable[str]) -> None:
    many = "as many as -c says" if size is None else f"{size}"
    click.echo(banner.describe(name, command, many, tasks))


def _asks_workers(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options of `celery control`."""
    for option in (
        click.option("-d", "--destination", help="Names of workers, with commas between them."),
        click.option("-t", "--timeout", default=1.0, help="Seconds to wait for replies."),
    ):
        command = option(command)
    return command


def _ask(
    app: Any, command: str, destination: str | None, timeout: float, **arguments: Any
) -> dict[str, Any]:
    """Send a remote control command, and return the workers' replies by their names."""
    replies = app.control.broadcast(
        command,
        arguments,
        reply=True,
        timeout=timeout,
        destination=destination.split(",") if destination else None,
    )
    if not replies:
        raise click.ClickException(f"no worker replied within {timeout:g} s (--timeout)")
    return {node: reply for each in replies for node, reply in each.items()}


@subproc.command()
@_asks_workers
@click.pass_context
def children(ctx: click.Context, destination: str | None, timeout: float) -> None:
    """Show the children of running workers as tables; `celery inspect subproc` has the data."""
    try:
        from .tables import show
    except ImportError:
        raise click.ClickException(
            "the tables need rich: pip install rich, or use celery inspect subproc"
        ) from None
    show(_ask(ctx.obj.app, "subproc", destination, timeout))


@subproc.command()
@click.argument("group", required=False)
@_asks_workers
@click.pass_context
def restart(ctx: click.Context, group: str | None, destination: str | None, timeout: float) -> None:
    """Replace the children of GROUP, or all, by fresh ones while jobs go on.

    This is `celery control subproc_restart`, which Celery 5.3 lacks.
    """
    replies = _ask(ctx.obj.app, "subproc_restart", destination, timeout, group=group)
    for node, reply in sorted(replies.items()):
        click.echo(f"{node}: {reply.get('ok') or reply['error']}")
    if any("error" in reply for reply in replies.values()):
        ctx.exit(1)
