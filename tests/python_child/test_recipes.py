"""Recipes: tasks that a child makes because no import makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, Task, _state

from celery_subproc_pool import SubprocTask
from celery_subproc_pool.python_child.recipes import make_task, outline_of, recipe_of
from tests.support import embedded_tasks

# Celery 5.7 sets the attribute when it binds a task, and warns when a task is made with it.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*The 'priority' task attribute is deprecated")


@pytest.fixture
def app() -> Iterator[Celery]:
    """Return an app. What recipes make is shared with all apps of a process: undo that."""
    finalizers = set(_state._on_app_finalizers)
    with Celery("recipes", set_as_current=False) as app:
        yield app
    _state._on_app_finalizers.clear()
    _state._on_app_finalizers.update(finalizers)


def test_only_a_task_whose_code_can_be_imported_has_a_recipe(app: Celery) -> None:
    app.task(embedded_tasks.plain, name="recipes.plain", bind=True, shared=False)
    app.register_task(embedded_tasks.PlainClass())

    @app.task(name="recipes.closure", shared=False)
    def closure() -> None: ...

    class Local(Task):
        name = "recipes.local"

    app.register_task(Local())
    app.finalize()
    with_recipe = {name for name, task in app.tasks.items() if recipe_of(task) is not None}
    assert {"recipes.plain", "plain.class"} <= with_recipe
    assert not {"recipes.closure", "recipes.local"} & with_recipe


def test_a_recipe_makes_the_task_with_its_options_in_another_app(app: Celery) -> None:
    app.task(embedded_tasks.plain, name="recipes.made", bind=True, max_retries=7, shared=False)
    app.register_task(embedded_tasks.PlainClass())
    app.finalize()
    recipes = [recipe_of(app.tasks[name]) for name in ("recipes.made", "plain.class")]
    with Celery("other", set_as_current=False) as other:
        other.finalize()
        for recipe in recipes:
            assert recipe is not None
            make_task(other, recipe)
        made = other.tasks["recipes.made"]
        assert (made.app, made.max_retries) == (other, 7)
        assert type(other.tasks["plain.class"]) is embedded_tasks.PlainClass


def test_a_recipe_names_nothing_of_this_package(app: Celery) -> None:
    """Pickle stores a class by its module's path, which another release may not have."""
    app.task(embedded_tasks.plain, name="recipes.bare", shared=False)
    app.finalize()
    recipe = recipe_of(app.tasks["recipes.bare"])
    assert recipe is not None
    assert b"celery_subproc_pool" not in recipe


def test_an_outline_has_all_of_an_external_task_but_its_body(app: Celery) -> None:
    options = {"max_retries": 7, "autoretry_for": (KeyError,), "bind": True}

    @app.task(base=SubprocTask, name="outlines.closure", shared=False, **options)
    def closure(self: Task) -> None: ...

    app.register_task(embedded_tasks.PlainClass())
    app.finalize()
    outlines = [outline_of(app.tasks[name]) for name in ("outlines.closure", "plain.class")]
    with Celery("other", set_as_current=False) as other:
        other.finalize()
        for outline in outlines:
            assert outline is not None
            make_task(other, outline)
        made = other.tasks["outlines.closure"]
        assert isinstance(made, SubprocTask)
        assert (made.app, made.max_retries, made.autoretry_for) == (other, 7, (KeyError,))
        assert type(other.tasks["plain.class"]) is embedded_tasks.PlainClass


def test_a_task_of_a_class_in_a_function_has_no_outline(app: Celery) -> None:
    class Local(SubprocTask):
        abstract = True

    @app.task(base=Local, name="outlines.local", shared=False)
    def local() -> None: ...

    app.finalize()
    assert outline_of(app.tasks["outlines.local"]) is None
