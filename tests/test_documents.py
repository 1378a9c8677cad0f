"""The example children in the documents work as the documents say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from celery_subproc_pool.core.model import Job
from celery_subproc_pool.wire import messages
from tests.support.engine import Engine, answer

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


def engine(example: Example, directory: Path, *more: str) -> Engine:
    """Return an engine with one child: `example`, unchanged but for statements in its task.

    Arguments:
        example: the example.
        directory: a folder for the child's program.
        more: statements that the task runs first.
    """
    program = shutil.which(example.program)
    if program is None:
        pytest.skip(f"{example.program} is not installed")
    _, _, section = (ROOT / example.document).read_text().partition(f"\n{example.heading}")
    code = re.findall(rf"^```{example.language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    script = directory / "child"
    text = code[example.number]
    for statement in more:
        greeting = re.compile(r"^( *)(?=(?:return )?f?[\"`]Hello, )", re.MULTILINE)
        text, count = greeting.subn(rf"\1{statement}\n\1", text)
        assert count == 1
    script.write_text(text)
    return Engine(
        [program, str(script)],
        limit=2,
        cwd=str(directory),
        **{"tasks": ["greet"], **example.settings},
    )


def begin(pool: Engine, task_id: str, *args: Any) -> Job:
    """Send a job for the task `greet`."""
    payload = {"task": "greet", "args": args, "kwargs": {}}
    return pool.submit(messages.encode_request(task_id, payload), task_id)


@pytest.mark.parametrize("name", GREETERS)
def test_an_example_greets(name: str, tmp_path: Path) -> None:
    with engine(GREETERS[name], tmp_path) as pool:
        first, second = begin(pool, "1", "Ada"), begin(pool, "2", "Zoë\n" + "x" * 100_000)
        assert answer(pool.outcome_of(first)) == messages.Ok(id="1", result="Hello, Ada")
        hello = "Hello, Zoë\n" + "x" * 100_000
        assert answer(pool.outcome_of(second)) == messages.Ok(id="2", result=hello)


#: In each language: how the task does something for the name `odd` only.
IF_ODD = {
    "python": "if name == 'odd': {}",
    "asyncio": "if name == 'odd': {}",
    "ruby": "{} if name == 'odd'",
    "node": "if (name === 'odd') {{ {} }}",
    "node, many": "if (name === 'odd') {{ {} }}",
    "perl": "if ($name eq 'odd') {{ {} }}",
}
#: In each language: statements that return or raise what JSON can't hold.
NO_JSON = {
    "python": (
        "import datetime; return datetime.date(2026, 1, 2)",
        "return chr(0xd83d)",
        "return float('nan')",
        "raise ValueError(chr(0xd83d))",
    ),
    "asyncio": (
        "import datetime; return datetime.date(2026, 1, 2)",
        "return chr(0xd83d)",
        "return float('nan')",
        "raise ValueError(chr(0xd83d))",
        "raise asyncio.CancelledError()",
        "return {(): 1}",
    ),
    "ruby": (
        "return 255.chr",
        "return 0.0 / 0",
        "raise 255.chr",
        "raise 255.chr.force_encoding('UTF-8')",
        "raise 252.chr.force_encoding('ISO-8859-1')",
        "a = []; return a << a",
    ),
    "node": (
        "return 1n;",
        "const a = []; a.push(a); return a;",
        "throw new Error(String.fromCharCode(0xd83d));",
        "throw 1n;",
        "throw null;",
    ),
    "perl": (
        "return bless {}, 'Thing';",
        "return sub {};",
        "die bless {}, 'Thing';",
        "die chr 255;",
        "die chr 0xd83d;",
        "die;",
    ),
}
NO_JSON["node, many"] = NO_JSON["node"]


@pytest.mark.parametrize(
    ("name", "statement"), [(name, each) for name, all_ in NO_JSON.items() for each in all_]
)
def test_an_example_survives_what_json_cannot_hold(
    name: str, statement: str, tmp_path: Path
) -> None:
    odd = IF_ODD[name].format(statement)
    with engine(GREETERS[name], tmp_path, odd) as pool:
        reply = answer(pool.outcome_of(begin(pool, "1", "odd")))
        assert isinstance(reply, messages.Error)
        assert reply.message
        [pid] = pool.pids
        hello = messages.Ok(id="2", result="Hello, Ada")
        assert answer(pool.outcome_of(begin(pool, "2", "Ada"))) == hello
        assert pool.pids == [pid]


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("node", "return String.fromCharCode(0xd83d);"),
        ("node, many", "return String.fromCharCode(0xd83d);"),
        ("perl", "return chr 0xd83d;"),
    ],
)
def test_an_example_mends_half_of_a_character(name: str, statement: str, tmp_path: Path) -> None:
    with engine(GREETERS[name], tmp_path, IF_ODD[name].format(statement)) as pool:
        mended = messages.Ok(id="1", result="\ufffd")
        assert answer(pool.outcome_of(begin(pool, "1", "odd"))) == mended


@pytest.mark.parametrize("name", GREETERS)
def test_only_a_newline_ends_a_line_for_an_example(name: str, tmp_path: Path) -> None:
    """The worker escapes what languages take for other line ends. Other senders might not."""
    odd = "a\u2028b\u2029c\x85d\u000b\u000ce\r"
    line = json.dumps(
        {"id": "1", "payload": {"task": "greet", "args": [odd], "kwargs": {}}}, ensure_ascii=False
    )
    with engine(GREETERS[name], tmp_path) as pool:
        job = pool.submit(f"{line}\n".encode(), "1")
        hello = messages.Ok(id="1", result=f"Hello, {odd}")
        assert answer(pool.outcome_of(job)) == hello
        hello = messages.Ok(id="2", result=f"Hello, {odd}")
        assert answer(pool.outcome_of(begin(pool, "2", odd))) == hello


@pytest.mark.parametrize("name", ["python", "ruby", "node", "perl"])
def test_an_example_survives_an_error(name: str, tmp_path: Path) -> None:
    with engine(GREETERS[name], tmp_path) as pool:
        reply = answer(pool.outcome_of(begin(pool, "1", "")))
        assert isinstance(reply, messages.Error)
        assert "nobody to greet" in (reply.message or "")
        [pid] = pool.pids
        assert isinstance(answer(pool.outcome_of(begin(pool, "2", "Ada"))), messages.Ok)
        assert pool.pids == [pid]


def test_the_shell_example_passes_jobs_on(tmp_path: Path) -> None:
    jobs = tmp_path / "greet-one-job"
    jobs.write_text("#!/bin/sh\ngrep -q Ada || exit 7\n")
    jobs.chmod(0o700)
    with engine(SHELL, tmp_path) as pool:
        assert answer(pool.outcome_of(begin(pool, "1", "Ada"))) == messages.Ok(id="1")
        reply = answer(pool.outcome_of(begin(pool, "2", "Eve")))
        assert reply == messages.Error(id="2", message="exit status 7")


def test_the_first_child_doubles(tmp_path: Path) -> None:
    with engine(FIRST, tmp_path) as pool:
        assert answer(pool.outcome_of(begin(pool, "1", 21))) == messages.Ok(id="1", result=42)
        [pid] = pool.pids
        assert isinstance(answer(pool.outcome_of(begin(pool, "2", None))), messages.Error)
        assert answer(pool.outcome_of(begin(pool, "3", "ü"))) == messages.Ok(id="3", result="üü")
        assert pool.pids == [pid]
