"""How much memory a child takes, with what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from celery_subproc_pool.engine.memory import SURVEY_INTERVAL, MemoryMeter

MIB = 2**20
TAKE = "taken = bytearray({} << 20); print(flush=True); import time; time.sleep(600)"


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A process of 100 MiB that has started one of 200 MiB."""
    start = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {TAKE.format(200)!r}])"
    )
    argv = [sys.executable, "-c", f"{start}\n{TAKE.format(100)}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_what_a_child_started_counts(family: subprocess.Popen[bytes]) -> None:
    assert 300 * MIB < MemoryMeter().measure(family.pid, 0.0) < 400 * MIB


def test_others_do_not_count(family: subprocess.Popen[bytes]) -> None:
    assert MemoryMeter().measure(os.getpid(), 0.0) < 300 * MIB


def test_what_a_child_started_is_looked_up_once_in_a_while(
    family: subprocess.Popen[bytes],
) -> None:
    meter = MemoryMeter()
    # Nobody of this session was there yet.
    meter.measure(os.getpid(), 0.0)
    meter._members.clear()
    assert meter.measure(family.pid, SURVEY_INTERVAL / 2) < 200 * MIB
    assert meter.measure(family.pid, SURVEY_INTERVAL) > 300 * MIB


def test_a_child_that_is_gone_takes_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert MemoryMeter().measure(process.pid, 0.0) == 0
