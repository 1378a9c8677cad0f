"""The Celery app of the workers that are measured. `setups` has their settings."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from typing import Any

from celery import Celery
from celery.signals import (
    task_postrun,
    task_prerun,
    task_success,
    worker_process_init,
    worker_ready,
)

from .gauge import Gauge
from .setups import VARIABLE

_settings: dict[str, Any] = json.loads(os.environ.get(VARIABLE) or "{}")

if _settings.get("django"):
    from .django_app import set_up

    set_up()

app = Celery("benchmarks.app")
app.conf.update(_settings.get("conf", {}))


@app.task(name="noop", ignore_result=True)
def noop(*args: Any) -> None:
    """Do nothing."""


@app.task(name="noop.stored")
def noop_stored(*args: Any) -> None:
    """Do nothing, and store the result."""


@app.task(name="sleep", ignore_result=True)
def sleep(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


if _settings.get("coroutines"):

    @app.task(name="nap", ignore_result=True)
    async def nap(seconds: float) -> None:
        """Wait, and let others work."""
        await asyncio.sleep(seconds)

    @app.task(name="nap.stored")
    async def nap_stored(seconds: float) -> None:
        """As `nap`, with a stored result."""
        await asyncio.sleep(seconds)

else:

    @app.task(name="nap", ignore_result=True)
    def nap_in_thread(seconds: float) -> None:
        """Wait. With gevent, others work meanwhile."""
        time.sleep(seconds)

    @app.task(name="nap.stored")
    def nap_in_thread_stored(seconds: float) -> None:
        """As `nap`, with a stored result."""
        time.sleep(seconds)


# -- what people do today for a program in another language

_program: list[str] = _settings.get("program", [])


def _message(task_id: str, args: tuple[Any, ...]) -> bytes:
    return json.dumps({"id": task_id, "payload": {"args": args}}).encode() + b"\n"


class Sidecar:
    """A warm program beside a prefork process."""

    process: subprocess.Popen[bytes]

    @classmethod
    def ask(cls, line: bytes) -> bytes:
        """Write a line, read a line."""
        stdin, stdout = cls.process.stdin, cls.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(line)
        stdin.flush()
        return stdout.readline()


if _settings.get("echo") == "sidecar":

    @worker_process_init.connect
    def start_sidecar(**_: Any) -> None:
        """Boot the program once in each process."""
        Sidecar.process = subprocess.Popen(_program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def echo_by_sidecar(self: Any, *args: Any) -> None:
        """Ask the warm program."""
        answer = json.loads(Sidecar.ask(_message(self.request.id, args)))
        if answer["status"] != "ok":
            raise RuntimeError(answer)

    app.task(echo_by_sidecar, name="echo", bind=True, ignore_result=True)
    app.task(echo_by_sidecar, name="echo.stored", bind=True)

elif _settings.get("echo") == "run":

    @app.task(name="echo", bind=True, ignore_result=True)
    def echo_by_run(self: Any, *args: Any) -> None:
        """Boot the program for this job."""
        line = _message(self.request.id, args)
        done = subprocess.run(_program, input=line, stdout=subprocess.PIPE, check=True)
        answer = json.loads(done.stdout)
        if answer["status"] != "ok":
            raise RuntimeError(answer)

else:

    @app.task(name="echo", ignore_result=True)
    def echo(*args: Any) -> None:
        """Do nothing. On this pool, an external child takes the task."""

    @app.task(name="echo.stored")
    def echo_stored(*args: Any) -> None:
        """As `echo`, with a stored result."""


if _settings.get("signals"):
    # Prefork's processes are forked later, so they have the receivers too.

    @task_prerun.connect
    @task_postrun.connect
    @task_success.connect
    def watch(**_: Any) -> None:
        """Do next to nothing, as the receivers of Django's fixup and of monitoring do."""


@worker_ready.connect
def start_gauge(**_: Any) -> None:
    """Start the gauge, which the benchmark asks for numbers."""
    path = _settings.get("gauge")
    if path:
        Gauge(path).start()
