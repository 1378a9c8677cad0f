"""Which group of children takes a task: by its own `child`, by the settings, or by announcement.

Layer: above `tasks`; imports Celery. A task that an external group takes gets another body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from celery import Celery, Task

from ..errors import ConfigError
from ..settings import CELERY_PREFIX, PYTHON, ROOT, PoolSettings
from .tasks import SubprocTask, run_in_child

__all__ = ("Routes",)


class Routes:
    """The groups of an app's tasks.

    Arguments:
        app: the worker's app, finalized. The task names that the settings list are registered.
        settings: the pool's settings.

    Raises:
        ConfigError: a task names a group that there is not.
    """

    def __init__(self, app: Celery, settings: PoolSettings) -> None:
        self._app = app
        self._settings = settings
        #: The tasks that children have announced, by the names of their groups.
        self._announced: dict[str, set[str]] = {name: set() for name in settings.children}
        #: The group of each task that came so far; None for the worker itself.
        self._known: dict[str, str | None] = {}
        #: Whether a task that an external group takes is to be STARTED while it runs.
        self.tracked: dict[str, bool] = {}
        #: The group of each task that an external one takes.
        self.external: dict[str, str] = {}
        for child in settings.children.values():
            self._register(child.exact_tasks())
        self.renew()

    def renew(self) -> None:
        """Look at the app's tasks anew, and let the groups have theirs.

        Raises:
            ConfigError: a task names a group that there is not.
        """
        groups = {name: self._bind(task) for name, task in self._app.tasks.items()}
        self.external = {name: group for name, group in groups.items() if group is not None}
        self._known.clear()

    def announce(self, group: str, names: Iterable[str]) -> list[str]:
        """Let `group` have the tasks `names`, as its children do them, where no group before it
        takes them. Celery's own are not for children to announce.

        Returns:
            The names that it has from now on, and had not.
        """
        known = self._announced[group]
        new = [n for n in sorted(names) if n not in known and not n.startswith(CELERY_PREFIX)]
        self._announced[group].update(new)
        self._register(new)
        for name in new:
            taker = self._bind(self._app.tasks[name])
            if taker is not None:
                self.external[name] = taker
            self._known.pop(name, None)
        return [name for name in new if self.external.get(name) == group]

    def find(self, name: str, has_python_children: bool) -> str | None:
        """Return the group that takes the task `name`; None for the worker itself, which runs
        Celery's own tasks if it has no Python children.

        A task that nobody takes will fail with an error that says so.
        """
        if name not in self._known:
            self._known[name] = self._find(self._app.tasks[name], has_python_children)
        return self._known[name]

    def takes_tasks(self, group: str) -> bool:
        """Return whether `group` has a task, or may have one that is registered later."""
        return bool(self._settings.children[group].tasks) or group in self.external.values()

    @property
    def without(self) -> list[str]:
        """The names of the app's tasks that no external group takes, but for Celery's own, and
        for those that no Python child can do either (children may announce them yet)."""
        return sorted(
            name
            for name, task in self._app.tasks.items()
            if name not in self.external
            and not name.startswith(CELERY_PREFIX)
            and not isinstance(task, SubprocTask)
        )

    @property
    def need_python_children(self) -> bool:
        """Whether there is, or may come, a task that no external child takes."""
        return not self._settings.children or bool(self.without)

    def _find(self, task: Task, has_python_children: bool) -> str | None:
        group = self._bind(task)
        if group is None and has_python_children and not isinstance(task, SubprocTask):
            return PYTHON
        if group is None and not task.name.startswith(CELERY_PREFIX):
            _set_body(task, partial(_refuse, task))
        return group

    def _register(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._app.tasks:
                # With the app, it is one of the app's own task class, as if it were declared.
                facts = {"name": name, "app": self._app}
                self._app.register_task(type("Registered", (SubprocTask,), facts)())

    def _bind(self, task: Task) -> str | None:
        """Have the external group that takes `task`, if there is one, run it; return its name."""
        group = self._group_of(task)
        if group is not None:
            most = self._settings.children[group].throttle_max_retries
            # Celery's tracer would store its own pid, and maybe after the job's end: a revoke does
            # not wait for it.
            tracked = self.tracked.setdefault(task.name, bool(task.track_started))
            task.track_started = False
            _set_body(task, partial(run_in_child, task, most, tracked))
        return group

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


def _set_body(task: Task, run: Callable[..., Any]) -> None:
    """Make `run` the body of `task`. With `autoretry_for`, `task.run` is Celery's wrapper of
    `_orig_run` (celery/app/autoretry.py), and must go on wrapping."""
    if hasattr(task, "_orig_run"):
        task._orig_run = run
    else:
        task.run = run


def _refuse(task: Task, /, *args: Any, **kwargs: Any) -> Any:
    remedy = f"add its name to {ROOT}.children.<name>.tasks, or let their children announce it"
    if not isinstance(task, SubprocTask):
        remedy += (
            "; or start the worker again for it to have Python children too: the task was"
            " registered after it started"
        )
    raise ConfigError(f"no children of this worker take the task {task.name}: {remedy}")
