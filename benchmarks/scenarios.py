"""What is measured: loads for workers of several setups. `comparisons` compares the numbers."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial

import msgspec

from .arena import ROOT, Load, Worker, workers
from .setups import PERL, PYTHON

__all__ = ("Measurement", "Plan", "run")


class Measurement(msgspec.Struct, frozen=True):
    """One number: what `setup` took or did in one round."""

    scenario: str
    setup: str
    metric: str
    round: int
    value: float


class Plan(msgspec.Struct, frozen=True):
    """How much to measure."""

    rounds: int
    #: The share of each load's tasks that is sent.
    share: float = 1.0
    #: Whether to measure what takes long.
    large: bool = True

    def count(self, tasks: int) -> int:
        """Return how many of `tasks` to send."""
        return max(20, int(tasks * self.share))


def run(plan: Plan, progress: Callable[[str], None], chosen: str = "") -> list[Measurement]:
    """Measure the scenarios whose names begin with `chosen`.

    Arguments:
        plan: how much to measure.
        progress: called with the name of each scenario before it runs.
        chosen: the beginning of the names.
    """
    found: list[Measurement] = []
    for scenario, measure in _scenarios(plan):
        if not scenario.startswith(chosen):
            continue
        progress(scenario)
        for number, setup, metric, value in measure():
            found.append(Measurement(scenario, setup, metric, number, value))
    return found


Values = Iterator[tuple[int, str, str, float]]


def _scenarios(plan: Plan) -> Iterator[tuple[str, Callable[[], Values]]]:
    sizes = (2, 8, 16) if plan.large else (2,)
    for broker in ("rabbitmq", "redis") if plan.large else ("rabbitmq",):
        for size in sizes if broker == "rabbitmq" else sizes[:2]:
            yield f"python, {broker}, -c {size}", partial(_python, plan, broker, size)
            yield from _external_scenarios(plan, broker, size)
    yield "one process per job, rabbitmq, -c 2", partial(_boots, plan)
    yield "latency", partial(_latency, plan)
    yield "scale", partial(_scale, plan)
    yield "many jobs in one child", partial(_many, plan)
    for broker in ("rabbitmq", "redis"):
        yield f"coroutines, {broker}", partial(_coroutines, plan, broker)
    yield "start", partial(_start, plan)
    yield "Django", partial(_django, plan)
    yield "limit", partial(_limit, plan)
    yield "the pool alone", partial(_alone, plan)


def _throughput(up: Mapping[str, Worker], plan: Plan, loads: dict[str, Load]) -> Values:
    """Give each load to each worker in turn, round by round. The first round only warms up."""
    for number in range(plan.rounds + 1):
        for metric, load in loads.items():
            for name, worker in up.items():
                sample = worker.serve(load)
                if not number:
                    continue
                yield number, name, f"{metric}: tasks/s", sample.tasks / sample.seconds
                yield number, name, f"{metric}: worker us", 1e6 * sample.cpu / sample.tasks
                all_cpu = sample.cpu + sample.children_cpu
                yield number, name, f"{metric}: all us", 1e6 * all_cpu / sample.tasks
                busiest = max(sample.cpu, sample.children_cpu)
                yield number, name, f"{metric}: share of one CPU", busiest / sample.seconds
        if number:
            for name, worker in up.items():
                yield number, name, "memory", worker.memory()


def _python(plan: Plan, broker: str, size: int) -> Values:
    names = (
        ("floor", "prefork", "python")
        if size > 2
        else ("floor", "prefork", "prefork, spawn", "threads", "python")
    )
    loads = {"no-op": Load("noop", plan.count(3000))}
    if size == 8 or not plan.large:
        loads["no-op, result"] = Load("noop.stored", plan.count(1500), ignore_result=False)
        loads["1 ms"] = Load("sleep", plan.count(1500), (0.001,))
        loads["20 ms"] = Load("sleep", plan.count(400), (0.02,))
        loads["1 MB"] = Load("noop", plan.count(60), ("x" * 1_000_000,))
    with workers(names, size, broker) as up:
        yield from _throughput(up, plan, loads)


def _external_scenarios(
    plan: Plan, broker: str, size: int
) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Yield the scenarios of external tasks.

    What is noticed of a task, its result or signals, decides how this pool runs it. Each case has
    workers of its own, because what it leaves behind takes memory.
    """
    scenario = f"external, {broker}, -c {size}"
    measure = partial(_external, plan, broker, size)
    plain, watched = ("external", "sidecar"), ("external, signals", "sidecar, signals")
    yield scenario, partial(measure, plain, {"no-op": Load("echo", plan.count(3000))})
    if broker != "rabbitmq" or (size != 8 and plan.large):
        return
    ignored = {"no-op": Load("echo", plan.count(1000))}
    stored = {"no-op, result": Load("echo.stored", plan.count(1000), ignore_result=False)}
    if plan.large:
        yield f"{scenario}, signals", partial(measure, watched, ignored)
        yield f"{scenario}, results", partial(measure, plain, stored)
    both = partial(measure, watched, stored, latency_of="echo.stored")
    yield f"{scenario}, signals and results", both


def _external(
    plan: Plan,
    broker: str,
    size: int,
    names: tuple[str, ...],
    loads: dict[str, Load],
    latency_of: str | None = None,
) -> Values:
    with workers(names, size, broker) as up:
        yield from _throughput(up, plan, loads)
        if latency_of:
            yield from _latencies(up, plan, latency_of)


def _boots(plan: Plan) -> Values:
    names = ("external", "run", "external python", "run python")
    with workers(names, 2, "rabbitmq") as up:
        many, few = Load("echo", plan.count(2000)), Load("echo", plan.count(100))
        for number in range(plan.rounds + 1):
            for name, worker in up.items():
                sample = worker.serve(few if name.startswith("run") else many)
                if number:
                    yield number, name, "no-op: tasks/s", sample.tasks / sample.seconds


def _latency(plan: Plan) -> Values:
    with workers(("prefork", "python"), 2, "rabbitmq") as up:
        yield from _latencies(up, plan, "noop.stored")


def _latencies(up: Mapping[str, Worker], plan: Plan, task: str) -> Values:
    """Measure the time from sending to the result, at 50 jobs a second. First warm up."""
    for number in range(plan.rounds + 1):
        for name, worker in up.items():
            seconds = worker.latencies(task, plan.count(250 if number else 20), 50)
            if number:
                cuts = statistics.quantiles(seconds, n=100)
                yield number, name, "p50", cuts[49]
                yield number, name, "p99", cuts[98]


def _scale(plan: Plan) -> Values:
    """Measure what a job and a child cost in the worker, with few and with many children."""
    load = Load("echo", plan.count(4000))
    sizes = (8, 64, 256) if plan.large else (2, 8)
    own: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:
        with workers(("external",), size, "rabbitmq") as up:
            worker = up["external"]
            # Before the first job: jobs in flight take memory too.
            idle = worker.own_memory()
            for number in range(plan.rounds + 1):
                sample = worker.serve(load)
                if number:
                    own[size].append(idle)
                    yield number, f"-c {size}", "worker us", 1e6 * sample.cpu / sample.tasks
    first, last = sizes[0], sizes[-1]
    for number, (few, many) in enumerate(zip(own[first], own[last], strict=True), 1):
        yield number, "a child", "bytes in the worker", (many - few) / (last - first)


def _many(plan: Plan) -> Values:
    """Run 200 jobs of 0.1 s at a time: in one child, and in 200 children."""
    names = ("multiplexed", "one each")
    load = Load("sleep", plan.count(2000), (0.1,))
    with workers(names, 200 if plan.large else 20, "rabbitmq") as up:
        yield from _throughput(up, plan, {"100 ms": load})


def _coroutines(plan: Plan, broker: str) -> Values:
    """Run 1000 tasks of 0.1 s at a time: coroutines in one child, greenlets, and 200 threads.

    On RabbitMQ, a worker with gevent stops after some hundreds of tasks (Celery 5.7, gevent 26).
    """
    names: tuple[str, ...] = ("asyncio", "threads, 200")
    if broker == "redis":
        names = (*names, "gevent")
    stored = Load("nap.stored", plan.count(10_000), (0.1,), ignore_result=False)
    loads = {"100 ms, result": stored, "100 ms": Load("nap", plan.count(10_000), (0.1,))}
    with workers(names, 1000 if plan.large else 100, broker) as up:
        yield from _throughput(up, plan, loads)


def _start(plan: Plan) -> Values:
    names = ("prefork", "prefork, spawn", "python", "external")
    for number in range(1, plan.rounds + 1):
        for name in names:
            with workers((name,), 8 if plan.large else 2, "rabbitmq") as up:
                yield number, name, "seconds to ready", up[name].start_time
    # Not with spawn: it has a process that looks like a child.
    with workers(("prefork", "python", "external"), 1, "rabbitmq") as up:
        for number in range(1, plan.rounds + 1):
            for name, worker in up.items():
                task = "echo.stored" if name == "external" else "noop.stored"
                yield number, name, "seconds to a job after a kill", worker.recovery(task)


def _django(plan: Plan) -> Values:
    """Measure what a project of middle size costs in memory and at its start."""
    names = ("prefork, Django", "python, Django", "python, Django, spawned")
    size = 8 if plan.large else 2
    for number in range(1, plan.rounds + 1):
        for name in names:
            with workers((name,), size, "rabbitmq") as up:
                worker = up[name]
                yield number, name, "seconds to ready", worker.start_time
                for count in (400, 20_000) if number == 1 and plan.large else (400,):
                    worker.serve(Load("noop.stored", plan.count(count), ignore_result=False))
                    yield number, name, f"memory after {count} tasks", worker.memory()
    with workers(("prefork, fresh", "python, fresh"), 2, "rabbitmq") as up:
        for number in range(1, plan.rounds + 1):
            for name, worker in up.items():
                sample = worker.serve(Load("noop", plan.count(20 if "prefork" in name else 200)))
                yield number, name, "fresh processes: tasks/s", sample.tasks / sample.seconds


def _limit(plan: Plan) -> Values:
    """Send a line to a program and back over bare pipes. No pool can be faster."""
    for number in range(1, plan.rounds + 1):
        for name, command in (("perl", PERL), ("python", PYTHON)):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with process:
                stdin, stdout = process.stdin, process.stdout
                assert stdin is not None
                assert stdout is not None
                began = time.perf_counter()
                count = plan.count(5000)
                for _ in range(count):
                    stdin.write(b'{"id":"x","payload":{}}\n')
                    stdin.flush()
                    stdout.readline()
                taken = time.perf_counter() - began
                with suppress(BrokenPipeError):
                    stdin.close()
            yield number, name, "us a round trip", 1e6 * taken / count


def _alone(plan: Plan) -> Values:
    """Measure the pool itself with no-ops, in a process that does nothing else."""
    count = str(plan.count(4000))
    for number in range(1, plan.rounds + 1):
        for size in ("2", "8"):
            for name in ("python", "external"):
                command = [sys.executable, "-m", "benchmarks.alone", name, size, count]
                made = subprocess.run(
                    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
                )
                yield number, name, f"no-op, {size} children: us", float(made.stdout)
