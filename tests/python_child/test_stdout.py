"""What tasks write to stdout goes to the worker's stdout, as on prefork. Real workers.

With `CSP_TEST_POOL=prefork` the first test shows what users are used to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery.apps import worker as apps_worker

from tests.support.basics import DEADLINE, wait_for
from tests.support.worker import Project

POOL = ("-P", os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool"), "-c", "1")
ours = pytest.mark.skipif("prefork" in POOL, reason="a property of this pool's")

CODE = """
import logging, os, subprocess, sys
app.conf.worker_redirect_stdouts = False
journal = logging.getLogger("journal")
journal.propagate = False
journal.addHandler(logging.StreamHandler(sys.stdout))
journal.setLevel("INFO")

@app.task(name="says")
def says():
    print("a print")
    journal.info("a record")
    sys.stdout.flush()
    os.write(1, b"raw bytes\\n")
    subprocess.run(["echo", "from a program"])
    print("to stderr", file=sys.stderr)
    return sys.stdout.isatty()
"""
LINES = ["a print", "a record", "raw bytes", "from a program"]

#: Code that makes a child's boot fail after it has printed.
FAILS = "if 'CELERY_SUBPROC_POOL_SLOT' in os.environ: print('last words'); sys.exit(3)\n"


class Parted(Project):
    """A project whose worker's stdout is redirected apart from stderr. `to` is shell syntax."""

    to = ""

    def command(self, *words: str) -> list[str]:
        return ["sh", "-c", f'exec "$@" {self.to}', "sh", *super().command(*words)]


def project_at(directory: Path, to: str, code: str = "", **python: Any) -> Parted:
    conf = {"subproc_pool": {"python": python}} if python else {}
    project = Parted(directory, conf=conf, code=CODE + code)
    project.to = to
    return project


def ask(project: Project) -> Any:
    return project.app.send_task("says").get(timeout=DEADLINE, interval=0.02)


def test_what_tasks_write_to_stdout_is_on_the_workers_stdout(tmp_path: Path) -> None:
    out = tmp_path / "out"
    project = project_at(tmp_path, f">{out}")
    with project.worker(*POOL) as worker:
        ask(project)
        wait_for(lambda: "to stderr" in worker.log, "the line on stderr")
        assert worker.stop() == 0
        written = out.read_text().splitlines()
        assert [line for line in written if line in LINES] == LINES
        assert not {*LINES} & {*worker.log.splitlines()}
        assert "to stderr" not in written


@ours
@pytest.mark.skipif(not hasattr(apps_worker, "isatty"), reason="this Celery wants a stdout")
@pytest.mark.parametrize("to", [">&-", ">&- 2>&-"])
def test_a_worker_whose_stdout_is_closed(tmp_path: Path, to: str) -> None:
    """Another file of the worker then has descriptor 1. Children must not write to it."""
    project = project_at(tmp_path, f"{to} {'<&-' if '2' in to else ''}")
    words = ("-f", str(tmp_path / "worker.log")) if "2" in to else ()
    with project.worker(*POOL, *words) as worker:
        for _ in range(3):
            assert ask(project) is False
        assert worker.stop() == 0
        assert "is replaced" not in worker.log
        assert "Traceback" not in worker.log


@ours
@pytest.mark.parametrize("stderr", ["log", "null"])
def test_stdout_goes_where_the_setting_sends_stderr(tmp_path: Path, stderr: str) -> None:
    out = tmp_path / "out"
    project = project_at(tmp_path, f">{out}", stderr=stderr)
    with project.worker(*POOL) as worker:
        ask(project)
        if stderr == "log":
            wait_for(lambda: all(line in worker.log for line in LINES), "the lines")
        assert worker.stop() == 0
        assert "raw bytes" not in out.read_text()
        assert ("raw bytes" in worker.log) is (stderr == "log")


@ours
def test_what_a_boot_prints_is_in_its_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    project = project_at(tmp_path, f">{out}", FAILS)
    done = project.run("worker", *POOL)
    assert "its last stderr lines: last words" in done.stdout
    assert "last words" not in out.read_text()
