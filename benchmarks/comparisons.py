"""Which numbers are compared, and which ratios the project wants to reach."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

__all__ = ("COMPARISONS", "Comparison")


class Comparison(msgspec.Struct, frozen=True):
    """A ratio: `metric` of `setup` to that of the setup `to`, in the same round.

    `at_least` or `at_most` is what the project wants to reach.
    """

    title: str
    scenario: str
    metric: str
    setup: str
    to: str
    at_least: float | None = None
    at_most: float | None = None


def _comparisons() -> Iterator[Comparison]:
    for broker, sizes in (("rabbitmq", (2, 8, 16)), ("redis", (2, 8))):
        for size in sizes:
            yield from _python(broker, size)
            yield from _external_no_op(broker, size)
    yield from _external_noticed()
    yield from _other_pools()
    yield from _other_loads()
    yield from _boots()
    yield from _latency()
    yield from _many_children()
    yield from _coroutines()
    yield from _start()
    yield from _django()


def _python(broker: str, size: int) -> Iterator[Comparison]:
    scenario = f"python, {broker}, -c {size}"
    title = f"Python children / prefork, no-op, {broker}, -c {size}: tasks/s"
    wanted = broker == "rabbitmq" and size < 16
    speed = 1.3 if wanted else None
    yield Comparison(title, scenario, "no-op: tasks/s", "python", "prefork", at_least=speed)
    title, share = "the same: CPU in the worker", 0.75 if wanted else None
    yield Comparison(title, scenario, "no-op: worker us", "python", "prefork", at_most=share)
    title = "the same: CPU of all processes"
    yield Comparison(title, scenario, "no-op: all us", "python", "prefork")


def _external_no_op(broker: str, size: int) -> Iterator[Comparison]:
    title, scenario = f"no-op, {broker}, -c {size}", f"external, {broker}, -c {size}"
    speed, memory = 1.3 if size == 2 else 1.5, None
    if broker == "rabbitmq" and size == 8:
        speed, memory = 1.65, 0.3
    yield from _external(title, scenario, "no-op", speed=speed, memory=memory)


def _external_noticed() -> Iterator[Comparison]:
    for noticed, load, suffix in (
        ("signals and results", "no-op, result", ", signals"),
        ("signals", "no-op", ", signals"),
        ("results", "no-op, result", ""),
    ):
        title, scenario = f"{noticed}, rabbitmq, -c 8", f"external, rabbitmq, -c 8, {noticed}"
        yield from _external(title, scenario, load, suffix, speed=1.3, worker=1.2, memory=0.5)
    title, scenario = "latency at 50 jobs/s", "external, rabbitmq, -c 8, signals and results"
    title = f"{title}, external / sidecar, signals and results: p50"
    names = ("external, signals", "sidecar, signals")
    yield Comparison(title, scenario, "p50", *names, at_most=1.2)
    yield Comparison("the same: p99", scenario, "p99", *names)


def _external(
    title: str,
    scenario: str,
    load: str,
    suffix: str = "",
    *,
    speed: float,
    worker: float | None = None,
    memory: float | None = None,
) -> Iterator[Comparison]:
    """Compare external tasks with a side process.

    Arguments:
        title: what is said of the tasks.
        scenario: the scenario.
        load: the load.
        suffix: the end of the setups' names.
        speed: what the ratio of tasks a second is to be, at least.
        worker: what the ratio of the worker's own CPU is to be, at most.
        memory: the same for the memory of all processes.
    """
    names = (f"external{suffix}", f"sidecar{suffix}")
    title = f"external / sidecar, {title}: tasks/s"
    yield Comparison(title, scenario, f"{load}: tasks/s", *names, at_least=speed)
    title = "the same: CPU in the worker"
    yield Comparison(title, scenario, f"{load}: worker us", *names, at_most=worker)
    yield Comparison("the same: CPU of all processes", scenario, f"{load}: all us", *names)
    yield Comparison("the same: memory", scenario, "memory", *names, at_most=memory)


def _other_pools() -> Iterator[Comparison]:
    for other in ("prefork, spawn", "threads"):
        title = f"Python children / {other}, no-op, rabbitmq, -c 2: tasks/s"
        yield Comparison(title, "python, rabbitmq, -c 2", "no-op: tasks/s", "python", other)


def _other_loads() -> Iterator[Comparison]:
    for load in ("no-op, result", "1 ms", "20 ms", "1 MB"):
        title = f"Python children / prefork, {load}, rabbitmq, -c 8: tasks/s"
        metric = f"{load}: tasks/s"
        yield Comparison(title, "python, rabbitmq, -c 8", metric, "python", "prefork")


def _boots() -> Iterator[Comparison]:
    scenario, metric = "one process per job, rabbitmq, -c 2", "no-op: tasks/s"
    title = "external (perl) / subprocess.run of it: tasks/s"
    yield Comparison(title, scenario, metric, "external", "run", at_least=4)
    title = "external (Python) / subprocess.run of it: tasks/s"
    yield Comparison(title, scenario, metric, "external python", "run python", at_least=20)


def _latency() -> Iterator[Comparison]:
    title = "latency at 50 jobs/s, Python children / prefork: p50"
    yield Comparison(title, "latency", "p50", "python", "prefork", at_most=1.0)
    yield Comparison("the same: p99", "latency", "p99", "python", "prefork")


def _many_children() -> Iterator[Comparison]:
    title = "CPU in the worker for a task, -c 256 / -c 8"
    yield Comparison(title, "scale", "worker us", "-c 256", "-c 8", at_most=1.25)
    scenario = "many jobs in one child"
    for metric in ("100 ms: tasks/s", "100 ms: all us", "memory"):
        what = metric.rpartition(": ")[2]
        title = f"200 jobs at a time, one child / 200 children: {what}"
        yield Comparison(title, scenario, metric, "multiplexed", "one each")


def _coroutines() -> Iterator[Comparison]:
    for broker, other in (
        ("rabbitmq", "threads, 200"),
        ("redis", "threads, 200"),
        ("redis", "gevent"),
    ):
        scenario = f"coroutines, {broker}"
        for load in ("100 ms, result", "100 ms"):
            title = f"1000 coroutines / {other}, {load}, {broker}: tasks/s"
            names = ("asyncio", other)
            yield Comparison(title, scenario, f"{load}: tasks/s", *names, at_least=1.0)
            title = "the same: CPU of all processes"
            yield Comparison(title, scenario, f"{load}: all us", *names)
        yield Comparison("the same: memory", scenario, "memory", *names)


def _start() -> Iterator[Comparison]:
    for metric in ("seconds to ready", "seconds to a job after a kill"):
        title = f"Python children / prefork: {metric}"
        yield Comparison(title, "start", metric, "python", "prefork")


def _django() -> Iterator[Comparison]:
    names = ("python, Django", "prefork, Django")
    for metric, most in (
        ("memory after 400 tasks", 0.55),
        ("memory after 20000 tasks", 0.55),
        ("seconds to ready", 1.0),
    ):
        title = f"a Django app, -c 8, Python children / prefork: {metric}"
        yield Comparison(title, "Django", metric, *names, at_most=most)
        title = "the same, children spawned"
        yield Comparison(title, "Django", metric, "python, Django, spawned", names[1])
    title = "the same app, --max-tasks-per-child 1, -c 2: tasks/s"
    metric = "fresh processes: tasks/s"
    yield Comparison(title, "Django", metric, "python, fresh", "prefork, fresh", at_least=20)


COMPARISONS = tuple(_comparisons())
