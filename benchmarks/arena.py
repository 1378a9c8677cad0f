"""Real workers that are all up at once and get loads in turn.

Workers without a load sleep. They cost the others only memory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil
from celery import Celery
from kombu import Connection, Queue

from .gauge import Watch
from .setups import BROKERS, RESULTS, SETUPS, VARIABLE, Setup

__all__ = ("ROOT", "Load", "Sample", "Worker", "workers")

#: The folder that has this package.
ROOT = Path(__file__).parents[1]

#: Seconds that a worker may take to start, to stop, or to do a load.
PATIENCE = 120.0


class Load(msgspec.Struct, frozen=True):
    """Tasks that are all sent before the worker consumes the first."""

    task: str
    count: int
    args: tuple[Any, ...] = ()
    ignore_result: bool = True


class Sample(msgspec.Struct, frozen=True):
    """What one worker took for one load, in seconds."""

    tasks: int
    seconds: float
    #: CPU of the worker process.
    cpu: float
    #: CPU of all processes below it.
    children_cpu: float


class Worker:
    """A `celery worker` of one setup. It is up from entry to exit.

    Arguments:
        name: the name of the setup.
        concurrency: the value of ``-c``.
        broker: a name in `BROKERS`.
    """

    def __init__(self, name: str, concurrency: int, broker: str) -> None:
        self.name = name
        self._setup: Setup = SETUPS[name]
        self._concurrency = self._setup.concurrency or concurrency
        self._broker = BROKERS[broker]
        self._id = f"bench-{uuid.uuid4().hex[:12]}"
        self._node = f"{self._id}@localhost"
        self._queue = self._id
        #: The number of tasks sent so far.
        self._sent = 0
        self.app = Celery(broker=self._broker, backend=RESULTS, set_as_current=False)
        self.app.conf.task_default_queue = self._queue
        self.app.conf.broker_connection_retry_on_startup = True

    def __enter__(self) -> Worker:
        self._folder = tempfile.TemporaryDirectory(prefix="csp-bench-")
        self._gauge = os.path.join(self._folder.name, "gauge")
        self._log = Path(self._folder.name, "log")
        began = time.perf_counter()
        self._process = self._start()
        try:
            self._await_gauge()
            #: Seconds until it was ready.
            self.start_time = time.perf_counter() - began
            self._control("cancel_consumer", queue=self._queue)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            with Connection(self._broker) as connection:
                Queue(self._queue, channel=connection.default_channel).delete()
            self.app.close()
            self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        setup = self._setup
        conf = {
            "broker_url": self._broker,
            "result_backend": RESULTS,
            "task_default_queue": self._queue,
            "broker_connection_retry_on_startup": True,
            **setup.conf,
        }
        settings = {
            "conf": conf,
            "gauge": self._gauge,
            "echo": setup.echo,
            "program": setup.program,
            "signals": setup.signals,
            "coroutines": setup.coroutines,
            "django": setup.django,
        }
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.app", "worker"]
        command += ["-P", setup.pool, "-c", str(self._concurrency), "-l", "WARNING"]
        command += ["-n", self._node, "--without-mingle", "--without-gossip"]
        environ = {name: value for name, value in os.environ.items() if "CELERY" not in name}
        environ |= {VARIABLE: json.dumps(settings), "C_FORCE_ROOT": "1", **setup.environ}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _await_gauge(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(self._gauge)
                return
            time.sleep(0.01)
        raise RuntimeError(f"the worker of {self.name} did not start:\n{self._log.read_text()}")

    def _control(self, command: str, **arguments: Any) -> None:
        """Send a remote control command until the worker replies. It may be done twice.

        A worker on Redis says that it is ready a moment before it listens.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            replies = self.app.control.broadcast(
                command,
                arguments=arguments,
                destination=[self._node],
                reply=True,
                limit=1,
                timeout=2.0,
            )
            if replies:
                return
        raise RuntimeError(f"the worker of {self.name} did not answer:\n{self._log.read_text()}")

    def serve(self, load: Load) -> Sample:
        """Send `load`, then let the worker consume it.

        The worker must not consume before: a broker may deliver a task to a consumer that is being
        cancelled.
        """
        with self.app.producer_or_acquire() as producer:
            for _ in range(load.count):
                self.app.send_task(
                    load.task, load.args, producer=producer, ignore_result=load.ignore_result
                )
        self._sent += load.count
        before = self._children_cpu()
        watch = Watch(self._gauge, self._sent, PATIENCE)
        with self._consuming():
            reading = watch.read()
        spent = self._children_cpu() - before
        if "Traceback" in (log := self._log.read_text()):
            raise RuntimeError(f"tasks of {self.name} failed:\n{log[-5000:]}")
        return Sample(load.count, reading.seconds, reading.cpu, spent)

    @contextmanager
    def _consuming(self) -> Iterator[None]:
        self._control("add_consumer", queue=self._queue)
        yield
        self._control("cancel_consumer", queue=self._queue)

    def latencies(self, task: str, count: int, rate: float) -> list[float]:
        """Send `count` tasks, `rate` in a second; return the seconds from sending to result."""
        found = []
        with self._consuming():
            due = time.perf_counter()
            for _ in range(count):
                time.sleep(max(0.0, due - time.perf_counter()))
                due += 1 / rate
                began = time.perf_counter()
                self.app.send_task(task).get(timeout=PATIENCE)
                self._sent += 1
                found.append(time.perf_counter() - began)
        return found

    def recovery(self, task: str) -> float:
        """Kill the only child, and return the seconds until its successor has done a job.

        The job is sent as soon as the successor exists.
        """
        with self._consuming():
            [child] = self.children()
            began = time.perf_counter()
            child.kill()
            while not [each for each in self.children() if each.pid != child.pid]:
                time.sleep(0.002)
            self.app.send_task(task).get(timeout=PATIENCE)
            self._sent += 1
        return time.perf_counter() - began

    # -- what the system knows about it

    def children(self) -> list[psutil.Process]:
        """Return the processes that do the jobs, without our guardian, tracers and templates."""
        found = []
        for each in psutil.Process(self._process.pid).children():
            if _is_template(each):
                found += each.children()
            elif not _is_helper(each):
                found.append(each)
        return [each for each in found if each.is_running()]

    def _children_cpu(self) -> float:
        """Return the CPU seconds of all processes below the worker, with those that have ended."""
        worker = psutil.Process(self._process.pid)
        ended = worker.cpu_times()
        total: float = ended.children_user + ended.children_system
        for process in worker.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory(self) -> float:
        """Return the proportional set size of the worker and all processes below it, in bytes."""
        worker = psutil.Process(self._process.pid)
        return float(sum(_pss(each) for each in (worker, *worker.children(recursive=True))))

    def own_memory(self) -> float:
        """Return the unique set size of the worker and its guardian, in bytes."""
        worker = psutil.Process(self._process.pid)
        guardians = [each for each in worker.children() if _is_guardian(each)]
        return float(sum(each.memory_full_info().uss for each in (worker, *guardians)))


def _is_helper(process: psutil.Process) -> bool:
    """Return whether it is our guardian or a tracer."""
    return _runs(process, "guardian.py") or _runs(process, "celery_subproc_pool.tracer.main")


def _is_template(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "CELERY_SUBPROC_POOL_TEMPLATE" in process.environ()
    return False


def _is_guardian(process: psutil.Process) -> bool:
    return _runs(process, "guardian.py")


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        return any(word.endswith(program) for word in process.cmdline())
    except psutil.Error:
        # It has just ended.
        return False


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def workers(
    names: tuple[str, ...], concurrency: int, broker: str
) -> Iterator[Mapping[str, Worker]]:
    """Keep one worker of each setup in `names` up."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Worker(name, concurrency, broker)) for name in names}
