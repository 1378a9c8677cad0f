"""Recipes: how a child makes a task that importing the task's module does not make.

A task may be made inside a function, or by a call that only the worker's start-up makes. The worker
sends a recipe for each task for which one can be written; the child uses it where all imports have
failed. Both ends are here, so that they agree.

A recipe is a pickle, and travels between virtual environments: the interpreter of a Python child
may be another. Tracers run on the worker's. They need all of an external task but its body.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from celery import Celery

__all__ = ("make_task", "outline_of", "recipe_of")

#: What binding a task to an app puts into its class, beside settings.
_OF_THE_APP = ("app", "run", "request_stack")


def recipe_of(task: Any) -> bytes | None:
    """Return the recipe of `task`: a class or function, and the arguments of ``app.task`` or None.

    Returns:
        None if the task can't be pickled. That is so for a function under ``@app.task``: its name
        stands for the task. Importing its module makes that task.
    """
    kind = type(task)
    if not vars(kind).get("_decorated"):
        return _pickled(kind, None)
    run = vars(kind)["run"]
    bound = not isinstance(run, staticmethod)
    return _pickled(run if bound else run.__func__, {**_options_of(task), "bind": bound})


def outline_of(task: Any) -> bytes | None:
    """Return the recipe of `task` without its body, or None, as `recipe_of`."""
    kind = type(task)
    if not vars(kind).get("_decorated"):
        return _pickled(kind, None)
    return _pickled(None, _options_of(task))


def _options_of(task: Any) -> dict[str, Any]:
    """Return what ``app.task`` was given for `task`."""
    kind = type(task)
    own: Mapping[str, Any] = vars(kind)
    options = {
        key: value
        for key, value in own.items()
        if not key.startswith("_") and key not in _OF_THE_APP
    }
    if kind.__bases__ != (task.app.Task,):
        options["base"] = kind.__bases__[0]
    return options


def _pickled(target: Any, options: dict[str, Any] | None) -> bytes | None:
    try:
        return pickle.dumps((target, options), protocol=4)
    except Exception:
        return None


def _without_body(*args: Any, **kwargs: Any) -> None:
    """Stand for the function of a task whose body never runs here."""


def make_task(app: Celery, recipe: bytes) -> None:
    """Register with `app` the task that `recipe` describes.

    Raises:
        Exception: this interpreter lacks something that the recipe names, or the task refuses.
    """
    target, options = pickle.loads(recipe)
    if options is None:
        app.register_task(target())
    else:
        app.task(target or _without_body, **options)
