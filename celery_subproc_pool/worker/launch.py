"""The worker's groups of children, and what lets a fresh interpreter load the worker's project.

`python_child.loading` is the child's side of that.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import click
import msgspec
from celery import Celery, Task
from celery.app.utils import find_app
from celery.local import Proxy

from .. import PACKAGE, __version__
from ..core.model import Group
from ..errors import ConfigError
from ..python_child import configuration, replay
from ..python_child.recipes import outline_of, recipe_of
from ..settings import (
    ASYNCIO,
    CELERY_PREFIX,
    PYTHON,
    ROOT,
    TRACERS,
    AsyncioSettings,
    ChildSettings,
    PoolSettings,
    PythonSettings,
    with_limits,
)
from ..tracer.tasks import is_declared
from ..wire import python
from ..wire.json_lines import encode
from ..wire.python import AsyncioBoot, Boot
from .child_env import withheld
from .compat import app_argument
from .fast_path import expects_traces
from .routes import Routes

__all__ = (
    "boot_line",
    "check_executable",
    "command",
    "command_of",
    "groups",
    "tracer_command",
    "usable_cpus",
)

logger = logging.getLogger("celery_subproc_pool")

#: Seconds that another interpreter may take to say what it has installed.
PATIENCE = 60.0

#: The packages that the interpreter of a Python child needs.
NEEDED = ("celery", "msgspec", PACKAGE)

#: The programs of children that load the project.
_MODULES = {
    PYTHON: f"{PACKAGE}.python_child.main",
    ASYNCIO: f"{PACKAGE}.asyncio_child.main",
    TRACERS: f"{PACKAGE}.tracer.main",
}

#: If there are asyncio children, a group without a size has no more children than this for each
#: CPU: a concurrency of 1000 is meant for coroutines.
MOST_FOR_A_CPU = 4

#: Modules that have the app in a variable, but do not define it. The last one is what
#: `multiprocessing` calls ``__main__``.
_NOT_THE_PROJECTS = ("celery", "kombu", PACKAGE, "__mp_main__")

_QUESTION = """
import importlib, importlib.util, json, sys
missing = [name for name in {needed!r} if importlib.util.find_spec(name) is None]
release = None if missing else getattr(importlib.import_module({package!r}), "__version__", "")
# An early state of this release has no such folder.
if release == {release!r} and importlib.util.find_spec({package!r} + ".python_child") is None:
    release = ""
print(json.dumps([list(sys.version_info[:2]), missing, release]))
"""


def groups(
    app: Celery,
    settings: PoolSettings,
    routes: Routes,
    hostname: str,
    limit: int,
    max_jobs: int | None = None,
    max_memory: int | None = None,
    worker: Any = None,
) -> dict[str, Group]:
    """Return the worker's groups of children, by name.

    Arguments:
        app: the worker's app.
        settings: the pool's settings.
        routes: which group takes which task.
        hostname: the worker's node name.
        limit: the worker's concurrency.
        max_jobs: jobs for each child where its group says nothing; None is no limit.
        max_memory: KiB for each child where its group says nothing; None is no limit.
        worker: Celery's worker, if it is known.

    Raises:
        ConfigError: Python children can't be started as the settings say.
    """

    has_asyncio = routes.need_asyncio_children

    def group(name: str, child: ChildSettings, **more: Any) -> Group:
        if has_asyncio:
            child = _bounded(name, child, limit)
        size = child.size_for(limit)
        return Group(name, with_limits(child, max_jobs, max_memory), size, **more)

    hidden = withheld(app, os.environ) if settings.children else frozenset()
    found = {name: group(name, each, withheld=hidden) for name, each in settings.children.items()}
    if routes.need_python_children:
        check_executable(settings.python)
        child = settings.python.as_child(command(settings.python))
        boot = boot_line(app, settings, PYTHON, hostname, routes.external, worker)
        _warn_of_unseen(app, settings.python, hostname, worker)
        forks = _forks(settings.python)
        found[PYTHON] = group(PYTHON, child, boot=boot, decode=python.decode_traced, forks=forks)
    if has_asyncio:
        check_executable(settings.asyncio, ASYNCIO)
        found[ASYNCIO] = group(
            ASYNCIO,
            settings.asyncio.as_child(command(settings.asyncio, ASYNCIO)),
            boot=boot_line(app, settings, ASYNCIO, hostname, routes.external, worker),
            decode=python.decode_of_asyncio_child,
            ends_at_soft_limit=False,
            forks=_forks(settings.asyncio),
        )
    if settings.children:
        child = settings.tracers.as_child(tracer_command(), usable_cpus() // 2 or 1)
        found[TRACERS] = Group(
            TRACERS,
            child,
            child.size_for(limit),
            boot=boot_line(app, settings, TRACERS, hostname, routes.external, worker),
            decode=python.decode_of_tracer,
            on_demand=not expects_traces(app, routes.external),
        )
    return found


def _bounded(name: str, child: ChildSettings, limit: int) -> ChildSettings:
    """Return the settings of the group `name` with a size, if it would have too many children."""
    most = MOST_FOR_A_CPU * usable_cpus()
    if child.size is not None or child.size_for(limit) <= most:
        return child
    logger.info(
        "The concurrency %d is for the asyncio children, too: %s gets %d children, %d for each CPU."
        " Set %s.%s.size for another number",
        limit,
        name,
        most,
        MOST_FOR_A_CPU,
        ROOT,
        name if name == PYTHON else f"children.{name}",
    )
    return msgspec.structs.replace(child, size=most)


def _forks(settings: PythonSettings) -> bool:
    """Return whether children are to be forked: the system must tell of the ends of processes that
    are not our own children. A wrapper is meant to wrap each child."""
    return (
        settings.start != "spawn"
        and not settings.prefix
        and os.path.isdir("/proc/self/task")
        and hasattr(os, "pidfd_open")
    )


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        # macOS
        return os.cpu_count() or 1


def command(settings: PythonSettings, group: str = PYTHON) -> tuple[str, ...]:
    """Return the program of a child of `group` (`PYTHON` or `ASYNCIO`), and its arguments.

    Another interpreter gets no flags of this one: it may not know them.
    """
    program = (sys.executable, *_flags())
    if settings.executable is not None:
        program = (settings.executable,)
    return (*settings.prefix, *program, "-m", _MODULES[group])


def tracer_command() -> tuple[str, ...]:
    """Return the program of a tracer, and its arguments."""
    return (sys.executable, *_flags(), "-m", _MODULES[TRACERS])


def _flags() -> list[str]:
    """Return this interpreter's flags, as `multiprocessing` does for its own fresh ones."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def check_executable(
    settings: PythonSettings, group: str = PYTHON, environ: Mapping[str, str] = os.environ
) -> None:
    """If the children of `group` have an interpreter of their own, ask it whether it has what they
    need.

    Raises:
        ConfigError: it lacks a package, has another release of this one, or does not run.
    """
    if settings.executable is None:
        return
    path = f"{ROOT}.{group}.executable"
    version, missing, release = _ask(path, settings.executable, settings, environ)
    if tuple(version) < (3, 10):
        found = ".".join(map(str, version))
        raise ConfigError(
            f"{path}: expected Python 3.10 or later, {settings.executable!r} is {found}"
        )
    project = PACKAGE.replace("_", "-")
    if missing:
        raise ConfigError(
            f"{path}: {settings.executable!r} lacks {', '.join(missing)}: install celery and"
            f" {project} for that interpreter too"
        )
    if release != __version__:
        # The protocol between worker and Python child is private to a release.
        raise ConfigError(
            f"{path}: expected the release {__version__} of {project}, which the worker has,"
            f" {settings.executable!r} has {release or 'an unknown one'}: install"
            f" {project}=={__version__} for that interpreter"
        )


def _ask(
    path: str, executable: str, settings: PythonSettings, environ: Mapping[str, str]
) -> tuple[list[int], list[str], str | None]:
    """Return the version of Python, the missing packages, and the release of this package."""
    question = _QUESTION.format(needed=NEEDED, package=PACKAGE, release=__version__)
    try:
        done = subprocess.run(
            [executable, "-c", question],
            env={**environ, **settings.env},
            cwd=settings.cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        version, missing, release = json.loads(done.stdout)
    except subprocess.CalledProcessError as exc:
        last = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"{path}: {executable!r} is not a working Python: {last}") from exc
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"{path}: {executable!r} is not a working Python: {exc}") from exc
    return version, missing, release


def boot_line(
    app: Celery,
    settings: PoolSettings,
    group: str,
    hostname: str,
    taken: Mapping[str, str],
    worker: Any = None,
) -> bytes:
    """Return the first line for every Python child, asyncio child or tracer.

    Arguments:
        app: the worker's app.
        settings: the pool's.
        group: which children it is for: `PYTHON`, `ASYNCIO` or `TRACERS`.
        hostname: the worker's node name.
        taken: the tasks that external children take: tracers must know them, and Python children
            need not.
        worker: Celery's worker, if it is known.

    Raises:
        ConfigError: the app can neither be imported nor be pickled.
    """
    context = command_of(app)
    traces = group == TRACERS
    tasks = _tasks_for(app, taken, traces)
    theirs = {PYTHON: settings.python, ASYNCIO: settings.asyncio}.get(group)
    own = theirs is None or theirs.executable is None
    common = theirs or settings.tracers
    write = outline_of if traces else recipe_of
    recipes = {name: write(task) for name, task in tasks.items()}
    boot = Boot(
        hostname=hostname,
        path=_search_path(common.cwd, own),
        whole_path=own,
        argv=sys.argv,
        options=[] if context is None else list(context.args),
        include=[str(module) for module in app.conf.include or ()],
        tasks={name: task.__module__ for name, task in tasks.items()},
        recipes={name: recipe for name, recipe in recipes.items() if recipe is not None},
        settings=configuration.collect(app, () if own else _homes()),
        prelude=replay.note(app, hostname, worker, context, (theirs or settings.python).replay),
        traces=traces,
        exit_grace=common.exit_grace,
        audits=theirs is None or theirs.start != "fork",
        not_forkable=list(theirs.not_forkable) if theirs is not None else [],
        aio=_of_asyncio(settings.asyncio) if group == ASYNCIO else None,
        **_how_to_get(app),
    )
    return encode(boot)


def _of_asyncio(settings: AsyncioSettings) -> AsyncioBoot:
    return AsyncioBoot(
        lifespan=settings.lifespan,
        slow_callback=settings.slow_callback,
        uvloop=settings.uvloop,
    )


def _tasks_for(app: Celery, taken: Mapping[str, str], traces: bool) -> dict[str, Task]:
    """Return the declared tasks of `app`, by name, without Celery's own: those `taken` for a
    process that `traces`, the others for Python children."""
    return {
        name: task
        for name, task in app.tasks.items()
        if (name in taken) == traces and not name.startswith(CELERY_PREFIX) and is_declared(task)
    }


def _warn_of_unseen(app: Celery, settings: PythonSettings, hostname: str, worker: Any) -> None:
    unseen = replay.unseen(app, hostname, worker, settings.replay)
    if unseen:
        logger.warning(
            "Tasks do not see what these do in the worker, because Python children are fresh"
            " interpreters: %s. If they should, use worker_process_init instead, or add the name"
            " in brackets to %s.%s.replay",
            ", ".join(unseen),
            ROOT,
            PYTHON,
        )


def _how_to_get(app: Celery) -> dict[str, Any]:
    name = _named_on_command_line(app) or _variable_of(app)
    if name is None:
        try:
            return {"pickled_app": pickle.dumps(app, protocol=4)}
        except Exception as exc:
            raise ConfigError(
                f"{ROOT}.{PYTHON}: the Python children can't load the app {app!r}: it is in no"
                f" variable of a module, and can't be pickled: {exc!r}. Make it a module's variable"
            ) from exc
    return {"app": name, **(_main() if name.startswith("__main__:") else {})}


def _named_on_command_line(app: Celery) -> str | None:
    """Return the argument of ``celery -A``, if the worker got `app` by it."""
    context = command_of(app)
    if context is None:
        return None
    name = app_argument(context.find_root().params.get("app"), sys.argv, os.environ)
    with suppress(Exception):
        if name and _unwrapped(find_app(name)) is app:
            return name
    return None


def command_of(app: Celery) -> click.Context | None:
    """Return the `celery worker` command that runs, if it runs for `app`. Its ``args`` are the
    ``name=value`` behind ``--`` on the command line."""
    context = click.get_current_context(silent=True)
    return context if context is not None and _app_of(context) is app else None


def _app_of(context: click.Context) -> Celery | None:
    return _unwrapped(getattr(context.obj, "app", None))


def _unwrapped(app: Any) -> Celery | None:
    # A project's app may be a proxy that makes the app on first use.
    found: Celery | None = app._get_current_object() if isinstance(app, Proxy) else app
    return found


def _variable_of(app: Celery) -> str | None:
    """Return a ``module:variable`` that has `app`, preferably not of ``__main__``; or None."""
    found = list(_variables_of(app))
    found.sort(key=lambda name: name.startswith("__main__:"))
    return found[0] if found else None


def _variables_of(app: Celery) -> Iterator[str]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _NOT_THE_PROJECTS:
            continue
        if name == "__main__" and not _main():
            continue
        for variable, value in list(getattr(module, "__dict__", {}).items()):
            if value is app:
                yield f"{name}:{variable}"


def _main() -> dict[str, str]:
    """Return where the code of ``__main__`` is; an empty dict if it was typed in."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return {"main_module": spec.name}
    path = getattr(main, "__file__", None)
    return {} if path is None else {"main_path": os.path.abspath(path)}


def _search_path(cwd: str | None, own: bool) -> list[str]:
    try:
        here = os.getcwd()
    except FileNotFoundError:
        # The working directory was removed.
        here = ""
    path = [entry or here for entry in sys.path]
    if not own:
        # Another interpreter has its own library. The child needs only what the project added.
        path = [entry for entry in path if not _belongs_to_the_interpreter(entry)]
    if cwd is not None and here not in path:
        # Celery looks for the app in the directory that it was started in.
        path.insert(0, here)
    return path


def _homes() -> set[str]:
    """Return the directories of this interpreter's own library and scripts."""
    paths = sysconfig.get_paths()
    homes = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    return homes | {*site.getsitepackages(), site.getusersitepackages()}


def _belongs_to_the_interpreter(entry: str) -> bool:
    # `lib-dynload` is below one of them. The standard library may also be in a zip file.
    return entry.endswith(".zip") or any(
        entry == home or entry.startswith(home + os.sep) for home in _homes()
    )
