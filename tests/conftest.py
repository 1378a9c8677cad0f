"""What all tests share: real workers, real children, and the check that none is left."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.basics import DEADLINE, pool_processes, python_child, require, wait_for

if TYPE_CHECKING:
    from tests.support.workplace import Workplace


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
    from tests.support.workplace import Workplace

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
        "broker_transport": "tests.support.folder_broker:Transport",
        "broker_transport_options": {
            "data_folder_in": str(directory / "queue"),
            "data_folder_out": str(directory / "queue"),
            "control_folder": str(directory / "control"),
            "polling_interval": 0.01,
        },
        "result_backend": f"tests.support.folder_broker:Backend+file://{directory / 'results'}",
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

    from tests.support import embedded_tasks

    embedded_tasks.define(celery_session_app)
    return celery_session_app


@pytest.fixture(scope="session")
def session_worker(embedded_app: Any, celery_session_worker: Any) -> Any:
    """Return a worker in a thread of this process: memory broker, engine in a thread."""
    return celery_session_worker
