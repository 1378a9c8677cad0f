"""celery-batches, unmodified: its own examples, on prefork and on this pool.

Its tasks give the pool a function of its own and a list of requests, from Celery's consumer or from
a timer. They acknowledge the messages only when the pool calls back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Project, Worker
from tests.support.workplace import BROKERS, Workplace, get

pytest.importorskip("celery_batches")

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("no_garbage_collection")]

CODE = """
import os
from collections import Counter
from pathlib import Path
from celery_batches import Batches

def note(path, *words):
    with open(path, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

# Counting clicks: the first example.
@app.task(name="count_click", base=Batches, flush_every=5, flush_interval=3600)
def count_click(requests):
    path = requests[0].args[0]
    for url, count in sorted(Counter(request.kwargs["url"] for request in requests).items()):
        note(path, url, count, os.getpid())

# Giving results: the second.
def answer_of(request):
    return {"url": request.args[0], "pid": os.getpid(), "hostname": request.hostname}

@app.task(name="wot_api", base=Batches, flush_every=3, flush_interval=3600)
def wot_api(requests):
    for request in requests:
        app.backend.mark_as_done(request.id, answer_of(request), request)

# The buffer is emptied by the timer.
@app.task(name="seldom_full", base=Batches, flush_every=1000, flush_interval=0.2)
def seldom_full(requests):
    for request in requests:
        app.backend.mark_as_done(request.id, len(requests), request)

@app.task(name="late", base=Batches, flush_every=2, flush_interval=3600, acks_late=True)
def late(requests):
    begun, gate = requests[0].args
    note(begun, len(requests))
    from ordinary_tasks import wait_for_file
    wait_for_file(gate)
    for request in requests:
        app.backend.mark_as_done(request.id, os.getpid(), request)

@app.task(name="fails", base=Batches, flush_every=2, flush_interval=3600)
def fails(requests):
    for request in requests:
        app.backend.mark_as_failure(request.id, ValueError(request.args[0]))
    raise RuntimeError("the batch fails")

@app.task(name="returns", base=Batches, flush_every=1, flush_interval=3600, acks_late=True)
def returns(requests):
    for request in requests:
        app.backend.mark_as_done(request.id, "done", request)
    # Neither pickle nor JSON can hold it.
    return lambda: requests

@app.task(name="dies", base=Batches, flush_every=1, flush_interval=3600)
def dies(requests):
    os._exit(3)

@app.task(name="add")
def add(x, y):
    return x + y
"""


class Place(NamedTuple):
    """A project with a running worker."""

    work: Workplace
    worker: Worker

    def send(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.work.app.send_task(name, args, kwargs)

    def serves(self) -> bool:
        """Whether the worker does an ordinary task."""
        return bool(get(self.send("add", 2, 3)) == 5)

    def children(self) -> set[int]:
        return {child.pid for child in self.worker.children()}


@pytest.fixture(scope="module", params=["prefork", "celery_subproc_pool:Pool"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_worker(
    broker: str, pool: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("batches")
    # As its documentation says: a worker must get as many messages as make a batch.
    conf = {"subproc_pool": {}, "worker_prefetch_multiplier": 0}
    with (
        closing(Workplace(directory, broker, CODE, **conf)) as work,
        work.project.worker("-P", pool, "-c", "2") as worker,
    ):
        yield Place(work, worker)


@pytest.fixture
def place(shared_worker: Place) -> Place:
    return shared_worker


def test_clicks_are_counted(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "clicks"
    for url in ("a", "b", "a", "a", "b"):
        place.send("count_click", str(path), url=url)
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) == 2, "the batch")
    (a, a_count, pid), (b, b_count, _) = (line.split() for line in path.read_text().splitlines())
    assert (a, a_count, b, b_count) == ("a", "3", "b", "2")
    assert int(pid) in place.children()


def test_each_request_has_its_result(place: Place) -> None:
    results = {url: place.send("wot_api", url) for url in ("a", "b", "c")}
    answers = {url: get(result) for url, result in results.items()}
    assert [answer["url"] for answer in answers.values()] == ["a", "b", "c"]
    [pid] = {answer["pid"] for answer in answers.values()}
    assert pid in place.children()
    assert {answer["hostname"] for answer in answers.values()} == {place.work.project.node}
    assert place.serves()


def test_a_timer_empties_the_buffer(place: Place) -> None:
    assert get(place.send("seldom_full")) >= 1
    assert place.serves()


def test_requests_come_with_a_batch_and_an_ordinary_task_between(place: Place) -> None:
    first = [place.send("wot_api", number) for number in range(2)]
    assert place.serves()
    last = place.send("wot_api", 2)
    assert [get(result)["url"] for result in [*first, last]] == [0, 1, 2]


def test_a_failing_batch_is_logged_and_the_next_is_served(place: Place) -> None:
    results = [place.send("fails", word) for word in ("one", "two")]
    for result, word in zip(results, ("one", "two"), strict=True):
        with pytest.raises(ValueError, match=word):
            get(result)
    wait_for(lambda: "the batch fails" in place.worker.log, "the log")
    assert place.serves()


def test_what_a_batch_returns_need_not_be_sendable(place: Place) -> None:
    assert get(place.send("returns")) == "done"
    assert place.serves()


def test_a_batch_whose_child_dies_does_not_harm_others(place: Place) -> None:
    before = place.children()
    place.send("dies")
    wait_for(lambda: before - place.children(), "the death of a child")
    assert place.serves()


def test_without_an_event_loop_a_timer_is_a_thread(pool: str, tmp_path: Path) -> None:
    project = Project(tmp_path, conf={"worker_prefetch_multiplier": 0}, code=CODE)
    with project.worker("-P", pool, "-c", "1"):
        results = [project.app.send_task("seldom_full") for _ in range(3)]
        assert all(result.get(timeout=DEADLINE) >= 1 for result in results)


def test_acknowledgements_come_after_the_batch(place: Place, broker: str, tmp_path: Path) -> None:
    if broker != "redis":
        pytest.skip("only Redis shows which messages are not acknowledged")
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    results = [place.send("late", str(begun), str(gate)) for _ in range(2)]
    wait_for(begun.exists, "the batch")
    assert all(_is_unacknowledged(result.id) for result in results)
    gate.touch()
    for result in results:
        get(result)
    wait_for(
        lambda: not any(_is_unacknowledged(result.id) for result in results),
        "the acknowledgements",
    )


def _is_unacknowledged(task_id: str) -> bool:
    with closing(redis.Redis.from_url(BROKERS["redis"])) as server:
        return any(task_id.encode() in message for message in server.hvals("unacked"))


def test_a_worker_that_is_killed_has_lost_no_batch(
    broker: str, pool: str, tmp_path: Path, no_garbage_collection: None
) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    if broker == "redis":
        pytest.skip("on Redis they come back when their time is over, and not by a worker's end")
    conf = {"subproc_pool": {}, "worker_prefetch_multiplier": 0}
    with closing(Workplace(tmp_path, broker, CODE, **conf)) as work:
        with work.project.worker("-P", pool, "-c", "2") as worker:
            place = Place(work, worker)
            results = [place.send("late", str(begun), str(gate)) for _ in range(2)]
            wait_for(begun.exists, "the batch")
            worker.process.kill()
            worker.process.wait()
        gate.touch()
        with work.project.worker("-P", pool, "-c", "2") as worker:
            [pid] = {get(result) for result in results}
            assert pid in Place(work, worker).children()
    assert len(begun.read_text().splitlines()) >= 2


def test_the_pool_waits_for_a_batch_when_the_worker_stops(
    broker: str, pool: str, tmp_path: Path
) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    conf = {"subproc_pool": {}, "worker_prefetch_multiplier": 0}
    with (
        closing(Workplace(tmp_path, broker, CODE, **conf)) as work,
        work.project.worker("-P", pool, "-c", "2") as worker,
    ):
        results = [Place(work, worker).send("late", str(begun), str(gate)) for _ in range(2)]
        wait_for(begun.exists, "the batch")
        worker.process.terminate()
        wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
        gate.touch()
        assert worker.process.wait(DEADLINE) == os.EX_OK
        assert len({get(result) for result in results}) == 1
