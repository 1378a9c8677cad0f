"""Real workers on real brokers, where the worker's event loop turns the engine."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import chain, chord
from celery.exceptions import TaskRevokedError
from kombu import Connection, Queue

from celery_subproc_pool import ChildTaskError

from .conftest import CHILDREN, DEADLINE, PORTS, python_child, require, wait_for
from .cutting_proxy import CuttingProxy
from .worker import Project

BROKERS = {
    "redis": "redis://127.0.0.1:6379/9",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
}
BACKEND = "redis://127.0.0.1:6379/10"

CODE = """
from celery_subproc_pool import SubprocTask
app.conf.include = ["ordinary_tasks"]
@app.task(base=SubprocTask, name="do.late", acks_late=True, reject_on_worker_lost=True)
def late(*args): ...
@app.task(name="python.late", acks_late=True, reject_on_worker_lost=True)
def python_late(path, signum):
    import os
    with open(path, "a") as file:
        file.write("run\\n")
    os.kill(os.getpid(), signum)
"""


@pytest.fixture(
    params=[
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    ]
)
def broker(request: pytest.FixtureRequest) -> str:
    require(request.param)
    # The results are kept there, whatever the broker.
    require("redis")
    return str(request.param)


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Keep Celery's client alive: until 5.7, when the collector finds an `AsyncResult` while
    another is being subscribed to, its `__del__` waits for ever for redis-py's lock."""
    gc.disable()
    yield
    gc.enable()


class Workplace:
    """A project on a queue of its own.

    Arguments:
        directory: the project's.
        broker: the broker's name.
        code: added to the project's.
        proxy: the worker's way to the broker, if it has one of its own.
        conf: added to the configuration.
    """

    def __init__(
        self,
        directory: Path,
        broker: str,
        code: str = "",
        proxy: CuttingProxy | None = None,
        **conf: Any,
    ) -> None:
        self.log = directory / "jobs.log"
        self.log.touch()
        self.broker = broker
        self.queue = f"csp-test-{uuid.uuid4().hex}"
        obeys = {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"]}
        perl = {
            "argv": ["perl", str(CHILDREN / "log_jobs.pl")],
            "tasks": ["perl.it"],
            "env": {"LOG": str(self.log), "MEET": "4"},
        }
        full = {
            "subproc_pool": {"children": {"obeys": obeys, "perl": perl}},
            "task_default_queue": self.queue,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            **conf,
        }
        url = BROKERS[broker]
        way = None if proxy is None else proxy.url(url)
        self.project = Project(directory, url, BACKEND, full, CODE + code, workers_broker=way)
        self.app = self.project.app

    def send(self, name: str, *steps: list[Any], **options: Any) -> Any:
        return self.app.send_task(name, [list(steps)] if steps else [], **options)

    def close(self) -> None:
        with Connection(BROKERS[self.broker]) as connection:
            Queue(self.queue, channel=connection.default_channel).delete()
        self.app.close()


@pytest.fixture
def place(tmp_path: Path, broker: str) -> Iterator[Workplace]:
    workplace = Workplace(tmp_path, broker)
    yield workplace
    workplace.close()


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE)


PUTS_ASIDE = """
from kombu import Queue
arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "%s"}
app.conf.task_queues = [Queue(app.conf.task_default_queue, queue_arguments=arguments)]
"""


@pytest.mark.parametrize("task", ["do.late", "python.late"])
def test_a_poison_message_costs_three_children_and_is_put_aside(
    tmp_path: Path, broker: str, task: str
) -> None:
    runs, dead = tmp_path / "runs", f"csp-test-{uuid.uuid4().hex}-dead"
    place = Workplace(tmp_path, broker, code=PUTS_ASIDE % dead)
    args = {"do.late": [[["append", str(runs)], ["signal", 11]]], "python.late": [str(runs), 11]}
    logged = (
        "PoisonousTaskError('It has cost 3 children of this worker, as many as it may"
        " (max_crashes), and is rejected. The last one: signal 11 (SIGSEGV)"
    )
    with (
        closing(place),
        Connection(BROKERS[broker]) as connection,
        closing(connection.SimpleQueue(dead)) as aside,
    ):
        with place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "2") as worker:
            # Declared by the worker, with its arguments.
            queue = Queue(place.queue, no_declare=True)
            result = place.app.send_task(task, args[task], queue=queue)
            with pytest.raises(Exception, match="It has cost 3 children") as failure:
                get(result)
            assert type(failure.value).__name__ == "PoisonousTaskError"
            assert result.state == "FAILURE"
            assert runs.read_text().split() == ["run"] * 3
            wait_for(lambda: logged in worker.log, "a word in the log")
            if broker == "rabbitmq":
                # Where it can, the broker puts it aside.
                assert aside.get(timeout=DEADLINE).headers["id"] == result.id
        # Nothing was left for another worker.
        assert worker.log.count(f"[{result.id}] received") == 3
        aside.consumer.cancel()
        aside.queue.delete()


def test_ten_thousand_jobs_on_four_warm_perl_children_exactly_once_each(place: Workplace) -> None:
    count = 10_000
    with place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "4") as worker:
        with place.app.producer_pool.acquire() as producer:
            ids = [
                place.send("perl.it", producer=producer, ignore_result=True).id
                for _ in range(count)
            ]
        wait_for(lambda: place.log.read_bytes().count(b"\n") >= count, "all jobs", deadline=120)
        assert worker.stop() == 0
    lines = [line.split() for line in place.log.read_text().splitlines()]
    assert Counter(task_id for _, task_id in lines) == Counter(ids)
    assert len({pid for pid, _ in lines}) == 4


def test_twenty_thousand_tasks_on_four_python_children_exactly_once_each(place: Workplace) -> None:
    count = 20_000
    with place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "4") as worker:
        with place.app.producer_pool.acquire() as producer:
            for number in range(count):
                place.app.send_task("log_pid", (str(place.log), number), producer=producer)
        wait_for(lambda: place.log.read_bytes().count(b"\n") >= count, "all tasks", deadline=120)
        children = {str(child.pid) for child in worker.children()}
        assert worker.stop() == 0
    lines = [line.split() for line in place.log.read_text().splitlines()]
    assert Counter(int(number) for number, _ in lines) == Counter(range(count))
    # Four of its own, beside those of the external groups; none of them was replaced.
    assert {pid for _, pid in lines} <= children
    assert "is replaced" not in worker.log


def test_the_outcomes_on_the_event_loop(place: Workplace) -> None:
    with place.project.worker("-P", "subproc", "-c", "2") as worker:
        assert get(place.send("do.it", ["reply", {"result": [1]}])) == [1]
        with pytest.raises(ChildTaskError, match="boom"):
            get(place.send("do.it", ["reply", {"status": "error", "message": "boom"}]))
        assert get(place.send("do.it", ["throttle", 3, 0.01])) == {"throttles": 3, "retries": 0}
        with pytest.raises(WorkerLostError, match=r"signal 9 \(SIGKILL\)"):
            get(place.send("do.it", ["signal", 9]))
        limited = place.send("do.it", ["wait", "/nowhere"], time_limit=0.5)
        with pytest.raises(TimeLimitExceeded):
            get(limited)
        assert f"Hard time limit (0.5s) exceeded for do.it[{limited.id}]" in worker.log
        it = place.app.signature("do.it")
        assert get(chain(it.clone(("a",)), it.clone(("b",)))()) == [["a"], "b"]
        assert get(chord([it.clone((1,)), it.clone((2,))])(it.clone(("z",)))) == [[[1], [2]], "z"]
        assert len(get(place.send("do.it", ["size", 5_000_000]))) == 5_000_000
        [echo] = get(place.app.send_task("do.it", ["x" * 5_000_000]))
        assert len(echo) == 5_000_000


def test_revoke_with_terminate(place: Workplace, tmp_path: Path) -> None:
    with place.project.worker("-P", "subproc", "-c", "1") as worker:
        before = {child.pid for child in worker.children()}
        begun = tmp_path / "begun"
        result = place.send("do.it", ["touch", str(begun)], ["wait", "/nowhere"])
        wait_for(begun.exists, "the job's begin")
        place.app.control.revoke(result.id, terminate=True, destination=[place.project.node])
        with pytest.raises(TaskRevokedError):
            get(result)
        assert get(place.send("do.it", ["facts"]))["pid"] not in before
        assert "WorkerLostError" not in worker.log


def test_a_late_acked_job_whose_child_was_lost_is_delivered_again(
    place: Workplace, tmp_path: Path
) -> None:
    with place.project.worker("-P", "subproc", "-c", "1"):
        gate = tmp_path / "gate"
        result = place.send("do.late", ["die_once", str(gate)], ["reply", {"result": "alive"}])
        assert get(result) == "alive"


def test_a_job_that_ends_in_a_warm_stop_is_acked_and_not_run_again(
    place: Workplace, tmp_path: Path
) -> None:
    begun, gate, runs = tmp_path / "begun", tmp_path / "gate", tmp_path / "runs"
    with place.project.worker("-P", "subproc", "-c", "1") as worker:
        result = place.send(
            "do.late",
            ["append", str(runs)],
            ["touch", str(begun)],
            ["wait", str(gate)],
            ["reply", {"result": 7}],
        )
        wait_for(begun.exists, "the job's begin")
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Warm shutdown" in worker.log, "the shutdown")
        gate.touch()
        assert worker.process.wait(DEADLINE) == 0
    assert get(result) == 7
    with place.project.worker("-P", "subproc", "-c", "1"):
        assert get(place.send("do.it")) == []
    assert runs.read_text() == "run\n"


@pytest.mark.parametrize("remapped", [False, True], ids=["SIGQUIT", "remapped SIGTERM"])
def test_a_cold_stop_gives_late_acked_jobs_back_to_the_broker(
    place: Workplace, tmp_path: Path, remapped: bool
) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    environ = {"REMAP_SIGTERM": "SIGQUIT"} if remapped else {}
    with place.project.worker("-P", "subproc", "-c", "1", **environ) as worker:
        result = place.send(
            "do.late", ["touch", str(begun)], ["wait", str(gate)], ["reply", {"result": 7}]
        )
        wait_for(begun.exists, "the job's begin")
        worker.process.send_signal(signal.SIGTERM if remapped else signal.SIGQUIT)
        worker.process.wait(DEADLINE)
        # Prefork's words: neither revoked nor failed.
        assert result.state not in ("REVOKED", "FAILURE")
    gate.touch()
    with place.project.worker("-P", "subproc", "-c", "1"):
        assert get(result) == 7


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="Celery 5.5 brought it")
def test_a_soft_shutdown_lets_short_jobs_end_and_gives_long_ones_back(
    tmp_path: Path, broker: str
) -> None:
    place = Workplace(tmp_path, broker, worker_soft_shutdown_timeout=3.0)
    gate, later = tmp_path / "gate", tmp_path / "later"

    def send(name: str, opens: Path) -> Any:
        """A late-acked job that waits for a file, once it has begun."""
        begun, runs = tmp_path / f"{name} begun", tmp_path / f"{name} runs"
        steps = ["append", str(runs)], ["touch", str(begun)], ["wait", str(opens)]
        result = place.send("do.late", *steps, ["reply", {"result": name}])
        wait_for(begun.exists, "the job's begin")
        return result

    with closing(place):
        with place.project.worker("-P", "subproc", "-c", "3") as worker:
            short, long = send("short", gate), send("long", later)
            ordinary = place.app.send_task("wait", (str(tmp_path / "begun"), str(gate)))
            wait_for((tmp_path / "begun").exists, "the ordinary task's begin")
            worker.process.send_signal(signal.SIGQUIT)
            wait_for(lambda: "Initiating Soft Shutdown" in worker.log, "the shutdown")
            gate.touch()
            worker.process.wait(DEADLINE)
            assert get(short) == "short"
            assert get(ordinary) is not None
            assert long.state not in ("SUCCESS", "REVOKED", "FAILURE")
        later.touch()
        with place.project.worker("-P", "subproc", "-c", "1"):
            assert get(long) == "long"
            assert get(place.send("do.it")) == []
    assert (tmp_path / "short runs").read_text() == "run\n", "it was acknowledged"
    assert (tmp_path / "long runs").read_text() == "run\n" * 2


def test_a_revoked_job_takes_no_other_with_it(place: Workplace, tmp_path: Path) -> None:
    # The result of the first is being stored while its child has the second already.
    stored, begun, gate = tmp_path / "stored", tmp_path / "begun", tmp_path / "gate"
    code = f"""
import os, time
from celery import signals
@signals.task_postrun.connect(weak=False)
def hold(task_id, args, **_):
    if args and args[0] == [["reply", {{"result": "first"}}]]:
        while not os.path.exists({str(stored)!r}):
            time.sleep(0.01)
"""
    (tmp_path / "proj.py").write_text((tmp_path / "proj.py").read_text() + code)
    place.project.app.conf.subproc_pool["children"]["obeys"]["size"] = 1
    setting = json.dumps(place.project.app.conf.subproc_pool)
    with place.project.worker("-P", "subproc", "-c", "2", CELERY_SUBPROC_POOL=setting) as worker:
        first = place.send("do.it", ["reply", {"result": "first"}])
        second = place.send(
            "do.it", ["touch", str(begun)], ["wait", str(gate)], ["reply", {"result": "second"}]
        )
        wait_for(begun.exists, "the second job's begin")
        place.app.control.revoke(first.id, terminate=True, destination=[place.project.node])
        wait_for(lambda: f"Terminating {first.id}" in worker.log, "the revoke")
        stored.touch()
        gate.touch()
        assert get(second) == "second"


def test_a_lost_broker_connection_loses_no_reply_and_no_limit(
    place: Workplace, tmp_path: Path
) -> None:
    begun, gate, runs = tmp_path / "begun", tmp_path / "gate", tmp_path / "runs"
    with place.project.worker("-P", "subproc", "-c", "2") as worker:
        running = place.send(
            "do.it",
            ["append", str(runs)],
            ["touch", str(begun)],
            ["wait", str(gate)],
            ["reply", {"result": "kept"}],
        )
        limited = place.send("do.it", ["wait", "/nowhere"], time_limit=3)
        wait_for(begun.exists, "the job's begin")
        cut_connections(place, worker.process.pid)
        wait_for(lambda: "onnection to broker lost" in worker.log, "the loss")
        gate.touch()
        assert get(running) == "kept"
        with pytest.raises(TimeLimitExceeded):
            get(limited)
        assert get(place.send("do.it", ["reply", {"result": "after"}])) == "after"
        assert worker.stop() == 0
    assert runs.read_text() == "run\n"


def test_a_broker_that_is_gone_keeps_no_worker_from_stopping(tmp_path: Path, broker: str) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with (
        closing(CuttingProxy(PORTS[broker])) as proxy,
        closing(Workplace(tmp_path, broker, proxy=proxy)) as place,
    ):
        with place.project.worker("-P", "subproc", "-c", "2") as worker:
            result = place.send(
                "do.late", ["touch", str(begun)], ["wait", str(gate)], ["reply", {"result": 7}]
            )
            wait_for(begun.exists, "the job's begin")
            proxy.close()
            wait_for(lambda: "onnection to broker lost" in worker.log, "the loss")
            if worker.process.poll() is None:
                # On Redis, kombu may have ended the worker by now.
                worker.process.send_signal(signal.SIGTERM)
            gate.touch()
            worker.process.wait(DEADLINE)
        assert get(result) == 7
        assert "Error on stopping Pool" not in worker.log


def cut_connections(place: Workplace, pid: int) -> None:
    """Cut the connections of process `pid` to its broker, from the broker's side."""
    if place.broker == "redis":
        ports = {
            connection.laddr.port
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.raddr and connection.raddr.port == PORTS["redis"]
        }
        import redis

        with redis.Redis.from_url(BROKERS["redis"]) as client:
            for entry in client.client_list():
                if int(entry["addr"].rpartition(":")[2]) in ports and entry["db"] == "9":
                    client.client_kill_filter(_id=entry["id"])
    else:
        subprocess.run(
            ["rabbitmqctl", "close_all_connections", "cut by a test"],
            check=True,
            capture_output=True,
            timeout=60,
        )


def test_priorities_decide_what_comes_next(broker: str, tmp_path: Path) -> None:
    # Redis counts from the most urgent down, RabbitMQ from the least urgent up.
    conf: dict[str, Any] = {"worker_prefetch_multiplier": 1, "task_queue_max_priority": 9}
    urgent, patient = 9, 0
    if broker == "redis":
        conf["broker_transport_options"] = {"queue_order_strategy": "priority"}
        urgent, patient = 0, 9
    place = Workplace(tmp_path, broker, **conf)
    begun, gate, order = tmp_path / "begun", tmp_path / "gate", tmp_path / "order"
    with place.project.worker("-P", "subproc", "-c", "1"):
        place.send("do.it", ["touch", str(begun)], ["wait", str(gate)], ["reply", {}])
        wait_for(begun.exists, "the job that keeps the child busy")
        jobs = [("patient", patient)] * 4 + [("urgent", urgent)]
        results = [
            place.send("do.it", ["append", str(order), name], ["reply", {}], priority=priority)
            for name, priority in jobs
        ]
        gate.touch()
        for result in results:
            get(result)
    place.close()
    # What was prefetched before it comes first, and no more.
    assert order.read_text().split().index("urgent") < 4


def test_idle_workers_acknowledge_at_once(place: Workplace) -> None:
    # With kombu before 5.7 an ack from another thread waits for the hub to wake, up to a second.
    with place.project.worker("-P", "subproc", "-c", "1"):
        get(place.send("do.it"))
        begin = time.monotonic()
        for _ in range(10):
            get(place.send("do.late"))
        slow = time.monotonic() - begin
        begin = time.monotonic()
        for _ in range(10):
            get(place.send("do.it"))
        quick = time.monotonic() - begin
    # Ten late acks that waited would take seconds more than ten early ones.
    assert slow < 3 * quick + 2
