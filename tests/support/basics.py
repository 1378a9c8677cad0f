"""What all tests need: real children, real servers, waiting, and which processes are ours."""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_subproc_pool.engine.guardian import MARK

CHILDREN = Path(__file__).parents[1] / "children"

#: An environment variable that marks all processes that this test run starts, to tell them from
#: those of other runs on the machine.
RUN = "CSP_TEST_RUN"
os.environ[RUN] = uuid.uuid4().hex

#: Seconds that anything may take on a machine that is slow and busy.
DEADLINE = 30.0


#: Of the servers that some tests need, on 127.0.0.1.
PORTS = {"redis": 6379, "rabbitmq": 5672, "postgresql": 5432}


def require(name: str) -> None:
    """Skip where a server is not there; fail where one is required, as in CI."""
    try:
        socket.create_connection(("127.0.0.1", PORTS[name]), timeout=5).close()
    except OSError as exc:
        if os.environ.get("CSP_REQUIRE_BROKER"):
            pytest.fail(f"{name} is required and does not answer: {exc}")
        pytest.skip(f"{name} does not answer: {exc}")


def python_child(name: str) -> list[str]:
    """Return the argv of a Python child of ours, booting as fast as Python can."""
    return [sys.executable, "-I", "-S", str(CHILDREN / f"{name}.py")]


def sh_child(script: str) -> list[str]:
    """Return the argv of a child that is a shell script."""
    return ["sh", "-c", script]


def echoing(reply: str) -> list[str]:
    """Return the argv of a child that answers every request with `reply`."""
    return sh_child(f"while IFS= read -r line; do printf '%s\\n' '{reply}'; done")


def wait_for(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Return the first true value of `condition`; fail after `deadline` seconds without one."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline:.0f} s in vain for {what}")
        # A poll with a deadline, not a guess how long something takes.
        time.sleep(0.01)


def state_of(result: Any) -> str:
    """Return the state that is stored now. An `AsyncResult` keeps the first final state that it has
    seen, and a revoked job may have another one for a moment: its child stores its own end."""
    state: str = result.backend.get_state(result.id)
    return state


def _ours() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield the running processes that descend from this test run, with their environments."""
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get(RUN) == os.environ[RUN] and process.status() != psutil.STATUS_ZOMBIE:
                yield process, environ
        except (psutil.Error, OSError):
            continue


def pool_processes() -> dict[psutil.Process, str]:
    """Return every process that descends from some worker's pool, guardians aside, and the mark of
    its pool."""
    return {process: environ[MARK] for process, environ in _ours() if MARK in environ}


def guardians() -> list[psutil.Process]:
    """Return every guardian that runs."""
    found = []
    for process, _ in _ours():
        with suppress(psutil.Error):
            if any(part.endswith("guardian.py") for part in process.cmdline()):
                found.append(process)
    return found


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
