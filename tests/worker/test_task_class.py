"""External tasks of apps with a task class of their own: they derive from it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from celery import Celery, Task, _state, current_app, shared_task
from celery.contrib.abortable import AbortableAsyncResult, AbortableTask

from celery_subproc_pool import NotInWorkerError, SubprocTask, config
from celery_subproc_pool.worker.routes import Routes
from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.worker import Project


class Tenant(Task):
    """What a project gives all its tasks."""

    abstract = True
    max_retries = 7
    children: ClassVar[list[str]] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Tenant.children.append(cls.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def for_tenant(self, tenant: str) -> tuple[str, str]:
        return self.name, tenant


@pytest.fixture(autouse=True)
def current() -> Iterator[None]:
    """Leave Celery's current app and its shared tasks as they were; here, none is shared."""
    before = current_app._get_current_object()
    finalizers = set(_state._on_app_finalizers)
    _state._on_app_finalizers.clear()
    yield
    before.set_current()
    _state._on_app_finalizers.clear()
    _state._on_app_finalizers.update(finalizers)


def app_of(task_cls: Any = Tenant) -> Celery:
    return Celery(broker="memory://", task_cls=task_cls, set_as_current=False)


def charge(*args: Any) -> str:
    """The body, which never runs."""
    return "the body ran"


def declare(app: Celery, base: type[Task] = SubprocTask, **options: Any) -> Any:
    return app.task(base=base, name="billing.charge", shared=False, **options)(charge)


def test_a_declared_task_is_one_of_the_apps_class() -> None:
    app = app_of()
    task = declare(app, child="rails")
    assert isinstance(task, SubprocTask)
    assert isinstance(task, app.Task)
    assert task.for_tenant("acme") == ("billing.charge", "acme")
    assert task.child == "rails"
    assert task.max_retries == 7
    assert declare(app_of(), max_retries=1).max_retries == 1


def test_a_class_that_was_set_later_counts() -> None:
    # As Flask's documentation had it for years.
    app = app_of(None)
    task = declare(app)
    app.Task = type("ContextTask", (Tenant,), {"abstract": True, "app": app})
    assert task.for_tenant("acme") == ("billing.charge", "acme")


def test_a_registered_name_is_one_of_the_apps_class() -> None:
    app = app_of()
    app.finalize()
    settings = {"children": {"rails": {"argv": ["true"], "tasks": ["billing.charge"]}}}
    Routes(app, config.load(settings))
    assert app.tasks["billing.charge"].for_tenant("acme") == ("billing.charge", "acme")


def test_a_shared_task_is_one_of_each_apps_class() -> None:
    task = shared_task(base=SubprocTask, name=f"{__name__}.shared")(charge)
    apps = app_of(), app_of(None)
    for app in apps:
        app.finalize()
    first, second = (app.tasks[f"{__name__}.shared"] for app in apps)
    assert first.for_tenant("acme") == (f"{__name__}.shared", "acme")
    assert isinstance(second, SubprocTask)
    assert not isinstance(second, Tenant)
    for app in apps:
        app.set_current()
        assert isinstance(task, app.Task)


def test_what_a_class_does_for_each_of_its_children_happens_once() -> None:
    app = app_of()
    assert isinstance(app.Task, type)
    Tenant.children.clear()
    declare(app).for_tenant("acme")
    assert Tenant.children == ["charge"]


def test_a_task_is_pickled_by_its_name() -> None:
    app = app_of()
    app.set_current()
    task = declare(app)
    app.finalize()
    assert pickle.loads(pickle.dumps(task)) is app.tasks["billing.charge"]


def test_options_that_wrap_or_bind_the_body_work() -> None:
    task = declare(app_of(), bind=True, autoretry_for=(KeyError,))
    assert task._orig_run() == "the body ran"
    assert task.run() == "the body ran"


class Charge(SubprocTask):
    """A task that is a class, registered by hand, and derives from what it names."""

    name = "billing.class"

    def run(self) -> str:
        return "the body ran"


def test_a_task_that_is_a_class_is_as_it_was_defined() -> None:
    app = app_of()
    task = app.register_task(Charge())
    assert type(task) is Charge
    assert not isinstance(task, Tenant)
    bases = (Charge, Tenant)
    assert isinstance(app.register_task(type("Both", bases, {"name": "both"})()), Tenant)


def test_a_base_may_have_the_apps_class_already() -> None:
    class Both(SubprocTask, Tenant):
        abstract = True

    class Behind(Tenant, SubprocTask):
        abstract = True

    for base in (Both, Behind):
        task = declare(app_of(), base)
        assert task.for_tenant("acme") == ("billing.charge", "acme")
    app = app_of()
    task = declare(app, type("Own", (SubprocTask, app.Task), {"abstract": True}))
    assert task.for_tenant("acme") == ("billing.charge", "acme")


def test_the_apps_class_may_be_ours() -> None:
    task = declare(app_of(SubprocTask))
    assert isinstance(task, SubprocTask)
    task = declare(app_of(type("Mine", (Tenant, SubprocTask), {"abstract": True})))
    assert task.for_tenant("acme") == ("billing.charge", "acme")


def test_an_abortable_one() -> None:
    class Abortable(SubprocTask, AbortableTask):
        abstract = True

    task = declare(app_of(), Abortable)
    assert task.for_tenant("acme") == ("billing.charge", "acme")
    assert isinstance(task.AsyncResult("1"), AbortableAsyncResult)


def test_abstract_base_classes() -> None:
    class Paying(ABC):
        @abstractmethod
        def pay(self) -> str: ...

    class Base(SubprocTask, Paying):
        abstract = True

        def pay(self) -> str:
            return "paid"

    class Own(Tenant, ABC):
        abstract = True

    task = declare(app_of(Own), Base)
    assert (task.pay(), task.for_tenant("acme")[1]) == ("paid", "acme")


def test_a_metaclass_of_the_apps_class_makes_its_tasks() -> None:
    class Noted(type):
        def __new__(mcls, *args: Any, **options: Any) -> Any:
            cls = super().__new__(mcls, *args, **options)
            cls.noted = args[0]  # type: ignore[attr-defined]
            return cls

    class Own(Tenant, metaclass=Noted):
        abstract = True

    app = app_of(Own)
    task = declare(app)
    assert task.noted == "charge"
    assert isinstance(task.__class__, Noted)


@pytest.mark.parametrize("call", ["direct", "eager"])
def test_nobody_runs_the_body_outside_of_a_worker(call: str) -> None:
    task = declare(app_of())
    with pytest.raises(NotInWorkerError, match=r"external child.*In tests"):
        task(1) if call == "direct" else task.apply((1,), throw=True)


def test_an_app_that_is_a_proxy_is_left_alone() -> None:
    base = type("Base", (SubprocTask,), {"app": current_app, "abstract": True})
    assert base.__bases__ == (SubprocTask,)


# -- what a class of the app's does around each task is done around the exchange with the child

CONTEXTS = """
import contextvars
from celery import Celery, Task
from celery_subproc_pool import SubprocTask
context = contextvars.ContextVar("context", default="none")
def note(task, what):
    with open({path!r}, "a") as file:
        file.write(f"{{what}} {{task.name}} {{task.request.id}} in {{context.get()}}\\n")
class ContextTask(Task):
    abstract = True
    def __call__(self, *args, **kwargs):
        token = context.set("a context")
        note(self, "before")
        try:
            return {call}
        finally:
            note(self, "after")
            context.reset(token)
    def on_success(self, *args):
        note(self, "success")
app = Celery("proj", broker={broker!r}, backend={backend!r}, task_cls=ContextTask)
app.conf.update({conf!r})
@app.task(base=SubprocTask, name="do.declared", shared=False)
def declared(*args): ...
@app.task(name="do.ordinary", shared=False)
def ordinary(*args): ...
"""

CALLS = ["self.run(*args, **kwargs)", "super().__call__(*args, **kwargs)"]
NAMES = ["do.declared", "do.ordinary", "do.registered"]


class ContextProject(Project):
    """A project whose app has a task class with a `__call__`."""

    def __init__(self, directory: Path, call: str) -> None:
        self.notes = directory / "notes"
        self._call = call
        group = {"argv": python_child("obeys"), "tasks": ["do.*", "do.registered"]}
        super().__init__(directory, conf={"subproc_pool": {"children": {"obeys": group}}})

    def _write(self, code: str, **facts: Any) -> None:
        text = CONTEXTS.format(path=str(self.notes), call=self._call, **facts)
        (self.directory / "proj.py").write_text(text)

    def check(self, app: Celery) -> None:
        """Have the worker of `app` do each of the tasks, twice; see what was noted."""
        expected = []
        for name in NAMES * 2:
            result = app.send_task(name, [[["reply", {"result": 42}]]])
            assert result.get(timeout=DEADLINE, interval=0.02) == 42
            expected += [
                f"before {name} {result.id} in a context",
                f"after {name} {result.id} in a context",
                f"success {name} {result.id} in none",
            ]
            # The result is stored before the last one of them.
            wait_for(partial(self.has_noted, len(expected)), "the notes")
        assert self.notes.read_text().splitlines() == expected

    def has_noted(self, lines: int) -> bool:
        return len(self.notes.read_text().splitlines()) == lines

    def check_retry(self, app: Celery) -> None:
        """A retry, which the exchange sends, is one of the task's."""
        result = app.send_task("do.declared", [[["throttle", 2, 0]]])
        assert result.get(timeout=DEADLINE, interval=0.02) == {"throttles": 2, "retries": 0}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_the_apps_class(tmp_path: Path, call: str) -> None:
    project = ContextProject(tmp_path, call)
    with project.worker("-P", "subproc", "-c", "1"):
        project.check(project.app)
        project.check_retry(project.app)


EMBEDDED = """
import sys
from celery.contrib.testing.worker import start_worker
from proj import app
if __name__ == "__main__":
    with start_worker(app, pool="celery_subproc_pool:Pool", perform_ping_check=False,
                      shutdown_timeout=30, concurrency=1):
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_the_apps_class_in_an_embedded_worker(tmp_path: Path, call: str) -> None:
    # Such a worker does not prepare Celery's own `__call__` for being called in a worker.
    project = ContextProject(tmp_path, call)
    (tmp_path / "embedded.py").write_text(EMBEDDED)
    with subprocess.Popen(
        [sys.executable, "embedded.py"],
        cwd=tmp_path,
        env=project.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as embedded:
        assert embedded.stdout is not None
        assert embedded.stdout.readline() == b"ready\n"
        project.check(project.app)
        project.check_retry(project.app)
        embedded.communicate(timeout=DEADLINE)
    assert embedded.returncode == 0
