"""What all tests share: real workers, real children, and the check that none is left."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from celery_subproc_pool.guardian import MARK

if TYPE_CHECKING:
    from .workplace import Workplace

CHILDREN = Path(__file__).parent / "children"

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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    ],
)
def broker(request: pytest.FixtureRequest) -> str:
    """Return the name of a broker that answers."""
    require(request.param)
    # The results are kept there, whatever the broker.
    require("redis")
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path, broker: str) -> Iterator[Workplace]:
    """Return a project on a queue of its own."""
    from .workplace import Workplace

    with closing(Workplace(tmp_path, broker)) as workplace:
        yield workplace


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Keep Celery's client alive: until 5.7, when the collector finds an `AsyncResult` while
    another is being subscribed to, its `__del__` waits for ever for redis-py's lock."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, no child of a pool that the test started is alive."""
    others = {*pool_processes().values()}
    yield
    if any(name.endswith("_worker") for name in request.fixturenames):
        # It outlives the test.
        return
    wait_for(
        lambda: not {*pool_processes().values()} - others,
        "the children of this test's pools to be gone",
    )


@pytest.fixture(scope="session")
def celery_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the configuration of the embedded session worker.

    Its broker and results are files: what is in memory, Python children can't reach.
    """
    directory = tmp_path_factory.mktemp("embedded")
    for name in ("queue", "control", "results"):
        (directory / name).mkdir()
    return {
        "broker_url": "filesystem://",
        "broker_transport": "tests.folder_broker:Transport",
        "broker_transport_options": {
            "data_folder_in": str(directory / "queue"),
            "data_folder_out": str(directory / "queue"),
            "control_folder": str(directory / "control"),
            "polling_interval": 0.01,
        },
        "result_backend": f"tests.folder_broker:Backend+file://{directory / 'results'}",
        "worker_hijack_root_logger": False,
        "accept_content": ["json", "pickle"],
        "subproc_pool": {
            "children": {
                "obeys": {"argv": python_child("obeys"), "tasks": ["do.*", "do.it"], "size": 2},
                "single": {"argv": python_child("obeys"), "tasks": ["one.it"], "size": 1},
                "capped": {
                    "argv": python_child("obeys"),
                    "tasks": ["capped.it"],
                    "size": 1,
                    "throttle_max_retries": 2,
                },
            }
        },
    }


@pytest.fixture(scope="session")
def celery_worker_pool() -> str:
    """Return the pool under test, by the name that users write."""
    return "celery_subproc_pool:Pool"


@pytest.fixture(scope="session")
def celery_worker_parameters() -> dict[str, Any]:
    """Return the parameters of the embedded session worker."""
    return {"concurrency": 4, "loglevel": "INFO", "shutdown_timeout": DEADLINE}


@pytest.fixture(scope="session")
def celery_enable_logging() -> bool:
    """Leave the records to pytest."""
    return True


@pytest.fixture(scope="session")
def embedded_app(celery_session_app: Any) -> Any:
    """Return the session's app, its tasks defined before its worker starts."""
    from celery.contrib.testing import tasks as _ping  # noqa: F401

    from . import embedded_tasks

    embedded_tasks.define(celery_session_app)
    return celery_session_app


@pytest.fixture(scope="session")
def session_worker(embedded_app: Any, celery_session_worker: Any) -> Any:
    """Return a worker in a thread of this process: memory broker, engine in a thread."""
    return celery_session_worker
