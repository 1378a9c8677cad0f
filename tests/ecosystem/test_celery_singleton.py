"""celery-singleton, unmodified: the scenarios of its README, on prefork and on this pool.

Its tasks take a lock in Redis when they are sent. They release it in `on_success` and `on_failure`,
in the process that traced the task. Celery 5.3 to 5.6 calls neither if that process is lost; the
package has `lock_expiry` for that.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Worker
from tests.support.workplace import BACKEND, Workplace, get

celery_singleton = pytest.importorskip("celery_singleton")

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("no_garbage_collection")]

#: Settings of the worker's project and of the test, which sends.
CODE = """
from celery_singleton import Singleton
from ordinary_tasks import wait

@app.task(name="do_stuff", base=Singleton)
def do_stuff(begun, gate):
    wait(begun, gate)
    return "done"

@app.task(name="unique_by_name", base=Singleton, unique_on=["username"])
def unique_by_name(username, begun, gate):
    wait(begun, gate)
    return username

@app.task(name="fails", base=Singleton)
def fails(begun, gate):
    wait(begun, gate)
    raise ValueError("no")

@app.task(name="dies", base=Singleton, lock_expiry=5)
def dies(begun, gate):
    wait(begun, gate)
    os._exit(3)

@app.task(name="over", base=Singleton, time_limit=1, lock_expiry=5)
def over(begun, gate):
    wait(begun, gate + " that never opens")

@app.task(name="strict", base=Singleton, raise_on_duplicate=True)
def strict(begun, gate):
    wait(begun, gate)
    return "done"
"""


class Place(NamedTuple):
    """A project with a running worker."""

    work: Workplace
    worker: Worker
    pool: str
    tasks: dict[str, Any]


@pytest.fixture(scope="module", params=["prefork", "celery_subproc_pool:Pool"])
def shared_worker(
    broker: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    conf = {
        "subproc_pool": {},
        "singleton_backend_url": BACKEND,
        "singleton_key_prefix": f"csp-test-{request.param}-{broker}-",
    }
    directory = tmp_path_factory.mktemp("singleton")
    with (
        closing(Workplace(directory, broker, "import os\n" + CODE, **conf)) as work,
        work.project.worker("-P", request.param, "-c", "2") as worker,
    ):
        yield Place(work, worker, request.param, _tasks_of(work.app))
        celery_singleton.clear_locks(work.app)
        if request.param == "prefork":
            # After a hard time limit, prefork's warm shutdown does not always end (seen).
            worker.process.send_signal(signal.SIGQUIT)
            worker.process.wait(DEADLINE)


def _tasks_of(app: Any) -> dict[str, Any]:
    """Define the tasks for the sender."""
    from tests.support import ordinary_tasks

    with pytest.MonkeyPatch.context() as patch:
        import sys

        patch.setitem(sys.modules, "ordinary_tasks", ordinary_tasks)
        exec(CODE, {"app": app, "__name__": "proj"})
    return dict(app.tasks)


class Run(NamedTuple):
    """A task that runs until its gate exists."""

    begun: Path
    gate: Path

    @property
    def args(self) -> tuple[str, str]:
        return str(self.begun), str(self.gate)

    def again(self) -> None:
        """Forget the run before."""
        for path in self:
            path.unlink(missing_ok=True)


@pytest.fixture
def place(shared_worker: Place) -> Place:
    return shared_worker


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "begun", tmp_path / "gate")


def test_a_duplicate_gets_the_result_of_the_first(place: Place, run: Run) -> None:
    task = place.tasks["do_stuff"]
    first = task.delay(*run.args)
    wait_for(run.begun.exists, "its begin")
    assert task.delay(*run.args).id == first.id
    run.gate.touch()
    assert get(first) == "done"
    _is_free(place, "do_stuff", run, first.id)


def test_unique_on_some_arguments(place: Place, run: Run, tmp_path: Path) -> None:
    task = place.tasks["unique_by_name"]
    first = task.delay("bob", *run.args)
    wait_for(run.begun.exists, "its begin")
    assert task.delay(username="bob", begun="other", gate="arguments").id == first.id
    other = Run(tmp_path / "other begun", tmp_path / "other gate")
    second = task.delay("alice", *other.args)
    assert second.id != first.id
    wait_for(other.begun.exists, "the begin of the other")
    run.gate.touch()
    other.gate.touch()
    assert (get(first), get(second)) == ("bob", "alice")


@pytest.mark.parametrize(
    ("name", "error"),
    [("fails", ValueError), ("dies", WorkerLostError), ("over", TimeLimitExceeded)],
)
def test_a_failure_frees_the_lock(
    place: Place, run: Run, name: str, error: type[Exception]
) -> None:
    first = place.tasks[name].delay(*run.args)
    assert place.tasks[name].delay(*run.args).id == first.id
    run.gate.touch()
    with pytest.raises(error):
        get(first)
    _is_free(place, name, run, first.id)


def test_raise_on_duplicate(place: Place, run: Run) -> None:
    first = place.tasks["strict"].delay(*run.args)
    wait_for(run.begun.exists, "its begin")
    with pytest.raises(celery_singleton.DuplicateTaskError) as caught:
        place.tasks["strict"].delay(*run.args)
    assert caught.value.task_id == first.id
    run.gate.touch()
    assert get(first) == "done"


def _is_free(place: Place, name: str, run: Run, before: str) -> None:
    """Wait until the lock is released; check that the task can be sent once more."""
    task = place.tasks[name]
    lock = task.generate_lock(name, list(run.args), {})
    wait_for(lambda: task.singleton_backend.get(lock) is None, "the release of the lock")
    run.again()
    run.gate.touch()
    again = task.delay(*run.args)
    assert again.id != before
    again.get(propagate=False, timeout=30)
