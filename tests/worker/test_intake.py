"""Whatever is wrong with a message, a task or our own code ends that job; the next is served."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.trace import trace_task_ret
from kombu import Connection

from celery_subproc_pool.errors import ConfigError
from celery_subproc_pool.worker.admission import seconds
from celery_subproc_pool.worker.pool import Pool
from tests.support.basics import DEADLINE, python_child, wait_for
from tests.support.odd_messages import Message, Sender, good, odd_messages
from tests.support.worker import Project
from tests.support.workplace import BROKERS, Workplace, get

pytestmark = pytest.mark.usefixtures("no_garbage_collection")

NOTE = """
@app.task(name="note")
def note(path=None, token=None):
    if path:
        with open(path, "a") as file:
            file.write(token + "\\n")
"""

#: How many messages of each kind the long test sends.
MOST = int(os.environ.get("CSP_ODD_MESSAGES", "5000"))


class Noted:
    """Sends good messages, whose tasks write to a file that they ran, among odd ones."""

    def __init__(self, place: Workplace) -> None:
        self._sender = Sender(BROKERS[place.broker], place.queue)
        self._path = place.log
        self.tokens: list[str] = []
        self.odd = 0

    def send(self, messages: list[Message]) -> None:
        """Send a good message for each task behind each odd one."""
        for message in messages:
            self.odd += self._sender.send(message)
            token = f"{len(self.tokens)}"
            self.tokens.append(token)
            if len(self.tokens) % 2:
                sent = self._sender.send(good("note", str(self._path), token))
            else:
                steps = [["append", str(self._path), token], ["reply", {}]]
                sent = self._sender.send(good("do.it", steps))
            assert sent

    def close(self) -> None:
        self._sender.close()

    @property
    def done(self) -> Counter[str]:
        """How often each good one ran."""
        return Counter(self._path.read_text().split())


def all_odd_messages() -> list[Message]:
    return [*odd_messages("note"), *odd_messages("do.it")]


def send_and_look(place: Workplace, messages: list[Message]) -> None:
    with (
        closing(Noted(place)) as noted,
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "4") as worker,
    ):
        noted.send(messages)
        wait_for(
            lambda: len(noted.done) == len(noted.tokens) or worker.process.poll() is not None,
            "the good messages",
            deadline=DEADLINE + len(messages) * 0.1,
        )
        assert worker.process.poll() is None, "the worker died"
        assert noted.done == Counter(noted.tokens)
        # The broker's protocol can't carry all of them.
        assert noted.odd > len(messages) * 0.7
        assert get(place.app.send_task("note", [])) is None
        assert worker.stop() == 0


@pytest.fixture
def busy_place(tmp_path: Path, broker: str) -> Iterator[Workplace]:
    # Messages without an id of their own may come at the same time.
    with closing(Workplace(tmp_path, broker, code=NOTE)) as workplace:
        yield workplace


def test_odd_messages_among_good_ones(busy_place: Workplace) -> None:
    messages = all_odd_messages()
    # About every sixth of all odd messages; another choice than the long test's.
    send_and_look(busy_place, random.Random(6).sample(messages, len(messages) // 6))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_thousands_of_odd_messages(busy_place: Workplace) -> None:
    messages = all_odd_messages()
    messages *= -(-MOST // len(messages))
    random.Random(5000).shuffle(messages)
    send_and_look(busy_place, messages[:MOST])


@pytest.mark.parametrize("name", ["note", "do.it"])
@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"timelimit": ["soon", None]}, "the hard time limit: expected a number of seconds"),
        ({"timelimit": [None, [1]]}, "the soft time limit: expected a number of seconds"),
        ({"timelimit": [-1, None]}, "the hard time limit: expected a number of seconds"),
    ],
)
def test_limits_that_are_none_fail_the_job(
    odd_worker: Workplace, name: str, headers: dict[str, Any], words: str
) -> None:
    with closing(Sender(BROKERS[odd_worker.broker], odd_worker.queue)) as sender:
        message = good(name, **headers)
        assert sender.send(message)
        result = odd_worker.app.AsyncResult(message.headers["id"])
        with pytest.raises(ValueError, match=words):
            get(result)


@pytest.fixture(scope="module")
def odd_worker(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("odd"), broker, code=NOTE + TEXT_LIMITS)
    with closing(place), place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "2"):
        yield place


TEXT_LIMITS = """
import decimal, time
@app.task(name="slow.text", time_limit="0.2")
def slow_text():
    time.sleep(600)
@app.task(name="slow.decimal", soft_time_limit=decimal.Decimal("0.2"))
def slow_decimal():
    time.sleep(600)
@app.task(name="slow")
def slow():
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("slow.text", {}, "TimeLimitExceeded"),
        ("slow.decimal", {}, "SoftTimeLimitExceeded"),
        ("slow", {"time_limit": "0.2"}, "TimeLimitExceeded"),
        ("slow", {"soft_time_limit": "0.2"}, "SoftTimeLimitExceeded"),
    ],
)
def test_limits_as_text(
    odd_worker: Workplace, name: str, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(Exception, match=r"0\.2|SoftTimeLimitExceeded") as failure:
        get(odd_worker.app.send_task(name, **options))
    assert type(failure.value).__name__ == error


def test_the_setting_as_text(tmp_path: Path) -> None:
    code = "import time\n@app.task(name='slow')\ndef slow():\n    time.sleep(600)\n"
    project = Project(tmp_path, conf={"task_time_limit": "0.2"}, code=code)
    with project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker:
        with pytest.raises(Exception, match=r"TimeLimitExceeded\(0\.2,?\)"):
            project.app.send_task("slow").get(timeout=DEADLINE, interval=0.02)
        assert worker.stop() == 0


def test_the_setting_as_other_text(tmp_path: Path) -> None:
    project = Project(tmp_path, conf={"task_soft_time_limit": "soon"})
    done = project.run("worker", "-P", "celery_subproc_pool:Pool", "-c", "1")
    assert done.returncode != 0
    assert "task_soft_time_limit: expected a number of seconds, got 'soon'" in done.stdout


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, None), (0, None), ("", None), ("0", None), (5, 5.0), (2.5, 2.5), ("300", 300.0),
        (Decimal("1.5"), 1.5), (2**70, None), (float("inf"), None), (True, 1.0),
    ],
)  # fmt: skip
def test_seconds(value: Any, limit: float | None) -> None:
    assert seconds(value, "it") == limit


@pytest.mark.parametrize("value", [-1, "-1", "soon", [1], {"a": 1}, float("nan"), 10**400])
def test_no_seconds(value: Any) -> None:
    with pytest.raises(ValueError, match="it: expected a number of seconds, got "):
        seconds(value, "it")


@pytest.mark.parametrize("name", ["note", "do.it"])
def test_what_is_refused_is_acknowledged(tmp_path: Path, broker: str, name: str) -> None:
    """Otherwise a few of them would fill the prefetch limit, and the worker would stand still."""
    with (
        closing(Workplace(tmp_path, broker, code=NOTE)) as place,
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker,
    ):
        refused = [place.app.send_task(name, time_limit=-1) for _ in range(10)]
        assert get(place.app.send_task("note")) is None
        for result in refused:
            with pytest.raises(ValueError, match="the hard time limit"):
                get(result)
        assert worker.stop() == 0
        # On Redis, an empty queue does not exist.
        with (
            Connection(BROKERS[broker]) as connection,
            suppress(*connection.channel_errors),
        ):
            assert connection.default_channel.queue_declare(place.queue, passive=True)[1] == 0


def test_fields_that_are_null(odd_worker: Workplace) -> None:
    """Foreign producers send null: a throttled task is sent again, and counts its throttles."""
    names = ("retries", "timelimit", "headers", "stamps", "stamped_headers", "delivery_info")
    message = good("do.it", [["throttle", 2, 0.01], ["retry"]], **dict.fromkeys(names))
    with closing(Sender(BROKERS[odd_worker.broker], odd_worker.queue)) as sender:
        assert sender.send(message)
    result = odd_worker.app.AsyncResult(message.headers["id"])
    with pytest.raises(Exception, match="try again"):
        get(result)
    message = good("do.it", [["throttle", 2, 0.01]], **dict.fromkeys(names))
    with closing(Sender(BROKERS[odd_worker.broker], odd_worker.queue)) as sender:
        assert sender.send(message)
    result = odd_worker.app.AsyncResult(message.headers["id"])
    assert get(result) == {"throttles": 2, "retries": 0}


UNKNOWN = """
from celery_subproc_pool import SubprocTask
@app.task(base=SubprocTask, name="lost.it", child="nowhere")
def lost(): ...
"""


def test_a_task_that_names_no_group_and_comes_later(tmp_path: Path, broker: str) -> None:
    place = Workplace(tmp_path, broker, code=NOTE, worker_pool_restarts=True)
    (tmp_path / "later.py").write_text("from proj import app\n" + UNKNOWN)
    with (
        closing(place),
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "2") as worker,
    ):
        place.app.control.pool_restart(
            modules=["later"], destination=[place.project.node], reply=True, timeout=20
        )
        wait_for(
            lambda: "lost.it names the child 'nowhere'" in worker.log, "the refusal of the restart"
        )
        # More than may be in flight.
        for _ in range(10):
            with pytest.raises(Exception, match=r"lost\.it names the child 'nowhere'"):
                get(place.app.send_task("lost.it"))
        assert get(place.app.send_task("note")) is None
        assert worker.stop() == 0


# -- faults of our own, injected into a real worker

#: These faults do not depend on the broker.
with_a_hub = pytest.mark.parametrize(
    "broker", [pytest.param("redis", marks=pytest.mark.redis)], indirect=True
)

FAULT = """
import os, celery_subproc_pool.{module} as module
owner, name, original = module{owner}, {name!r}, module{owner}.{name}
def faulty(*args, **kwargs):
    if os.path.exists("fault"):
        raise RuntimeError("injected")
    return original(*args, **kwargs)
setattr(owner, name, faulty)
"""


def faulty_worker(tmp_path: Path, broker: str | None, module: str, owner: str, name: str) -> Any:
    code = NOTE + FAULT.format(module=module, owner=owner, name=name)
    if broker is None:
        return Project(tmp_path, code=code)
    return Workplace(tmp_path, broker, code=code)


@with_a_hub
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("worker.routes", ".Routes", "find"),
        ("python_child.codec", "", "encode_task"),
        ("worker.admission", ".Admission", "_limit"),
    ],
)
def test_a_fault_on_the_way_in_ends_that_job(
    tmp_path: Path, broker: str, module: str, owner: str, name: str
) -> None:
    place = faulty_worker(tmp_path, broker, module, owner, name)
    with (
        closing(place),
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "2") as worker,
    ):
        (tmp_path / "fault").touch()
        for _ in range(5):
            with pytest.raises(RuntimeError, match="injected"):
                get(place.app.send_task("note"))
        (tmp_path / "fault").unlink()
        assert get(place.app.send_task("note")) is None
        assert "can't be given to a child: RuntimeError('injected')" in worker.log
        assert worker.stop() == 0


@with_a_hub
def test_a_fault_in_serving_a_child_costs_that_child(tmp_path: Path, broker: str) -> None:
    place = faulty_worker(tmp_path, broker, "core.scheduler", ".Scheduler", "replied")
    with (
        closing(place),
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker,
    ):
        (tmp_path / "fault").touch()
        place.app.send_task("note")
        wait_for(
            lambda: "is replaced: serving it failed: RuntimeError('injected')" in worker.log,
            "the replacement",
        )
        (tmp_path / "fault").unlink()
        assert get(place.app.send_task("note")) is None
        assert worker.stop() == 0


def ask(command: str) -> Callable[[Workplace], None]:
    """Return what sends a remote control command, whatever comes of it."""

    def send(place: Workplace) -> None:
        place.app.control.broadcast(
            command, destination=[place.project.node], reply=True, timeout=3
        )

    return send


def revoke(place: Workplace) -> None:
    result = place.app.send_task("slow")
    wait_for(lambda: result.state == "STARTED", "the start of the job")
    place.app.control.revoke(result.id, terminate=True, destination=[place.project.node])


def send(place: Workplace) -> None:
    place.app.send_task("note")


def send_external(place: Workplace) -> None:
    place.app.send_task("do.it", [1])


SLOW = """
import time
@app.task(name="slow", track_started=True)
def slow():
    time.sleep(600)
"""

#: Faults after which the worker goes on, and the words in its log.
GOES_ON = [
    ("worker.runner", ".Runner", "accepted", send, "A callback failed; the pool goes on"),
    ("worker.runner", ".Runner", "_resolve", send, "can't be brought to its end"),
    ("worker.runner", ".Runner", "_resolve", send_external, "can't be brought to its end"),
    ("worker.pool", ".Pool", "restart_group", ask("subproc_restart"), ""),
    ("core.scheduler", ".Scheduler", "check_shrink", ask("pool_shrink"), ""),
    ("core.stats", "", "group_facts", ask("stats"), ""),
    ("core.stats", "", "rows", ask("subproc"), ""),
]


@with_a_hub
@pytest.mark.parametrize(("module", "owner", "name", "trigger", "words"), GOES_ON)
def test_a_fault_beside_the_engine_stops_nothing(
    tmp_path: Path,
    broker: str,
    module: str,
    owner: str,
    name: str,
    trigger: Callable[[Workplace], None],
    words: str,
) -> None:
    code = NOTE + SLOW + FAULT.format(module=module, owner=owner, name=name)
    with (
        closing(Workplace(tmp_path, broker, code=code)) as place,
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker,
    ):
        (tmp_path / "fault").touch()
        trigger(place)
        wait_for(lambda: "injected" in worker.log, "the fault")
        (tmp_path / "fault").unlink()
        assert get(place.app.send_task("note")) is None
        assert get(place.app.send_task("do.it", [1])) == [1]
        assert words in worker.log
        assert worker.stop() == 0


STOPS = [
    ("grow", ask("pool_grow")),
    ("shrink", ask("pool_shrink")),
    ("restart", ask("subproc_restart")),
    ("terminate", revoke),
]


@with_a_hub
@pytest.mark.parametrize(("name", "trigger"), STOPS)
def test_a_fault_of_the_engine_on_request_ends_the_worker(
    tmp_path: Path, broker: str, name: str, trigger: Callable[[Workplace], None]
) -> None:
    code = NOTE + SLOW + FAULT.format(module="core.scheduler", owner=".Scheduler", name=name)
    with (
        closing(Workplace(tmp_path, broker, code=code)) as place,
        place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "2") as worker,
    ):
        (tmp_path / "fault").touch()
        trigger(place)
        wait_for(lambda: worker.process.poll() is not None, "the end of the worker")
        assert worker.process.returncode == 1
        assert worker.log.count("The pool's engine failed") == 1


ENGINE_FAULTS = [
    ("core.scheduler", ".Scheduler", "submit"),
    ("core.scheduler", ".Scheduler", "dispatch"),
    ("core.scheduler", ".Scheduler", "tick"),
]


def assert_it_ends(place: Any, send: Callable[[], Any], tmp_path: Path) -> None:
    """The worker ends by itself, with one line that says why."""
    with place.worker("-P", "celery_subproc_pool:Pool", "-c", "1") as worker:
        (tmp_path / "fault").touch()
        for _ in range(3):
            send()
        wait_for(lambda: worker.process.poll() is not None, "the end of the worker")
        assert worker.process.returncode not in (0, None)
        lines = [line for line in worker.log.splitlines() if "The pool's engine failed" in line]
        [line] = lines
        assert "jobs were in flight" in line
        assert "RuntimeError('injected')" in line


@with_a_hub
@pytest.mark.parametrize(("module", "owner", "name"), ENGINE_FAULTS)
def test_a_fault_of_the_engine_ends_the_worker(
    tmp_path: Path, broker: str, module: str, owner: str, name: str
) -> None:
    place = faulty_worker(tmp_path, broker, module, owner, name)
    with closing(place):
        assert_it_ends(place.project, lambda: place.app.send_task("note", time_limit=60), tmp_path)


@pytest.mark.parametrize(("module", "owner", "name"), ENGINE_FAULTS)
def test_a_fault_of_the_engine_in_a_thread_ends_the_worker(
    tmp_path: Path, module: str, owner: str, name: str
) -> None:
    project = faulty_worker(tmp_path, None, module, owner, name)
    assert_it_ends(project, lambda: project.app.send_task("note", time_limit=60), tmp_path)


# -- the pool alone, its engine in a thread


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    app = Celery("isolated", broker="memory://", set_as_current=False)
    app.conf.subproc_pool = {"argv": python_child("obeys"), "size": 1}
    app.register_task(type("Note", (app.Task,), {"name": "do.it", "run": lambda self: None})())
    app.finalize()
    pool = Pool(limit=4, app=app, threads=True, putlocks=False)
    pool.start()
    yield pool
    pool.stop()


def test_another_threads_termination_is_not_for_the_job_that_is_being_accepted(
    pool: Pool,
) -> None:
    """While the engine tells Celery that a job is accepted, the consumer ends another job of the
    same child."""
    accepting, go_on = threading.Event(), threading.Event()
    pids: list[int] = []
    ends: list[Any] = []
    over = threading.Event()

    def accepted(pid: int, now: float) -> None:
        pids.append(pid)
        accepting.set()
        go_on.wait(DEADLINE)

    def ended(result: Any) -> None:
        ends.append(result)
        over.set()

    headers = {"task": "do.it", "id": "one", "args": (), "kwargs": {}}
    pool.apply_async(
        trace_task_ret,
        ("do.it", "one", headers, ((), {}, {}), None, None),
        accept_callback=accepted,
        callback=ended,
        error_callback=ended,
    )
    assert accepting.wait(DEADLINE)
    pool.terminate_job(pids[0], "SIGKILL")
    go_on.set()
    assert over.wait(DEADLINE)
    [end] = ends
    assert not isinstance(end, ExceptionInfo), end


def test_what_was_refused_can_be_terminated(pool: Pool) -> None:
    """The engine never had it."""
    ends: list[Any] = []
    over = threading.Event()

    def ended(result: Any) -> None:
        ends.append(result)
        over.set()

    job = pool.apply_async(lambda: 1, error_callback=ended)
    assert job is not None
    job.terminate("SIGKILL")
    assert over.wait(DEADLINE)
    job.terminate("SIGKILL")
    [end] = ends
    assert type(end.exception.exc).__name__ == "CallError"
    headers = {"task": "do.it", "id": "one", "args": (), "kwargs": {}}
    over.clear()
    pool.apply_async(
        trace_task_ret,
        ("do.it", "one", headers, ((), {}, {}), None, None),
        callback=ended,
        error_callback=ended,
    )
    assert over.wait(DEADLINE)


def test_growing_a_pool_that_has_ended(pool: Pool) -> None:
    """The autoscaler's thread may come late, and ends the process if this raises."""
    pool.stop()
    limit = pool.limit
    pool.grow(1)
    assert pool.limit == limit


def test_a_wrong_limit_is_said_before_the_pool_starts() -> None:
    app = Celery("isolated", broker="memory://", set_as_current=False)
    with pytest.raises(ConfigError, match="task_time_limit: expected a number of seconds"):
        Pool(limit=1, app=app, timeout="soon")
