"""A pytest plugin for Celery's own integration tests: they get a real `celery worker` command.

`tests/celery_integration.py` tells why, and starts pytest with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import celery.contrib.testing.worker
import pytest
from celery import Celery
from celery.app.control import Inspect
from celery.contrib.testing.manager import Manager
from celery.utils.nodenames import anon_nodename

#: Seconds for a worker to be ready, and for one to stop.
START_LIMIT = 30
STOP_LIMIT = 15

#: The module that the worker command is given. Celery's tests make their app in a fixture.
MODULE = "integration_app"
TEXT = """
from celery.contrib.testing.app import TestApp
app = TestApp(enable_logging=True, set_as_current=True, config={config!r})
app.set_default()
from t.integration import tasks
app.register_task(tasks.ClassBasedAutoRetryTask())
"""

start_worker_in_thread = celery.contrib.testing.worker.start_worker
wait_until_idle = Manager.wait_until_idle


class Worker:
    """A `celery worker` process, started anew after each test that failed.

    Arguments:
        app: the client's app, whose configuration the worker gets.
        options: what is asked for, from the environment.
    """

    def __init__(self, app: Celery, options: dict[str, Any]) -> None:
        self._app = app
        self._options = options
        self._log = Path(options["worker_log"])
        self._directory = self._log.parent / f"{self._log.stem}-app"
        self._directory.mkdir(exist_ok=True)
        config = app.conf.table(with_defaults=False, censored=False)
        (self._directory / f"{MODULE}.py").write_text(TEXT.format(config=config))

    def start(self) -> None:
        """Start the worker and wait until it answers."""
        path = os.pathsep.join([self._options["tasks"], os.environ["PYTHONPATH"]])
        environ = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "C_FORCE_ROOT": "1",
            "PYTHONPATH": path,
        }
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", MODULE, "worker", "-l", "INFO"),
                    *("-P", self._options["pool"], "-c", str(self._options["concurrency"])),
                    # The name that the tests expect: that of a worker in this process.
                    *("-n", anon_nodename()),
                    *("--without-heartbeat", "--without-mingle", "--without-gossip"),
                ],
                cwd=self._directory,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_LIMIT
        inspect = self._app.control.inspect(timeout=0.5, limit=1)
        while not inspect.ping():
            if self._process.poll() is not None:
                pytest.exit(f"the worker does not start: {self._log}", returncode=4)
            if time.monotonic() > deadline:
                self.kill()
                pytest.exit(f"the worker does not get ready: {self._log}", returncode=4)

    def stop(self) -> None:
        """Stop the worker warmly, or kill it if it does not stop."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the worker. Children of prefork end with it, as do ours."""
        self._process.kill()
        self._process.wait()

    def renew(self) -> None:
        """Kill the worker, forget all messages, and start another."""
        self.kill()
        self._app.control.purge()
        self.start()


class Plugin:
    """What is done around the tests.

    Arguments:
        options: what is asked for.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._in_process = options["share"] is None
        self._worker: Worker | None = None
        self._renew = False
        self._outcome = ""

    @contextmanager
    def start_worker(self, app: Celery, **arguments: Any) -> Iterator[None]:
        """Stand in for Celery's function of this name, which runs a worker in a thread."""
        if self._in_process:
            arguments.update(pool=self._options["pool"], concurrency=self._options["concurrency"])
            with start_worker_in_thread(app, **arguments):
                self._check_children(app)
                yield
            return
        self._worker = Worker(app, self._options)
        self._worker.start()
        try:
            self._check_children(app)
            yield
        finally:
            self._worker.stop()

    def _check_children(self, app: Celery) -> None:
        """Exit if no children await coroutines though there should be some: all would pass."""
        if not self._options["coroutines"]:
            return
        replies = app.control.broadcast("subproc", reply=True, timeout=START_LIMIT, limit=1)
        rows = [row for reply in replies for rows in reply.values() for row in rows]
        if "asyncio" not in {row["group"] for row in rows}:
            pytest.exit(f"the worker has no asyncio children: {rows}", returncode=4)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Take this run's share, and give each test a limit instead of its own 300 seconds."""
        options = self._options
        items[:] = [
            item
            for item in items
            if self._is_one_of("in_process", item) == self._in_process
            and not self._is_one_of("left_out", item)
            and not (options["quick"] and self._is_one_of("slow", item))
        ]
        if not self._in_process:
            index, count = options["share"]
            items[:] = items[index::count]
        for item in items:
            # Some rely on a test before them to start it.
            item.fixturenames.insert(0, "celery_session_worker")
            limit = options["slow_limit" if self._is_one_of("slow", item) else "limit"]
            item.add_marker(pytest.mark.timeout(limit), append=False)

    def _is_one_of(self, names: str, item: pytest.Item) -> bool:
        return item.nodeid.startswith(tuple(self._options[names]))

    def pytest_runtest_setup(self) -> None:
        """Let no test suffer from what the one before has done to the worker."""
        if self._renew and self._worker is not None:
            self._renew = False
            self._worker.renew()

    def pytest_runtest_logstart(self) -> None:
        self._outcome = "skipped"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcome = "failed"
            self._renew = True
        elif report.passed and report.when == "call" and self._outcome != "failed":
            self._outcome = "passed"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note how a test ended at once: the run may be killed."""
        with open(self._options["results"], "a") as file:
            file.write(json.dumps([nodeid, self._outcome]) + "\n")


def quick_wait_until_idle(manager: Manager) -> None:
    """Do as Celery's, after each test, but wait for no second worker's reply: a second a test."""
    with mock.patch.object(Inspect, "__init__", partialmethod(Inspect.__init__, limit=1)):
        wait_until_idle(manager)


def pytest_configure(config: pytest.Config) -> None:
    plugin = Plugin(json.loads(os.environ["CELERY_INTEGRATION"]))
    # Called by the fixture `celery_session_worker`, in Celery's conftest too.
    celery.contrib.testing.worker.start_worker = plugin.start_worker
    Manager.wait_until_idle = quick_wait_until_idle
    config.pluginmanager.register(plugin)
