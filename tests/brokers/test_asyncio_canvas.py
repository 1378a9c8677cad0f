"""What Celery makes of `async def` tasks on real brokers: canvas, retries, revokes, events, hooks.

Their bodies run in an asyncio child. Around them, all is as for other tasks: these tests say of
coroutines what Celery's documentation says of tasks.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery import Signature, chain, chord, group
from celery.canvas import chunks, xmap, xstarmap
from celery.exceptions import ChordError

from tests.support.basics import DEADLINE, python_child, state_of, wait_for
from tests.support.worker import Worker
from tests.support.workplace import Workplace, control, get, listening, working

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

CODE = """
app.conf.include = ["ordinary_tasks", "canvas_tasks"]
@app.task(name="process")
def process(*_):
    import os
    return os.getpid()
"""

#: One of each kind is enough: it is the asyncio child that has many jobs.
SETTINGS = {
    "children": {"obeys": {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"], "size": 1}},
    "python": {"size": 1},
}


class Site(NamedTuple):
    place: Workplace
    worker: Worker

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.place.app.send_task(name, args, **options)

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        return get(self.send(name, *args, **options))

    def sig(self, name: str, *args: Any, **kwargs: Any) -> Signature:
        """Return a signature of the task `name`."""
        return self.place.app.signature(name, args, kwargs)

    def si(self, name: str, *args: Any) -> Signature:
        """Return one that takes no more arguments."""
        return self.place.app.signature(name, args, immutable=True)


def workplace(directory: Path, broker: str, **conf: Any) -> Workplace:
    return Workplace(directory, broker, CODE, **{"subproc_pool": SETTINGS, **conf})


@pytest.fixture(scope="module")
def aio_worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Site]:
    """The worker of all tests that leave it as it is."""
    place = workplace(tmp_path_factory.mktemp("aio"), broker)
    with working(place, "-c", "8", "-E") as worker:
        yield Site(place, worker)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class Waiting(NamedTuple):
    """A coroutine that runs until its gate is there."""

    result: Any
    gate: Path
    ended: Path

    def end(self) -> int:
        """Let it end; return the pid of its child."""
        self.gate.touch()
        pid: int = get(self.result)
        return pid


def waiting(site: Site, directory: Path, count: int) -> list[Waiting]:
    """Return as many coroutines that have begun."""
    found = []
    for number in range(count):
        begun, gate, ended = (directory / f"{number} {word}" for word in ("begun", "gate", "ended"))
        result = site.send("aio.wait", str(begun), str(gate), str(ended))
        wait_for(begun.exists, f"the begin of coroutine {number}")
        found.append(Waiting(result, gate, ended))
    return found


# -- canvas


def test_chains_groups_and_chords(aio_worker: Site) -> None:
    sig = aio_worker.sig
    assert get(chain(sig("aio.add", 1, 2), sig("aio.add", 4), sig("aio.double"))()) == 14
    assert get(group(sig("aio.add", n, n) for n in range(20))()) == [2 * n for n in range(20)]
    header = [sig("aio.add", n, n) for n in range(10)]
    assert get(chord(header)(sig("aio.total"))) == 90
    both = group(sig("aio.double"), sig("aio.double"))
    # Celery 5.3 looks for the backend of the current app, unless it is told.
    steps = [chord(header, sig("aio.total")), both, sig("aio.total")]
    assert get(chain(*steps, app=aio_worker.place.app)()) == 360


def test_canvas_of_coroutines_and_other_tasks(aio_worker: Site) -> None:
    sig = aio_worker.sig
    assert get(chain(sig("add", 1, 2), sig("aio.add", 4), sig("add", 8), sig("aio.double"))()) == 30
    mixed = [sig(name, n, n) for n in range(5) for name in ("add", "aio.add")]
    assert get(chord(mixed)(sig("aio.total"))) == 40
    assert get(chord(mixed)(sig("total"))) == 40
    assert get(chain(sig("aio.add", 1, 2), sig("do.it"), sig("aio.total"))()) == 3


def test_a_chord_with_an_error_in_its_header(aio_worker: Site, tmp_path: Path) -> None:
    sig = aio_worker.sig
    path = tmp_path / "failures"
    body = sig("aio.total")
    body.link_error(sig("aio.errback", path=str(path)))
    body.link_error(sig("aio.called_errback", path=str(path)))
    result = chord([sig("aio.add", 1, 2), sig("aio.fail", "no"), sig("aio.add", 3, 4)])(body)
    # `get` would raise the first error that it sees: this one, or that of the header.
    error = result.get(timeout=DEADLINE, propagate=False)
    assert isinstance(error, ChordError)
    assert "ValueError('no')" in str(error)
    wait_for(lambda: len(lines_of(path)) == 2, "both errbacks")
    called, sent = sorted(lines_of(path))
    assert called.split()[1:3] == [result.id, "ChordError"]
    assert sent == f"sent {result.id}"


def test_callbacks(aio_worker: Site, tmp_path: Path) -> None:
    site, path = aio_worker, tmp_path / "linked"
    links = [site.si("aio.write", str(path), word) for word in ("first", "second")]
    assert site.get("aio.add", 1, 2, link=links) == 3
    assert site.get("add", 1, 2, link=site.si("aio.write", str(path), "third")) == 3
    wait_for(lambda: len(lines_of(path)) == 3, "the callbacks")
    assert sorted(lines_of(path)) == ["first", "second", "third"]
    # The result is the callback's first argument.
    linked = site.sig("aio.add", 1)
    result = linked.freeze()
    assert site.get("aio.add", 1, 2, link=linked) == 3
    assert get(result) == 4


#: Tasks that fail, and their errors: each in the process that then calls its errbacks.
FAILING = {
    "asyncio child": ("aio.fail", ("no",), "ValueError"),
    "Python child": ("fail", ("value",), "ValueError"),
    "tracer": ("do.it", ([["reply", {"status": "error"}]],), "ChildTaskError"),
    "worker": ("aio.die", (), "WorkerLostError"),
}


@pytest.mark.parametrize("process", FAILING)
def test_errbacks(aio_worker: Site, tmp_path: Path, process: str) -> None:
    site, path = aio_worker, tmp_path / "failures"
    name, args, error = FAILING[process]
    errbacks = [site.sig(f"aio.{word}", path=str(path)) for word in ("errback", "called_errback")]
    result = site.send(name, *args, link_error=errbacks)
    assert type(result.get(timeout=DEADLINE, propagate=False)).__name__ == error
    wait_for(lambda: len(lines_of(path)) == 2, "both errbacks")
    called, sent = sorted(lines_of(path))
    assert sent == f"sent {result.id}"
    *words, pid = called.split()
    assert words == ["called", result.id, error]
    assert (int(pid) == site.worker.process.pid) == (process == "worker")
    assert "never awaited" not in site.worker.log


def test_replace(aio_worker: Site) -> None:
    assert aio_worker.get("aio.replaced", 3, 0) == 16
    assert aio_worker.get("aio.replaced", 3, 2) == 52
    header = [aio_worker.sig("aio.replaced", 3, 0), aio_worker.sig("aio.add", 1, 1)]
    assert get(chord(header)(aio_worker.sig("aio.total"))) == 18


def test_map_starmap_and_chunks(aio_worker: Site) -> None:
    app, sig = aio_worker.place.app, aio_worker.sig
    pairs = [(n, n) for n in range(10)]
    doubled = [2 * n for n in range(10)]
    assert get(xmap(sig("aio.double"), list(range(10)), app=app).delay()) == doubled
    assert get(xstarmap(sig("aio.add"), pairs, app=app).delay()) == doubled
    parts = get(chunks(sig("aio.add"), pairs, 3, app=app).group().apply_async())
    assert [n for part in parts for n in part] == doubled


def test_a_mapped_coroutine_runs_in_the_loop_of_the_others(aio_worker: Site) -> None:
    app, sig = aio_worker.place.app, aio_worker.sig
    pid = aio_worker.get("aio.process")
    assert get(xmap(sig("aio.process"), [1, 2], app=app).delay()) == [pid] * 2
    assert aio_worker.get("celery.starmap", sig("aio.process"), [[], []]) == [pid] * 2
    # Ordinary tasks share no process with coroutines.
    assert get(xmap(sig("process"), [1, 2], app=app).delay()) != [pid] * 2


def test_a_coroutine_sends_tasks(aio_worker: Site) -> None:
    app = aio_worker.place.app
    sent = aio_worker.get("aio.sends", 5)
    assert [get(app.AsyncResult(task_id)) for task_id in sent] == [6, 18, 20]
    # They count as its children.
    assert get(app.AsyncResult(sent[1])) == 18


# -- how a task ends


def test_retry(aio_worker: Site, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    result = aio_worker.send("aio.retried", str(path), 2)
    assert get(result) == 2
    began = [float(line) for line in lines_of(path)]
    assert len(began) == 3
    # The messages say when, in whole milliseconds at best.
    assert all(then - first > 0.29 for first, then in pairwise(began))
    assert f"[{result.id}] retry: Retry in 0.3s: KeyError('not yet')" in aio_worker.worker.log


def test_too_many_retries(aio_worker: Site, tmp_path: Path) -> None:
    result = aio_worker.send("aio.retried", str(tmp_path / "runs"), 9)
    with pytest.raises(KeyError, match="not yet"):
        get(result)
    assert result.state == "FAILURE"
    assert len(lines_of(tmp_path / "runs")) == 3


def test_autoretry(aio_worker: Site) -> None:
    assert aio_worker.get("aio.retries_itself", 2) == 2
    with pytest.raises(ConnectionError, match="not yet"):
        aio_worker.get("aio.retries_itself", 9)


def test_reject(aio_worker: Site, tmp_path: Path) -> None:
    site, again, gone = aio_worker, tmp_path / "again", tmp_path / "gone"
    assert site.get("aio.rejects", str(again), True) == "done"
    assert lines_of(again) == ["run"] * 2
    result = site.send("aio.rejects", str(gone), False)
    wait_for(lambda: f"[{result.id}] reject requeue=False: not now" in site.worker.log, "its end")
    assert lines_of(gone) == ["run"]


def test_ignore(aio_worker: Site) -> None:
    site = aio_worker
    result = site.send("aio.ignores", "HALFWAY")
    wait_for(lambda: f"Task aio.ignores[{result.id}] ignored" in site.worker.log, "its end")
    assert state_of(result) == "HALFWAY"


def test_states_seen_from_outside(aio_worker: Site, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results = [aio_worker.send("aio.progress", str(gate), of) for of in range(5)]
    for of, result in enumerate(results):
        wait_for(lambda one=result: state_of(one) == "PROGRESS", "the progress")
        assert result.info == {"of": of}
    gate.touch()
    # Each knows its own id, whatever its neighbours do.
    assert [get(result) for result in results] == [result.id for result in results]


def test_ignore_result(aio_worker: Site, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    result = aio_worker.send("aio.write", str(path), "here", ignore_result=True)
    wait_for(lambda: f"Task aio.write[{result.id}] succeeded" in aio_worker.worker.log, "its end")
    assert lines_of(path) == ["here"]
    assert state_of(result) == "PENDING"


# -- what operators do


def test_a_killed_child_among_twenty_late_jobs(tmp_path: Path, broker: str) -> None:
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    place = workplace(tmp_path, broker)
    with working(place, "-c", "20") as worker:
        site = Site(place, worker)
        results = [site.send("aio.late", str(runs), str(gate)) for _ in range(20)]
        wait_for(lambda: len(lines_of(runs)) == 20, "twenty coroutines")
        [pid] = {int(line.split()[1]) for line in lines_of(runs)}
        os.kill(pid, signal.SIGKILL)
        gate.touch()
        assert [get(result) for result in results] == [result.id for result in results]
        # What is acknowledged does not come again.
        assert worker.stop() == 0
    assert Counter(line.split()[0] for line in lines_of(runs)) == {r.id: 2 for r in results}


def test_revoke_of_one_of_many(aio_worker: Site, tmp_path: Path) -> None:
    place, worker = aio_worker
    replaced = worker.log.count("is replaced")
    first, second, third = waiting(aio_worker, tmp_path, 3)
    place.app.control.revoke(second.result.id, terminate=True, destination=[place.project.node])
    wait_for(lambda: state_of(second.result) == "REVOKED", "its state")
    # Its `finally` awaits something itself.
    wait_for(second.ended.exists, "its end")
    assert not first.ended.exists()
    assert not third.ended.exists()
    assert first.end() == third.end()
    assert state_of(second.result) == "REVOKED"
    assert worker.log.count("is replaced") == replaced


def test_inspect_active(aio_worker: Site, tmp_path: Path) -> None:
    running = waiting(aio_worker, tmp_path, 4)
    active = {job["id"]: job for job in control(aio_worker.place, "active")}
    assert set(active) == {one.result.id for one in running}
    pids = {one.end() for one in running}
    assert {job["worker_pid"] for job in active.values()} == pids
    assert len(pids) == 1
    wait_for(lambda: not control(aio_worker.place, "active"), "their end")


def test_events(aio_worker: Site) -> None:
    with listening(aio_worker.place) as events:
        ids = [aio_worker.send("aio.add", n, n).id for n in range(10)]

        def heard() -> Counter[tuple[str, str]]:
            return Counter((e["type"], e["uuid"]) for e in list(events) if e.get("uuid") in ids)

        kinds = ("task-received", "task-started", "task-succeeded")
        expected = {(kind, task_id): 1 for kind in kinds for task_id in ids}
        wait_for(lambda: len(heard()) >= len(expected), "the events")
        assert heard() == expected


# -- hooks

HOOKS = {
    "succeed": ["before_start True", "body", "on_success 7 True", "after_return SUCCESS True"],
    "fail": [
        "before_start True",
        "body",
        "on_failure ValueError True",
        "after_return FAILURE True",
    ],
    "retry": [
        *("before_start True", "body", "on_retry KeyError True"),
        *("before_start True", "body", "on_success 7 True", "after_return SUCCESS True"),
    ],
}


@pytest.mark.parametrize("what", HOOKS)
def test_hooks(aio_worker: Site, tmp_path: Path, what: str) -> None:
    path = tmp_path / "hooks"
    result = aio_worker.send("aio.hooked", str(path), what)
    result.get(timeout=DEADLINE, propagate=False)
    wait_for(lambda: "after_return" in path.read_text(), "the last hook")
    assert lines_of(path) == HOOKS[what]
