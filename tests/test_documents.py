"""The children that the documents give people to start from do what they are said to."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from celery_subproc_pool import protocol
from celery_subproc_pool.records import Job

from .engine import Engine, answer

ROOT = Path(__file__).parents[1]


class Example(NamedTuple):
    """A child in a document."""

    #: The document, the heading of its section, and which of the code blocks there it is.
    document: str
    heading: str
    language: str
    number: int
    program: str
    settings: Mapping[str, Any] = MappingProxyType({})


MANY = {"handshake": True, "tasks": [], "max_in_flight": 200}
PROTOCOL = "docs/protocol.md"
GREETERS = {
    "python": Example(PROTOCOL, "### Python", "python", 0, sys.executable),
    "asyncio": Example(PROTOCOL, "### Python", "python", 1, sys.executable, MANY),
    "ruby": Example(PROTOCOL, "### Ruby", "ruby", 0, "ruby"),
    "node": Example(PROTOCOL, "### Node", "javascript", 0, "node"),
    "node, many": Example(PROTOCOL, "### Node", "javascript", 1, "node", MANY),
    "perl": Example(PROTOCOL, "### Perl", "perl", 0, "perl"),
}
SHELL = Example(PROTOCOL, "### Shell", "sh", 0, "sh")
FIRST = Example("README.md", "## A first child", "ruby", 0, "ruby")


def engine(example: Example, directory: Path) -> Engine:
    """Return an engine with one child, which is `example` to the letter."""
    program = shutil.which(example.program)
    if program is None:
        pytest.skip(f"{example.program} is not installed")
    _, _, section = (ROOT / example.document).read_text().partition(f"\n{example.heading}")
    code = re.findall(rf"^```{example.language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    script = directory / "child"
    script.write_text(code[example.number])
    return Engine(
        [program, str(script)],
        limit=2,
        cwd=str(directory),
        **{"tasks": ["greet"], **example.settings},
    )


def begin(pool: Engine, task_id: str, *args: Any) -> Job:
    """Send a job for the task `greet`."""
    job = pool.submit(task_id)
    payload = {"task": "greet", "args": args, "kwargs": {}}
    line = protocol.encode_request(task_id, payload)
    pool.supervisor.post(pool.supervisor.scheduler.provide, job, line)
    return job


@pytest.mark.parametrize("name", GREETERS)
def test_a_child_to_start_from_greets(name: str, tmp_path: Path) -> None:
    with engine(GREETERS[name], tmp_path) as pool:
        first, second = begin(pool, "1", "Ada"), begin(pool, "2", "Zoë\n" + "x" * 100_000)
        assert answer(pool.outcome_of(first)) == protocol.Ok(id="1", result="Hello, Ada")
        hello = "Hello, Zoë\n" + "x" * 100_000
        assert answer(pool.outcome_of(second)) == protocol.Ok(id="2", result=hello)


@pytest.mark.parametrize("name", ["python", "ruby", "node", "perl"])
def test_a_child_to_start_from_survives_an_error(name: str, tmp_path: Path) -> None:
    with engine(GREETERS[name], tmp_path) as pool:
        reply = answer(pool.outcome_of(begin(pool, "1", "")))
        assert isinstance(reply, protocol.Error)
        assert "nobody to greet" in (reply.message or "")
        [pid] = pool.pids
        assert isinstance(answer(pool.outcome_of(begin(pool, "2", "Ada"))), protocol.Ok)
        assert pool.pids == [pid]


def test_the_shell_child_hands_jobs_on(tmp_path: Path) -> None:
    jobs = tmp_path / "greet-one-job"
    jobs.write_text("#!/bin/sh\ngrep -q Ada || exit 7\n")
    jobs.chmod(0o700)
    with engine(SHELL, tmp_path) as pool:
        assert answer(pool.outcome_of(begin(pool, "1", "Ada"))) == protocol.Ok(id="1")
        reply = answer(pool.outcome_of(begin(pool, "2", "Eve")))
        assert reply == protocol.Error(id="2", message="exit status 7")


def test_the_first_child_doubles(tmp_path: Path) -> None:
    with engine(FIRST, tmp_path) as pool:
        assert answer(pool.outcome_of(begin(pool, "1", 21))) == protocol.Ok(id="1", result=42)
