"""Real workers on real brokers, where the worker's event loop turns the engine."""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import chain, chord
from kombu import Connection, Queue

from celery_subproc_pool import ChildTaskError
from tests.support.basics import DEADLINE, PORTS, wait_for
from tests.support.cutting_proxy import CuttingProxy
from tests.support.workplace import BROKERS, Workplace, get

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

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
        "PoisonousTaskError('It has crashed 3 children of this worker, as many as max_crashes"
        " allows, and is rejected. The last one: signal 11 (SIGSEGV)"
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
            with pytest.raises(Exception, match="It has crashed 3 children") as failure:
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
    # The first one holds up its tracer.
    place.project.app.conf.subproc_pool["tracers"] = {"size": 2}
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
