"""Which group of children takes a task: by its `child`, by the settings, or by announcement."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from celery import Celery, Task

from ..errors import ConfigError
from ..python_child.coroutines import is_async
from ..settings import ASYNCIO, CELERY_PREFIX, PYTHON, ROOT, TRACERS, PoolSettings
from ..tracer.tasks import SubprocTask, register

__all__ = ("Routes",)

#: Celery's own tasks that call the body of another one, for each of its items. Chunks are such.
_MAPS = ("celery.map", "celery.starmap")


class Routes:
    """The groups of an app's tasks.

    Arguments:
        app: the worker's app, finalized. The task names that the settings list are registered.
        settings: the pool's settings.

    Raises:
        ConfigError: a task names a group that is not configured.
    """

    def __init__(self, app: Celery, settings: PoolSettings) -> None:
        self._app = app
        self._settings = settings
        #: By the name of each group: the tasks that its children have announced.
        self._announced: dict[str, set[str]] = {name: set() for name in settings.children}
        #: By the name of each task that came so far: its group.
        self._known: dict[str, str] = {}
        #: By the name of each external task: its group.
        self.external: dict[str, str] = {}
        for child in settings.children.values():
            self._register(child.exact_tasks())
        self.renew()

    def renew(self) -> None:
        """Route the app's tasks again: there may be new ones.

        Raises:
            ConfigError: a task names a group that is not configured.
        """
        groups = {name: self._group_of(task) for name, task in self._app.tasks.items()}
        self.external = {name: group for name, group in groups.items() if group is not None}
        self._known.clear()

    def announce(self, group: str, names: Iterable[str]) -> list[str]:
        """Route the tasks `names` to `group`, whose children announce them, unless a group before
        it takes them. Ignore Celery's own tasks: children can't take those.

        Returns:
            The names of the tasks that are new for the group.
        """
        known = self._announced[group]
        new = [n for n in sorted(names) if n not in known and not n.startswith(CELERY_PREFIX)]
        self._announced[group].update(new)
        self._register(new)
        for name in new:
            taker = self._group_of(self._app.tasks[name])
            if taker is not None:
                self.external[name] = taker
            self._known.pop(name, None)
        return [name for name in new if self.external.get(name) == group]

    def find(self, name: str, groups: Container[str]) -> str:
        """Return the group that takes the task `name`. Tracers run Celery's own tasks if there are
        no Python children.

        Arguments:
            name: the task's.
            groups: the names of the groups that the worker has.

        Raises:
            ConfigError: no group takes it.
        """
        if name not in self._known:
            self._known[name] = self._find(self._app.tasks[name], groups)
        return self._known[name]

    def find_mapped(self, request: Mapping[str, Any], groups: Container[str]) -> str | None:
        """Return the asyncio children's group if `request` is one of Celery's to call a coroutine
        function, so that it runs in their event loop; otherwise None.

        Arguments:
            request: that of a job, with its arguments.
            groups: the names of the groups that the worker has.
        """
        if request.get("task") not in _MAPS or ASYNCIO not in groups:
            return None
        args, kwargs = request.get("args"), request.get("kwargs")
        mapped = args[0] if args else isinstance(kwargs, Mapping) and kwargs.get("task")
        name = mapped.get("task") if isinstance(mapped, Mapping) else None
        task = self._app.tasks.get(name) if isinstance(name, str) else None
        if task is None or not is_async(task) or self.find(task.name, groups) != ASYNCIO:
            return None
        return ASYNCIO

    def takes_tasks(self, group: str) -> bool:
        """Return whether `group` has a task, or can get one that is registered later."""
        return bool(self._settings.children[group].tasks) or group in self.external.values()

    @property
    def without(self) -> list[str]:
        """The names of the app's tasks that no external group takes. Without Celery's own, and
        without `SubprocTask`s: Python children can't do them, and external ones may announce them
        later."""
        return sorted(
            name
            for name, task in self._app.tasks.items()
            if name not in self.external
            and not name.startswith(CELERY_PREFIX)
            and not isinstance(task, SubprocTask)
        )

    @property
    def asynchronous(self) -> list[str]:
        """Those of `without` whose body is a coroutine function."""
        return [name for name in self.without if is_async(self._app.tasks[name])]

    @property
    def synchronous(self) -> list[str]:
        """Those of `without` whose body is an ordinary function."""
        return [name for name in self.without if not is_async(self._app.tasks[name])]

    @property
    def need_asyncio_children(self) -> bool:
        """Whether there is a task for asyncio children."""
        return bool(self.asynchronous)

    @property
    def need_python_children(self) -> bool:
        """Whether there is a task for Python children, or may be one later."""
        return bool(self.synchronous) or not (self._settings.children or self.asynchronous)

    def _find(self, task: Task, groups: Container[str]) -> str:
        group = self._group_of(task)
        if group is not None:
            return group
        if is_async(task):
            if ASYNCIO in groups:
                return ASYNCIO
        elif PYTHON in groups and not isinstance(task, SubprocTask):
            return PYTHON
        if task.name.startswith(CELERY_PREFIX):
            return ASYNCIO if ASYNCIO in groups else TRACERS
        raise _unroutable(task)

    def _register(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._app.tasks:
                register(self._app, name)

    def _group_of(self, task: Task) -> str | None:
        children = self._settings.children
        name: str | None = getattr(task, "child", None) if isinstance(task, SubprocTask) else None
        if name is None:
            takers = (
                group
                for group, child in children.items()
                if child.takes(task.name) or task.name in self._announced[group]
            )
            return next(takers, None)
        if name not in children:
            known = ", ".join(children) or "none"
            raise ConfigError(
                f"{ROOT}.children: the task {task.name} names the child {name!r}, which is not"
                f" configured; there are: {known}"
            )
        return name


def _unroutable(task: Task) -> ConfigError:
    remedy = f"add its name to {ROOT}.children.<name>.tasks, or let the children announce it"
    if not isinstance(task, SubprocTask):
        kind = "asyncio" if is_async(task) else "Python"
        remedy += (
            f"; or restart the worker, so that it has {kind} children, too: the task was registered"
            " after it had started"
        )
    return ConfigError(f"no children of this worker take the task {task.name}: {remedy}")
