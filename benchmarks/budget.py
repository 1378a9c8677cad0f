"""Measures a no-op in a Python task, one worker at a time, so that none disturbs another.

Use: ``python -m benchmarks.budget CONCURRENCY COUNT ROUNDS``. For each setup it prints the medians
in microseconds for a task: CPU of the worker, CPU of its children, and wall-clock time. It needs
RabbitMQ and Redis. Unlike ratios within a round, these numbers need a quiet machine.
"""

from __future__ import annotations

import statistics
import sys

from .arena import Load, Sample, Worker

__all__ = ("COMPARED", "main")

#: Names in `setups`.
COMPARED = ("floor", "python", "prefork")

#: Tasks before the measured ones.
WARM_UP = 500


def _measure(name: str, concurrency: int, count: int) -> Sample:
    with Worker(name, concurrency, "rabbitmq") as worker:
        worker.serve(Load("noop", WARM_UP))
        return worker.serve(Load("noop", count))


def main(concurrency: int, count: int, rounds: int) -> None:
    """Measure each setup in turn, `rounds` times, with `count` tasks at ``-c`` `concurrency`."""
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
