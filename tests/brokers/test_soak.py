"""Minutes of jobs while everything goes wrong: each job ends exactly once, and nothing leaks.

`CSP_SOAK_SECONDS` says for how long (300), in all; the brokers share it. At the end it prints what
it saw.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import time
import uuid
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.states import READY_STATES
from kombu import Connection, Queue

from tests.support.basics import PORTS, python_child, require, wait_for
from tests.support.cutting_proxy import CuttingProxy
from tests.support.worker import Project, Worker
from tests.support.workplace import BACKEND, BROKERS

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("CSP_SOAK_SECONDS", "300")) / len(BROKERS)

#: Jobs that are sent and not at their end.
OUTSTANDING = 64

TRACERS = 2

#: What external jobs do; most do nothing special.
KINDS = ["good"] * 20 + ["slow"] * 8 + ["big", "stderr", "throttled", "error", "retires"] * 2
KINDS += ["hangs", "exits", "rubbish", "twice"]
#: What coroutines do. The last three cost the child, once.
AIO_KINDS = ["good"] * 60 + ["blocks", "swallows", "exits"]

#: What may come of a job: its state, with the exception's name if it has one. A job whose child is
#: killed is delivered again, but not for ever. A second reply spoils the next job at worst.
ENDS = {
    "SUCCESS",
    "FAILURE TimeLimitExceeded",
    "FAILURE ProtocolFault",
    "FAILURE PoisonousTaskError",
}
#: Only of those that ask for it.
ENDS_OF = {"error": {"FAILURE ChildTaskError"}}

CODE = """
import asyncio, os, time
def note(task_id):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{task_id} {os.getpid()} {time.monotonic()}\\n")
@app.task(name="python.it")
def it(kind, word):
    note(it.request.id)
    return word
def first_time(word):
    try:
        os.mkdir(os.path.join(os.environ["SEEN"], word))
    except FileExistsError:
        return False
    return True
@app.task(name="aio.it", bind=True)
async def aio_it(self, kind, word):
    note(self.request.id)
    if kind != "good" and first_time(word):
        if kind == "blocks":
            time.sleep(10)
        elif kind == "exits":
            os._exit(1)
        while True:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                continue
    await asyncio.sleep(len(word) % 10 / 100)
    assert self.request.id == word
    return word
"""


class Job:
    """What was sent."""

    def __init__(self, kind: str, task: str) -> None:
        self.id = uuid.uuid4().hex
        self.kind = kind
        self.task = task
        self.sent = time.monotonic()
        #: As the result backend has it.
        self.meta: dict[str, Any] | None = None

    @property
    def end(self) -> str:
        """Its state, and the name of its exception."""
        assert self.meta is not None
        kind = self.meta["result"]["exc_type"] if self.meta["status"] == "FAILURE" else ""
        return f"{self.meta['status']} {kind}".strip()

    @property
    def good_result(self) -> Any:
        return [self.id, "x" * 1_000_000] if self.kind == "big" else self.id

    @property
    def external(self) -> bool:
        return self.task == "soak.it"


class Soak:
    """Sends jobs to a worker, and makes trouble.

    Arguments:
        directory: the project's.
        broker: the broker's name.
        proxy: the worker's way to it.
        seed: of all that is random.
    """

    def __init__(self, directory: Path, broker: str, proxy: CuttingProxy, seed: int) -> None:
        self.random = random.Random(seed)
        self.broker = broker
        self.proxy = proxy
        self.log = directory / "begun.log"
        self.log.touch()
        (directory / "seen").mkdir()
        env = {"LOG": str(self.log), "SEEN": str(directory / "seen")}
        child = {"argv": python_child("soaked"), "tasks": ["soak.it"], "env": env}
        # A child that is stopped before it has read its job keeps the job for so long.
        limits = {"start_timeout": 8.0, "stop_timeout": 2.0}
        self.queue = f"csp-soak-{uuid.uuid4().hex}"
        conf = {
            "subproc_pool": {
                "children": {"soaked": {**child, "size": 8, **limits}},
                "asyncio": {"cancel_grace": 1.0, "slow_callback": 0.5, "env": env, **limits},
                "python": {"size": 4, "env": env, **limits},
                "tracers": {"size": TRACERS, "cancel_grace": 1.0, **limits},
            },
            "task_default_queue": self.queue,
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
            "task_time_limit": 2.0,
            # There are many results, and some are big.
            "result_expires": SECONDS + 300,
            "worker_prefetch_multiplier": 1,
            "broker_connection_max_retries": None,
            "broker_connection_retry_on_startup": True,
        }
        if broker == "redis":
            # What was with a connection that is cut comes again after this time, which kombu looks
            # at every ten seconds.
            conf["broker_transport_options"] = {"visibility_timeout": 8}
        # Our own way to the broker is never cut.
        cut = proxy.url(BROKERS[broker])
        self.project = Project(directory, BROKERS[broker], BACKEND, conf, CODE, workers_broker=cut)
        self.jobs: list[Job] = []
        self.open: dict[str, Job] = {}
        self.cuts: list[float] = []
        #: When tracers were killed or stopped.
        self.hurt: list[float] = []
        self.trouble: Counter[str] = Counter()
        self.resident: list[int] = []

    # -- jobs

    def send(self) -> None:
        """Send one job."""
        share = self.random.random()
        if share < 0.2:
            job = Job("good", "python.it")
        elif share < 0.4:
            job = Job(self.random.choice(AIO_KINDS), "aio.it")
        else:
            job = Job(self.random.choice(KINDS), "soak.it")
        self.jobs.append(job)
        self.open[job.id] = job
        self.project.app.send_task(
            job.task, (job.kind, job.id), task_id=job.id, producer=self.producer, retry=True
        )

    def look(self) -> None:
        """See which jobs have come to an end."""
        backend = self.project.app.backend
        ids = list(self.open)
        found = backend.client.mget([backend.get_key_for_task(each) for each in ids])
        for task_id, value in zip(ids, found, strict=True):
            meta = json.loads(value) if value else {"status": "PENDING"}
            if meta["status"] in READY_STATES:
                self.open.pop(task_id).meta = meta

    def run(self, worker: Worker, seconds: float) -> None:
        """Send jobs and make trouble for so long, then let all come to their ends."""
        process = psutil.Process(worker.process.pid)
        end = time.monotonic() + seconds
        next_trouble = next_cut = time.monotonic() + 1.0
        with self.project.app.producer_pool.acquire() as self.producer:
            while time.monotonic() < end:
                while len(self.open) < OUTSTANDING:
                    self.send()
                self.look()
                self.resident.append(process.memory_info().rss)
                if time.monotonic() >= next_trouble:
                    next_trouble = time.monotonic() + self.random.uniform(0.05, 0.3)
                    self.make_trouble(worker)
                if time.monotonic() >= next_cut:
                    next_cut = time.monotonic() + self.random.uniform(3.0, 6.0)
                    self.cut()
                time.sleep(0.02)
        wait_for(self.all_ended, "the ends of all jobs", deadline=90.0)

    def all_ended(self) -> bool:
        if self.open:
            self.look()
        return not self.open

    # -- trouble

    def make_trouble(self, worker: Worker) -> None:
        """Kill a child, or stop one. Less often a tracer: all that goes through it comes again."""
        share = self.random.random()
        traces = share < 0.04
        if traces:
            chosen = worker.tracers()
        elif share < 0.07:
            # Its children go on.
            self.trouble["a template"] += 1
            chosen = worker.templates()
        else:
            chosen = worker.children()
        child = self.random.choice(chosen or [None])
        if child is None:
            return
        signum = self.random.choice([signal.SIGKILL] * 4 + [signal.SIGSEGV, signal.SIGSTOP])
        self.trouble[f"{signum.name} for a tracer" if traces else signum.name] += 1
        if traces:
            self.hurt.append(time.monotonic())
        try:
            # Until it executes its program, it is a copy of the worker, which waits for that: who
            # stops it then stops the worker.
            if child.cmdline() != psutil.Process(worker.process.pid).cmdline():
                child.send_signal(signum)
        except psutil.NoSuchProcess:
            self.trouble["too late"] += 1

    def cut(self) -> None:
        """Cut the worker's connections to the broker.

        What Redis has taken from a list for a client that is gone is lost, whoever the client
        (kombu's transport can't help it): there, only while no message waits.
        """
        if self.broker == "redis":
            with Connection(BROKERS["redis"]) as connection:
                channel = connection.default_channel
                for _ in range(200):
                    if not channel.client.llen(self.queue):
                        break
                    time.sleep(0.01)
                else:
                    return
            # What was taken is on its way.
            time.sleep(0.1)
        self.cuts.append(time.monotonic())
        self.proxy.cut()

    def serving(self) -> int:
        """Return how many children and tracers serve."""
        replies = self.project.app.control.broadcast(
            "subproc", reply=True, destination=[self.project.node], timeout=10, limit=1
        )
        rows = [row for reply in replies for row in next(iter(reply.values()))]
        return sum(row["state"] in ("idle", "busy") for row in rows)

    # -- what must hold

    def check_ends(self) -> Counter[str]:
        """Each job has one end, which is its own; return how many have which."""
        table: Counter[str] = Counter()
        for job in self.jobs:
            assert job.end in ENDS | ENDS_OF.get(job.kind, set()), (job.kind, job.meta)
            if job.end == "SUCCESS":
                assert job.meta is not None
                assert job.meta["result"] == job.good_result, "it has its own result"
            table[job.end] += 1
        return table

    def check_runs(self, log: str) -> Counter[str]:
        """No job was run again but for a reason."""
        # The log says which child went, and with which job.
        died = set(re.findall(r"\(pid (\d+)\) is replaced: .*; its job was \S+\[(\w+)\]", log))
        runs: dict[str, list[tuple[int, float]]] = {job.id: [] for job in self.jobs}
        for line in self.log.read_text().splitlines():
            task_id, pid, begun = line.split()
            runs[task_id].append((int(pid), float(begun)))
        again: Counter[str] = Counter()
        for job in self.jobs:
            begun = runs[job.id]
            pids = {at: pid for pid, at in begun}
            for (pid, first), (_, second) in pairwise(begun):
                # There is one asyncio child at a time, and it is not recycled.
                gone = pid != pids[second] if job.task == "aio.it" else (str(pid), job.id) in died
                again[self.reason(job, gone, first, second)] += 1
        assert not again["none"], "jobs were run again without a reason"
        return again

    def reason(self, job: Job, died: bool, first: float, second: float) -> str:
        """Why a job that was begun at `first`, by a child that `died` of it or not, was begun again
        at `second`."""
        if job.kind == "throttled":
            return "throttled"
        if died:
            return "its child died"
        if job.external and any(first <= hurt <= second for hurt in self.hurt):
            return "its tracer died"
        # A result that is stored while the connection is gone can't be acknowledged. And what waits
        # for a child, or in the pipe of a stopped one, when the connection is cut is delivered
        # again while it still waits.
        if any(job.sent <= cut <= second for cut in self.cuts):
            return "the connection was cut"
        return "none"

    def check_memory(self) -> tuple[float, float]:
        """The worker does not grow; return the medians of its middle and of its end, in MiB."""
        third = len(self.resident) // 3
        middle = statistics.median(self.resident[third : 2 * third]) / 2**20
        last = statistics.median(self.resident[2 * third :]) / 2**20
        assert last < middle * 1.15 + 10, "the worker's memory grows"
        return middle, last


@pytest.fixture(params=list(BROKERS))
def broker(request: pytest.FixtureRequest) -> str:
    require(request.param)
    require("redis")
    return str(request.param)


@pytest.mark.timeout(SECONDS + 300)
def test_soak(broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.randrange(10**6)
    print(f"the seed is {seed}")
    with closing(CuttingProxy(PORTS[broker])) as proxy:
        soak = Soak(tmp_path, broker, proxy, seed)
        with soak.project.worker("-P", "celery_subproc_pool:Pool", "-c", "8") as worker:
            process = psutil.Process(worker.process.pid)
            soak.run(worker, SECONDS / 10)
            before = process.num_fds()
            soak.resident.clear()
            soak.run(worker, SECONDS)
            wait_for(lambda: soak.serving() == 8 + 4 + 1 + TRACERS, "all children and tracers")
            after = process.num_fds()
            assert worker.stop() == 0
        with Connection(BROKERS[broker]) as connection:
            Queue(soak.queue, channel=connection.default_channel).delete()
    ends = soak.check_ends()
    again = soak.check_runs(worker.log)
    memory = soak.check_memory()
    assert after < before + 20, "the worker's descriptors leak"
    for sign in ("Serving the child", "A callback of Celery's failed", "engine failed"):
        assert sign not in worker.log
    with capsys.disabled():
        print(f"\n{broker}: {len(soak.jobs)} jobs in {SECONDS:.0f} s, seed {seed}")
        print(f"  ends: {dict(ends)}")
        print(f"  run again: {dict(again)}")
        print(f"  trouble: {dict(soak.trouble)}, {len(soak.cuts)} connections cut")
        print(f"  replaced: {worker.log.count(' is replaced')}, recycled:", end=" ")
        print(worker.log.count(" is recycled"))
        print(f"  memory: {memory[0]:.1f} MiB, then {memory[1]:.1f} MiB", end="; ")
        print(f"descriptors: {before}, then {after}")
