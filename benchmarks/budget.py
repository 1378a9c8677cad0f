"""What a no-op for a Python task takes, one worker at a time, so that none disturbs another.

Use: ``python -m benchmarks.budget CONCURRENCY COUNT ROUNDS``, which prints for each setup the
medians, in microseconds for a task: CPU of the worker, CPU of its children, and the clock. Needs
RabbitMQ and Redis. Unlike ratios within a round, these are as good as the machine is quiet.
"""

from __future__ import annotations

import statistics
import sys

from .arena import Load, Sample, Worker

__all__ = ("COMPARED", "main")

#: Names in `setups`.
COMPARED = ("floor", "python", "prefork")

#: Tasks before those that count.
WARM_UP = 500


def _measure(name: str, concurrency: int, count: int) -> Sample:
    with Worker(name, concurrency, "rabbitmq") as worker:
        worker.serve(Load("noop", WARM_UP))
        return worker.serve(Load("noop", count))


def main(concurrency: int, count: int, rounds: int) -> None:
    """Measure each setup `rounds` times, in turn, with `count` tasks at ``-c`` `concurrency`."""
    samples: dict[str, list[Sample]] = {name: [] for name in COMPARED}
    for _ in range(rounds):
        for name, found in samples.items():
            found.append(_measure(name, concurrency, count))
    print("setup, worker, children, clock: microseconds for a task")
    for name, found in samples.items():
        worker, children, clock = (
            statistics.median(getattr(each, field) / count * 1e6 for each in found)
            for field in ("cpu", "children_cpu", "seconds")
        )
        print(f"{name:8} {worker:5.0f} {children:5.0f} {clock:5.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
