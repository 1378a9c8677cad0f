"""Whatever a child does, the worker goes on, says what happened, and no job gets another's reply.

A table: the child's fault (`children/faulty.py`), and how its job must end. Each row has a group of
its own in one real worker. After each, the next job of the group must get its own reply, and the
process table must hold as many of the row's processes as the group has children.
"""

from __future__ import annotations

import re
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil
import pytest

from tests.support.basics import CHILDREN, DEADLINE, wait_for
from tests.support.worker import Project, Worker

POOL = ("-P", "celery_subproc_pool:Pool")

DONE = "SUCCESS: done"
LOST = "FAILURE: WorkerLostError: Worker exited prematurely: "
LIMIT = r"FAILURE: TimeLimitExceeded: TimeLimitExceeded\(1\.0,?\)"
FAULT = r"FAILURE: ProtocolFault: child \w+ pid \d+ broke the protocol: "
#: Seconds: a limit that is waited for.
SHORT = {"timeout": 1.0}


class Row(NamedTuple):
    """A fault and what must come of it."""

    fault: str
    #: Matches the state of the job and what it returned or raised.
    ends: str
    #: What the log must say of the child.
    log: str = ""
    #: Settings of the group.
    settings: Mapping[str, Any] = MappingProxyType({})
    #: The job.
    args: tuple[Any, ...] = ("fault",)


ROWS = [
    # It ends, with the job in hand.
    Row("exits_0", LOST + r"exitcode 0 \(child"),
    Row(
        "exits_3",
        LOST + r"exitcode 3 \(child exits_3 pid \d+.*\)\. Last stderr lines: the last word",
        r"is replaced: .*; its job was exits_3\.it\[.*the last word",
    ),
    Row("segfaults", LOST + r"signal 11 \(SIGSEGV\) \("),
    Row("is_killed", LOST + r"signal 9 \(SIGKILL\), out of memory\? \("),
    Row("is_terminated", LOST + r"signal 15 \(SIGTERM\) \("),
    Row("half_a_reply_and_exit", LOST + "exitcode 0"),
    Row("reply_without_newline_and_exit", LOST + "exitcode 0"),
    Row("exits_with_a_grandchild_on_its_pipes", LOST + "exitcode 7"),
    # It ends after the job.
    Row("exits_after_its_reply", DONE, "is replaced: it (exited: exitcode 0|closed its stdout)"),
    Row("is_killed_while_idle", DONE, "is replaced: it (exited: signal 9|closed its stdout)"),
    Row("retires_and_exits", DONE),
    Row("leaves_a_grandchild_and_stays", DONE, settings={"max_jobs": 1}),
    # It closes something.
    Row("closes_stdout", LOST + r"signal 9 \(SIGKILL\) \(child .*; it closed its stdout\)"),
    Row("closes_stdin_and_goes_on", DONE),
    Row("closes_both_while_idle", DONE, "is replaced: it closed its std", {"stop_timeout": 0.5}),
    # It never answers.
    Row(
        "hangs",
        LIMIT,
        r"is replaced: its job took longer than 1 s \(hard time limit\); it has never answered:"
        " does it flush its stdout",
        SHORT,
    ),
    Row(
        "half_a_reply_and_silence",
        LIMIT,
        r"is replaced: .*; it has not ended its line with a newline: b'{\"id\":\"'",
        SHORT,
    ),
    Row("ignores_sigterm", LIMIT, settings=SHORT),
    Row("hangs_with_a_grandchild", LIMIT, settings=SHORT),
    Row("stops_itself", LIMIT, settings=SHORT),
    Row("answers_late_by_a_grandchild", LIMIT, settings=SHORT),
    # It answers what is no reply.
    Row("log_line_on_stdout", FAULT + r".*'INFO 17 jobs done'.*print everything else to stderr"),
    Row("empty_line", FAULT + r".*b''"),
    Row("not_json", FAULT),
    Row("array", FAULT + ".*array"),
    Row("number", FAULT + ".*int"),
    Row("null", FAULT + ".*null"),
    Row("unknown_status", FAULT + ".*'fine'"),
    Row("no_status", FAULT + ".*status"),
    Row("status_twice", FAULT + ".*bad"),
    Row("id_of_nobody", FAULT + "the reply's id is 'nobody', the request's '"),
    Row("id_is_a_number", FAULT + ".*id"),
    Row("ids_differ_in_one_reply", DONE),
    Row("deep_nesting", FAULT),
    Row("invalid_utf8", FAULT),
    Row("nul", FAULT),
    Row("nuls_between", FAULT + r".*\\x00"),
    Row("lone_surrogate", FAULT),
    Row("not_a_number", FAULT),
    Row("huge_number", FAULT),
    # Stray output is not to blame for these.
    Row("huge_result", FAULT + r"(?!.*to stderr).*up to about 1\.8e308"),
    Row("long_integer", FAULT + "(?!.*to stderr).*integers to 4300 digits"),
    Row("byte_order_mark", FAULT + r"(?!.*to stderr).*a byte order mark \(U\+FEFF\)"),
    Row("negative_countdown", FAULT + ".*countdown"),
    Row("line_too_long", FAULT + "a line longer than max_", settings={"max_message_bytes": 1024}),
    Row("line_without_end", FAULT + "a line longer than", settings={"max_message_bytes": 65536}),
    Row("escape_codes", FAULT + r".*\\x1b\[2J"),
    Row("two_replies", DONE, "is replaced: a reply for .*, which it had answered before"),
    # It speaks when nobody asked.
    Row(
        "second_reply_while_idle", DONE, "is replaced: a reply for .*, which it had answered before"
    ),
    Row("chats_while_idle", DONE, "is replaced: .*still here"),
    # At its boot.
    Row("exits_before_its_first_job", DONE, "is replaced: it (exited|closed)", {"size": 2}),
    Row("chats_before_its_first_job", DONE, "is replaced: .*Booted in 3 s", {"size": 2}),
    Row("says_ready_without_being_asked", DONE, "is replaced: .*ready", {"size": 2}),
    Row("closes_stdin_at_boot", DONE, settings={"size": 2}),
    Row("never_reads", DONE, "is replaced: it did not read", {**SHORT, "start_timeout": 1.5}),
    # What is no fault at all.
    Row("no_id", DONE),
    Row("unknown_fields", DONE),
    Row("crlf", DONE),
    Row("floods_stderr", DONE),
    Row(
        "control_characters_on_stderr",
        DONE,
        r"pid .*\] a\\x1b\[31m\\rb\\x85\[2026-01-01 00:00:00,000: C",
    ),
    Row("invalid_utf8_on_stderr", DONE),
    Row("twenty_megabytes_in", DONE, args=("ok", "done", "x" * 20_000_000)),
    Row("twenty_megabytes_out", "SUCCESS: y{20}", args=("size", 20_000_000)),
]
#: What the engine says of its own failures.
FAILED = re.compile(r"Serving the child|A callback of Celery's failed|\] \w+ failed\n")


def child(row: Row, directory: Path) -> dict[str, Any]:
    """The settings of a row's group."""
    faulty = str(CHILDREN / "faulty.py")
    return {
        "argv": [sys.executable, "-I", "-S", faulty, row.fault, str(directory)],
        "tasks": [f"{row.fault}.it"],
        "size": 1,
        "timeout": 60.0,
        "stop_timeout": 2.0,
        **row.settings,
    }


class Place(NamedTuple):
    """A worker with a group for each of some rows."""

    directory: Path
    project: Project
    worker: Worker

    def send(self, row: Row, *args: Any) -> Any:
        return self.project.app.send_task(f"{row.fault}.it", args)

    def everybody_is_there(self, row: Row) -> None:
        """Wait until the process table has the row's children and nothing else of them."""
        size = row.settings.get("size", 1)
        wait_for(
            lambda: len(processes_of(row, self.directory)) == size,
            f"{size} processes of {row.fault}",
        )
        # One that leaves something in its group is reaped last.
        wait_for(lambda: not self.zombies(), "the end of zombies")

    def zombies(self) -> list[int]:
        found = []
        for child in psutil.Process(self.worker.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
        return found


@contextmanager
def place_of(directory: Path, *rows: Row, **settings: Any) -> Iterator[Place]:
    """A worker for some rows."""
    children = {row.fault: {**child(row, directory), **settings} for row in rows}
    project = Project(directory, conf={"subproc_pool": {"children": children}})
    with project.worker(*POOL, "-c", "8") as worker:
        yield Place(directory, project, worker)


# Its name tells the other fixtures that its processes outlive a test.
@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_of(tmp_path_factory.mktemp("faults"), *ROWS) as place:
        yield place


def end_of(result: Any) -> str:
    """How a job ended, on one line."""
    try:
        value = result.get(timeout=DEADLINE, interval=0.02)
    except Exception as exc:
        return f"{result.state}: {type(exc).__name__}: {exc}".replace("\n", " ")
    return f"{result.state}: {value}"


def processes_of(row: Row, directory: Path) -> list[psutil.Process]:
    """All processes that a row's children are or have forked."""
    argv = child(row, directory)["argv"]
    return [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == argv]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_a_fault(shared_worker: Place, row: Row) -> None:
    worker = psutil.Process(shared_worker.worker.process.pid)
    before = worker.memory_info().rss
    end = end_of(shared_worker.send(row, *row.args))
    assert re.match(row.ends, end), end[:2000]
    said = rf"{row.fault}#\d+ .*{row.log}" if row.log else ""
    wait_for(lambda: re.search(said, shared_worker.worker.log), f"{said!r} in the log")
    # The next jobs get replies of their own.
    for word in (uuid.uuid4().hex, uuid.uuid4().hex):
        assert end_of(shared_worker.send(row, "ok", word)) == f"SUCCESS: {word}"
    shared_worker.everybody_is_there(row)
    if not row.fault.startswith("twenty"):
        assert worker.memory_info().rss < before + 60 * 2**20
    assert not FAILED.search(shared_worker.worker.log)


#: The same children, which may have more jobs than one.
MANY = {
    "handshake": True,
    "max_in_flight": 4,
    "env": {"READY": '{"status":"ready","protocol":1,"features":["multiplex"]}'},
}
#: With an id missing they are at fault; and at their boot they say something else.
NOT_MANY = ("no_id", "never_reads", "says_ready_without_being_asked", "closes_stdin_at_boot")


@pytest.fixture(scope="module")
def shared_worker_of_many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    rows = [row for row in ROWS if row.fault not in NOT_MANY]
    with place_of(tmp_path_factory.mktemp("many"), *rows, **MANY) as place:
        yield place


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.fault not in NOT_MANY], ids=lambda row: row.fault
)
def test_a_fault_of_a_child_with_many_jobs(shared_worker_of_many: Place, row: Row) -> None:
    place = shared_worker_of_many
    end = end_of(place.send(row, *row.args))
    assert re.match(row.ends.partition("the reply's id")[0], end), end[:2000]
    # Several at a time, each of which gets its own reply.
    words = [uuid.uuid4().hex for _ in range(4)]
    results = [place.send(row, "ok", word) for word in words]
    assert [end_of(result) for result in results] == [f"SUCCESS: {word}" for word in words]
    place.everybody_is_there(row)
    assert not FAILED.search(place.worker.log)


@pytest.mark.parametrize("size", [1, 5_000_000])
def test_a_child_that_reads_no_more(tmp_path: Path, size: int) -> None:
    """Whether its request fits into the pipe or not."""
    row = Row("reads_no_more", LIMIT, settings=SHORT)
    with place_of(tmp_path, row) as place:
        assert end_of(place.send(row, "fault")) == DONE
        assert re.match(LIMIT, end_of(place.send(row, "ok", "x" * size)))
        assert end_of(place.send(row, "ok", "again")) == "SUCCESS: again"
        place.everybody_is_there(row)


def test_a_child_that_always_crashes_backs_off_and_costs_nobody_else(tmp_path: Path) -> None:
    row, good = Row("exits_3", LOST), Row("no_id", DONE)
    with place_of(tmp_path, row, good) as place:
        for _ in range(5):
            assert re.match(LOST, end_of(place.send(row, "fault")))
            assert end_of(place.send(good, "ok", "fine")) == "SUCCESS: fine"
        delays = [float(each) for each in re.findall(r"starts in ([\d.]+) s", place.worker.log)]
        # At least a half of 0.1, 0.2, 0.4, 0.8 and 1.6 s each.
        assert len(delays) == 5
        assert sum(delays) >= 1.5
        assert end_of(place.send(row, "ok", "mended")) == "SUCCESS: mended"
        place.everybody_is_there(row)


# -- at the start: the worker says why it can't


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("never_ready", r"it was not ready within 0\.5 s \(start_timeout\)"),
        ("only_noise", r"it was not ready within 0\.5 s \(start_timeout\)"),
        ("another_protocol", "protocol"),
        ("fatal", "no database at db.example"),
        ("exits_at_boot", "it exited: exitcode 5"),
        ("replies_instead", r"it did not say that it is ready \(handshake\), but: .*\"ok\""),
    ],
)
def test_a_worker_whose_children_never_start(tmp_path: Path, fault: str, says: str) -> None:
    settings = {"handshake": True, "start_timeout": 0.5}
    children = {fault: child(Row(fault, "", settings=settings), tmp_path)}
    done = Project(tmp_path, conf={"subproc_pool": {"children": children}}).run(
        "worker", *POOL, "-c", "2"
    )
    assert done.returncode != 0
    assert re.search(rf"no child of the group {fault} came up: (?s:.*)({says})", done.stdout)
    assert " ready." not in done.stdout
    assert not processes_of(Row(fault, ""), tmp_path)


# -- at the end: nobody is left

STUBBORN = ("ignores_everything", "escapes", "is_stopped")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
def test_nobody_is_left_after_the_worker(tmp_path: Path, how: signal.Signals) -> None:
    rows = [Row(fault, DONE) for fault in STUBBORN]
    with place_of(tmp_path, *rows, stop_timeout=0.5) as place:
        for row in rows:
            assert end_of(place.send(row, "fault")) == DONE
        assert len([each for row in rows for each in processes_of(row, tmp_path)]) == 4
        place.worker.process.send_signal(how)
        place.worker.process.wait(DEADLINE)
        wait_for(lambda: not any(processes_of(row, tmp_path) for row in rows), "the end of all")
