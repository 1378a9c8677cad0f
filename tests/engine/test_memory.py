"""The memory of a child includes that of what it has started, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from celery_subproc_pool.engine.memory import SURVEY_INTERVAL, MemoryMeter

MIB = 2**20
TAKE = "taken = bytearray({} << 20); print(flush=True); import time; time.sleep(600)"


@contextmanager
def family() -> Iterator[int]:
    """Start a process of 100 MiB that starts one of 200 MiB; give the pid of the first."""
    start = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {TAKE.format(200)!r}])"
    )
    argv = [sys.executable, "-c", f"{start}\n{TAKE.format(100)}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        yield process.pid
        os.killpg(process.pid, signal.SIGKILL)


def test_what_a_child_started_counts() -> None:
    with family() as pid:
        assert 300 * MIB < MemoryMeter().measure(pid, 0.0) < 400 * MIB


def test_what_other_processes_take_does_not_count() -> None:
    with family():
        assert MemoryMeter().measure(os.getpid(), 0.0) < 300 * MIB


def test_what_a_child_started_is_looked_up_once_per_interval() -> None:
    meter = MemoryMeter()
    meter.measure(os.getpid(), 0.0)
    with family() as pid:
        assert meter.measure(pid, SURVEY_INTERVAL / 2) < 200 * MIB
        assert meter.measure(pid, SURVEY_INTERVAL) > 300 * MIB


def test_a_child_that_is_gone_takes_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert MemoryMeter().measure(process.pid, 0.0) == 0
