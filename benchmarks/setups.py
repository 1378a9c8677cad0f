"""What is compared: workers that differ in their pool, and in how they reach another program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

__all__ = ("BROKERS", "RESULTS", "SETUPS", "VARIABLE", "Setup")

#: JSON, in the environment of `app`: the configuration, and how `echo` reaches its program.
VARIABLE = "BENCHMARK"

CHILDREN = Path(__file__).with_name("children")
PERL = ["perl", str(CHILDREN / "echo.pl")]
#: Without `site`: as fast as Python boots.
PYTHON = [sys.executable, "-I", "-S", str(CHILDREN / "echo.py")]
SLEEPER = [sys.executable, "-I", "-S", str(CHILDREN / "sleeper.py")]
OURS = "celery_subproc_pool:Pool"

#: Databases of their own.
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
    #: How the task `echo` reaches its program, unless a child of ours takes it, and which.
    echo: str | None = None
    program: list[str] = []
    #: More variables of its environment.
    environ: dict[str, str] = {}


def _external(argv: list[str], **settings: Any) -> Setup:
    return Setup(OURS, {"subproc_pool": {"argv": argv, **settings}})


def _sleepers(**settings: Any) -> Setup:
    return _external(SLEEPER, handshake=True, **settings)


SETUPS = {
    "floor": Setup("custom", environ={"CELERY_CUSTOM_WORKER_POOL": "benchmarks.floor:Pool"}),
    "prefork": Setup("prefork"),
    "prefork, spawn": Setup("prefork", {"worker_pool_start_method": "spawn"}),
    "threads": Setup("threads"),
    "python": Setup(OURS),
    "external": _external(PERL),
    "sidecar": Setup("prefork", echo="sidecar", program=PERL),
    "run": Setup("prefork", echo="run", program=PERL),
    "external python": _external(PYTHON),
    "run python": Setup("prefork", echo="run", program=PYTHON),
    "multiplexed": _sleepers(size=1, max_in_flight=200),
    "one each": _sleepers(),
}
