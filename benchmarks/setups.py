"""The setups that are compared: workers with several pools and ways to reach another program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

__all__ = ("BROKERS", "RESULTS", "SETUPS", "VARIABLE", "Setup")

#: The environment variable that `app` reads: JSON with the configuration and how the task `echo`
#: reaches its program.
VARIABLE = "BENCHMARK"

CHILDREN = Path(__file__).with_name("children")
PERL = ["perl", str(CHILDREN / "echo.pl")]
#: Without `site`, for the fastest boot of Python.
PYTHON = [sys.executable, "-I", "-S", str(CHILDREN / "echo.py")]
SLEEPER = [sys.executable, "-I", "-S", str(CHILDREN / "sleeper.py")]
OURS = "celery_subproc_pool:Pool"

#: The Redis databases are for benchmarks alone.
BROKERS = {
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
    "redis": "redis://127.0.0.1:6379/11",
}
RESULTS = "redis://127.0.0.1:6379/12"


class Setup(msgspec.Struct, frozen=True):
    """One kind of worker."""

    pool: str
    #: Celery's configuration.
    conf: dict[str, Any] = {}
    #: How the task `echo` reaches `program`: "sidecar" or "run". None: a child of ours takes it.
    echo: str | None = None
    program: list[str] = []
    #: Whether the signals around each task have receivers.
    signals: bool = False
    #: Whether the task `nap` is a coroutine function.
    coroutines: bool = False
    #: Whether the app is that of a Django project of middle size.
    django: bool = False
    #: The value of ``-c``, if it is not the scenario's.
    concurrency: int | None = None
    #: More environment variables.
    environ: dict[str, str] = {}


def _external(argv: list[str], **settings: Any) -> Setup:
    return Setup(OURS, {"subproc_pool": {"argv": argv, **settings}})


def _sleepers(**settings: Any) -> Setup:
    return _external(SLEEPER, handshake=True, **settings)


#: Each task has a process of its own.
FRESH = {"worker_max_tasks_per_child": 1}

SETUPS = {
    "floor": Setup("custom", environ={"CELERY_CUSTOM_WORKER_POOL": "benchmarks.floor:Pool"}),
    "prefork": Setup("prefork"),
    "prefork, spawn": Setup("prefork", {"worker_pool_start_method": "spawn"}),
    "threads": Setup("threads"),
    "python": Setup(OURS),
    "external": _external(PERL),
    "sidecar": Setup("prefork", echo="sidecar", program=PERL),
    "external, signals": msgspec.structs.replace(_external(PERL), signals=True),
    "sidecar, signals": Setup("prefork", echo="sidecar", program=PERL, signals=True),
    "run": Setup("prefork", echo="run", program=PERL),
    "external python": _external(PYTHON),
    "run python": Setup("prefork", echo="run", program=PYTHON),
    "multiplexed": _sleepers(size=1, max_in_flight=200),
    "one each": _sleepers(),
    # The app has ordinary tasks too.
    "prefork, Django": Setup("prefork", django=True),
    "python, Django": Setup(OURS, django=True),
    "python, Django, spawned": Setup(
        OURS, {"subproc_pool": {"python": {"start": "spawn"}}}, django=True
    ),
    "prefork, fresh": Setup("prefork", FRESH, django=True),
    "python, fresh": Setup(OURS, FRESH, django=True),
    "asyncio": Setup(OURS, {"subproc_pool": {"python": {"size": 1}}}, coroutines=True),
    "gevent": Setup("gevent"),
    "threads, 200": Setup("threads", concurrency=200),
}
