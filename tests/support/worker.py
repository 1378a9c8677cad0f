"""A real `celery worker` command, as an operator starts it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from celery import Celery

from tests.support.basics import DEADLINE, wait_for

#: The start of every project that a test writes.
HEADER = """
from celery import Celery
app = Celery("proj", broker={broker!r}, backend={backend!r})
app.conf.update({conf!r})
app.conf.broker_connection_retry_on_startup = True
"""


#: The program of a tracer.
TRACER = "celery_subproc_pool.tracer.main"
#: Its title, where `setproctitle` is installed.
TRACERS_TITLE = re.compile(r":SubprocTracer-\d+\]")

#: Options that make a worker ready sooner.
QUICK_START = ("--without-mingle", "--without-gossip")


class Project:
    """A Celery project in a directory of its own.

    Arguments:
        directory: where.
        broker: the broker's URL; the filesystem transport if None.
        workers_broker: the URL for workers, if they connect in another way.
        workers_backend: the same for the result backend.
        backend: the result backend's URL; the filesystem backend if None.
        conf: the rest of the configuration.
        code: more Python, after the app is made.
    """

    def __init__(
        self,
        directory: Path,
        broker: str | None = None,
        backend: str | None = None,
        conf: Mapping[str, Any] | None = None,
        code: str = "",
        workers_broker: str | None = None,
        workers_backend: str | None = None,
    ) -> None:
        self.directory = directory
        #: The worker's name, so that a remote control command need not wait for others.
        self.node = f"proj-{uuid.uuid4().hex}@localhost"
        results = f"folder_broker:Backend+file://{directory / 'results'}"
        full: dict[str, Any] = dict(conf or {})
        if broker is None:
            for folder in ("queue", "control", "results"):
                (directory / folder).mkdir(exist_ok=True)
            full["broker_transport_options"] = {
                "data_folder_in": str(directory / "queue"),
                "data_folder_out": str(directory / "queue"),
                "control_folder": str(directory / "control"),
                "polling_interval": 0.02,
            }
            full["broker_transport"] = "folder_broker:Transport"
        self.app = Celery(
            "proj",
            broker=broker or "filesystem://",
            backend=backend or f"tests.support.{results}",
            set_as_current=False,
        )
        self.app.conf.update(full)
        if broker is None:
            self.app.conf.broker_transport = "tests.support.folder_broker:Transport"
        self._write(
            code,
            broker=workers_broker or broker or "filesystem://",
            backend=workers_backend or backend or results,
            conf=full,
        )

    def _write(self, code: str, broker: str, backend: str, conf: Mapping[str, Any]) -> None:
        """Write the project's files."""
        text = HEADER.format(broker=broker, backend=backend, conf=conf)
        (self.directory / "proj.py").write_text(text + code)

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment for commands: this process' own, without Celery's variables."""
        environ = {key: value for key, value in os.environ.items() if "CELERY" not in key}
        # Where `folder_broker` is.
        path = str(Path(__file__).parent)
        return {
            **environ,
            "PYTHONPATH": path,
            "C_FORCE_ROOT": "1",
            "PYTHONUNBUFFERED": "1",
            **extra,
        }

    def command(self, *words: str) -> list[str]:
        """Return the words of a `celery` command for this project."""
        return [sys.executable, "-m", "celery", "-A", "proj", *words]

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a `celery` command to its end, stdout and stderr together."""
        return subprocess.run(
            self.command(*words),
            cwd=self.directory,
            env=self.environment(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )

    def control(self, *words: str) -> str:
        """Run a `celery control` command for the project's worker; return what it printed."""
        done = self.run("control", "-d", self.node, "-t", "20", *words)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def worker(self, *words: str, terminal: int | None = None, **environ: str) -> Worker:
        """Return a worker of this project, to be entered; in the foreground of `terminal`, the
        descriptor of one, if that is given."""
        return Worker(self, words, environ, terminal)


class Worker:
    """A context manager: a `celery worker` that is ready on entry, and stopped on exit."""

    def __init__(
        self,
        project: Project,
        words: tuple[str, ...],
        environ: dict[str, str],
        terminal: int | None = None,
    ) -> None:
        self._project = project
        self._terminal = terminal
        self._words = words
        self._environ = environ
        #: What the worker and its children write to.
        self.log_path = project.directory / "worker.log"

    def __enter__(self) -> Worker:
        node = self._project.node
        self.log_path.write_text("")
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                self._project.command(
                    "worker", "-l", "INFO", "-n", node, *QUICK_START, *self._words
                ),
                cwd=self._project.directory,
                env=self._project.environment(**self._environ),
                stdin=self._terminal,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=self._terminal is not None,
                # The standard library has no other way.
                preexec_fn=self._terminal and _control_terminal,  # noqa: PLW1509
            )
        try:
            wait_for(lambda: " ready." in self.log or self.process.poll() is not None, "the worker")
            assert self.process.poll() is None, self.log
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the worker did not stop:\n{self.log}") from None
        if kind is not None:
            print(self.log)

    @property
    def log(self) -> str:
        """What the worker has written so far."""
        return self.log_path.read_text()

    def stop(self) -> int:
        """Stop the worker warmly; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)

    def children(self) -> list[psutil.Process]:
        """Return the pool's children: the worker's, and those that templates have forked. Without
        the guardian, tracers and templates."""
        found = []
        for child, words in self._processes():
            if _is_template(child):
                # It may have just ended.
                with suppress(psutil.Error):
                    found += child.children()
            elif not _is_helper(words):
                found.append(child)
        return found

    def templates(self) -> list[psutil.Process]:
        """Return the pool's templates."""
        return [child for child, _ in self._processes() if _is_template(child)]

    def tracers(self) -> list[psutil.Process]:
        """Return the pool's tracers."""
        return [child for child, words in self._processes() if _is_tracer(words)]

    def _processes(self) -> list[tuple[psutil.Process, list[str]]]:
        """Return the worker's child processes, each with its command line."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            # It may have just ended.
            with suppress(psutil.Error):
                found.append((child, child.cmdline()))
        return found

    def stats(self) -> dict[str, Any]:
        """Return what `celery inspect stats` says of the pool."""
        done = self._project.run(
            "--quiet", "inspect", "--json", "-d", self._project.node, "-t", "20", "stats"
        )
        [node] = json.loads(done.stdout[done.stdout.index("{") :]).values()
        pool: dict[str, Any] = node["pool"]
        return pool


def _is_tracer(words: list[str]) -> bool:
    return TRACER in words or any(map(TRACERS_TITLE.search, words))


def _is_template(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        # A title of `setproctitle` overwrites the environment.
        titles = any("Template-" in word for word in process.cmdline())
        return titles or "CELERY_SUBPROC_POOL_TEMPLATE" in process.environ()
    return False


def _is_helper(words: list[str]) -> bool:
    return _is_tracer(words) or any(word.endswith("guardian.py") for word in words)


def _control_terminal() -> None:
    """Let stdin be the terminal of this session, whose foreground group this process is."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
