"""A Django project that was written for prefork, on this pool: nothing of it is changed.

With CSP_TEST_POOL=prefork the same tests tell how prefork does it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import timedelta
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from kombu import Connection, Queue
from kombu.utils.json import loads

from tests.support.basics import DEADLINE, python_child, require, wait_for
from tests.support.worker import Project, Worker
from tests.support.workplace import BROKERS

pytest.importorskip("django")
pytest.importorskip("django_celery_results")

POOL = os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool")

SITE = Path(__file__).parents[1] / "django_project"
POSTGRESQL = "postgresql://postgres@127.0.0.1:5432"

#: The columns that django-celery-results has for a task.
RESULT = "task_id, status, task_name, result, traceback, worker, task_args, task_kwargs"


class Database(Protocol):
    """A database of one test. The tests read it without Django, which stays out of pytest."""

    #: As the project's settings take it.
    url: str

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows."""

    def is_held_by(self, process: psutil.Process) -> bool:
        """Return whether a process has the database open."""

    def is_held(self, worker: Worker) -> bool:
        """Return whether anybody of a worker's has the database open."""


def family(worker: Worker) -> list[psutil.Process]:
    """Return the worker's process and all that descend from it."""
    process = psutil.Process(worker.process.pid)
    return [process, *process.children(recursive=True)]


class Sqlite:
    """A file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self.url = f"sqlite://{path}"

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path, timeout=DEADLINE)) as connection:
            return connection.execute(sql).fetchall()

    def is_held_by(self, process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return any(file.path == self._path for file in process.open_files())
        return False

    def is_held(self, worker: Worker) -> bool:
        return any(self.is_held_by(process) for process in family(worker))


class Postgresql:
    """A database of its own on the server."""

    def __init__(self) -> None:
        self.name = f"csp_test_{uuid.uuid4().hex}"
        self.url = f"{POSTGRESQL}/{self.name}"
        self._on_the_server(f"CREATE DATABASE {self.name}")

    def _on_the_server(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask from another database, so that no connection of ours is among those to this one."""
        import psycopg

        with psycopg.connect(f"{POSTGRESQL}/postgres", autocommit=True) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def _ports(self) -> set[int]:
        """Return the ports at the other end of all connections to this database."""
        rows = self._on_the_server(
            f"SELECT client_port FROM pg_stat_activity WHERE datname = '{self.name}'"
        )
        return {port for (port,) in rows}

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.url) as connection:
            return connection.execute(sql).fetchall()

    def is_held_by(self, process: psutil.Process) -> bool:
        ports = self._ports()
        with suppress(psutil.NoSuchProcess):
            return any(found.laddr.port in ports for found in process.net_connections("tcp"))
        return False

    def is_held(self, worker: Worker) -> bool:
        # The server's word: it knows of those, too, whose process is not found.
        return bool(self._ports())

    def drop(self) -> None:
        """Remove the database, with whoever is still connected."""
        self._on_the_server(f"DROP DATABASE {self.name} WITH (FORCE)")


class DjangoProject(Project):
    """The project of `tests/django_project`, in a directory of its own.

    Arguments:
        directory: where its files are copied to.
        database: where it keeps its rows, the results among them.
        broker: the broker's URL; the filesystem transport if None.
        conf: Celery's settings, added to those of the project.
    """

    def __init__(
        self,
        directory: Path,
        database: Database,
        broker: str | None = None,
        **conf: Any,
    ) -> None:
        self.database = database
        self._options: tuple[str, ...] = ()
        self._variables = {"SHOP_DATABASE_URL": database.url}
        directory.mkdir()
        # The tests read results from the database; their own app needs a backend only to send.
        super().__init__(directory, broker, "cache+memory://", conf=conf)
        self.migrate()

    def _write(self, code: str, broker: str, backend: str, conf: Mapping[str, Any]) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(SITE, self.directory, ignore=ignored, dirs_exist_ok=True)
        # The folders of the filesystem transport, as a user of it has to write them, too.
        settings = "".join(f"CELERY_{key.upper()} = {value!r}\n" for key, value in conf.items())
        self.append("shop/settings.py", settings)
        self._variables["SHOP_BROKER_URL"] = broker

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(**self._variables, **extra)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "shop", *self._options, *words]

    def move(self, directory: Path) -> Path:
        """Have all commands started in another directory; return where the files remain."""
        site, self.directory = self.directory, directory
        directory.mkdir()
        self._options = ("--workdir", str(site))
        return site

    def append(self, name: str, code: str) -> None:
        """Add Python to one of the project's files."""
        with (self.directory / name).open("a") as file:
            file.write(f"\n{code}")

    def migrate(self) -> None:
        """Create the tables."""
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "-v", "0"],
            cwd=self.directory,
            env=self.environment(DJANGO_SETTINGS_MODULE="shop.settings"),
            timeout=60,
            check=True,
        )

    def pool(self, concurrency: int = 1, **environ: str) -> Worker:
        """Return a worker with the pool under test, to be entered."""
        return self.worker("-P", POOL, "-c", str(concurrency), **environ)

    def send(self, name: str, *args: Any, **options: Any) -> str:
        """Send a task of `orders`; return its id."""
        task_id: str = self.app.send_task(f"orders.tasks.{name}", args, **options).id
        return task_id

    def results(self) -> dict[str, dict[str, Any]]:
        """Return what django-celery-results has stored, by the tasks' ids."""
        columns = RESULT.split(", ")
        rows = self.database.query(f"SELECT {RESULT} FROM django_celery_results_taskresult")
        return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}

    def end(self, task_id: str, *states: str) -> dict[str, Any]:
        """Return the row of a task's result, once the task has ended (or is in one of `states`)."""

        def row() -> dict[str, Any] | None:
            found = self.results().get(task_id)
            if found and found["status"] in (states or ("SUCCESS", "FAILURE", "REVOKED")):
                return found
            return None

        found: dict[str, Any] = wait_for(row, f"the result of {task_id}")
        return found

    def get(self, task_id: str) -> Any:
        """Return what a task has returned."""
        row = self.end(task_id)
        assert row["status"] == "SUCCESS", row
        return loads(row["result"])

    def do(self, name: str, *args: Any) -> Any:
        """Send a task; return what it returns."""
        return self.get(self.send(name, *args))

    def failure(self, name: str, *args: Any) -> dict[str, Any]:
        """Send a task that fails; return the row, the exception as a dict."""
        row = self.end(self.send(name, *args))
        assert row["status"] == "FAILURE", row
        return {**row, "result": json.loads(row["result"])}

    def references(self) -> list[str]:
        """Return the references of all orders."""
        rows = self.database.query("SELECT reference FROM orders_order ORDER BY reference")
        return [reference for (reference,) in rows]


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)],
)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        yield Sqlite(tmp_path / "shop.sqlite3")
        return
    require("postgresql")
    pytest.importorskip("psycopg")
    server = Postgresql()
    yield server
    server.drop()


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """Return a database for what has nothing to do with which one it is."""
    return Sqlite(tmp_path / "shop.sqlite3")


@pytest.fixture
def project(tmp_path: Path, database: Database) -> DjangoProject:
    return DjangoProject(tmp_path / "site", database)


def test_the_rows_of_tasks_and_of_their_results(project: DjangoProject) -> None:
    with project.pool() as worker:
        first = project.send("place", "A-1", kwargs={"total": "12.50"})
        assert project.get(first) == 1
        assert project.do("place", "A-2", "7.25") == 2
        assert project.do("count") == 2
        wait_for(lambda: f"Task orders.tasks.place[{first}] succeeded in" in worker.log, "the line")
        assert f"orders.tasks.place[{first}]: placed A-1" in worker.log
    row = project.results()[first]
    assert row["status"] == "SUCCESS"
    assert row["task_name"] == "orders.tasks.place"
    assert row["worker"] == project.node
    assert json.loads(row["task_args"]) == "('A-1',)"
    assert json.loads(row["task_kwargs"]) == "{'total': '12.50'}"
    assert row["traceback"] is None
    assert project.references() == ["A-1", "A-2"]


def test_results_of_types_that_json_has_not(project: DjangoProject) -> None:
    with project.pool():
        project.do("place", "A-1", "12.50")
        described = project.do("describe", "A-1")
    assert described["total"] == described["sum"] == Decimal("12.50")
    assert isinstance(described["total"], Decimal)
    assert described["created"].utcoffset() == timedelta(0)


def test_a_connection_is_opened_and_closed_by_each_task(
    project: DjangoProject, tmp_path: Path
) -> None:
    database = project.database
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with project.pool() as worker:
        this = psutil.Process(worker.process.pid)
        # The server may still be at the end of the connection that created the tables.
        wait_for(lambda: not database.is_held(worker), "the connection's end")
        for _ in range(3):
            seen = project.do("look")
            assert seen["pid"] != worker.process.pid
            assert seen["fresh"]
            assert seen["open"]
        # Celery stores the result before Django's connections are closed.
        wait_for(lambda: not database.is_held(worker), "the connection's end")
        held = project.send("hold", str(begun), str(gate))
        wait_for(begun.exists, "the task's begin")
        holders = [process.pid for process in family(worker) if database.is_held_by(process)]
        assert not database.is_held_by(this)
        gate.touch()
        assert holders == [project.get(held)]
        wait_for(lambda: not database.is_held(worker), "the connection's end")


def test_a_query_while_django_starts_leaves_no_connection(project: DjangoProject) -> None:
    # Discouraged, and done. The parent of forked children would share the connection with them.
    code = """
    def ready(self):
        from django.db import connection
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
"""
    project.append("orders/apps.py", code)
    database = project.database
    with project.pool() as worker:
        wait_for(lambda: not database.is_held(worker), "the connections' end")
        assert project.do("look")["fresh"]
        wait_for(lambda: not database.is_held(worker), "the connections' end")


@pytest.mark.parametrize("how", ["closed", "terminated"])
def test_a_lost_connection_is_the_next_tasks_no_concern(project: DjangoProject, how: str) -> None:
    if how == "terminated" and isinstance(project.database, Sqlite):
        pytest.skip("SQLite has no server that could end a connection")
    with project.pool() as worker:
        before = project.do("look")
        lost = project.failure("lose_connection", how)
        if how == "terminated":
            assert lost["result"]["exc_type"] == "OperationalError"
            assert "terminating connection" in lost["traceback"]
        else:
            assert "closed" in lost["traceback"]
        after = project.do("look")
        assert after["fresh"]
        assert after["pid"] == before["pid"]
        wait_for(lambda: not project.database.is_held(worker), "the connections' end")


def test_exceptions_of_models_and_of_the_database(project: DjangoProject) -> None:
    with project.pool() as worker:
        missing = project.failure("find", "A-1")
        assert missing["result"] == {
            "exc_type": "Order.DoesNotExist",
            "exc_message": ["Order matching query does not exist."],
            "exc_module": "orders.models",
        }
        assert missing["task_name"] == "orders.tasks.find"
        assert missing["traceback"].startswith("Traceback (most recent call last):\n")
        assert "Order.objects.get(reference=reference).pk" in missing["traceback"]
        task = f"Task orders.tasks.find[{missing['task_id']}] raised unexpected: DoesNotExist("
        wait_for(lambda: task in worker.log, "the line")

        project.do("place", "A-1")
        twice = project.failure("place", "A-1")
        assert twice["result"]["exc_type"] == "IntegrityError"
        assert twice["result"]["exc_module"] == "django.db.utils"
        # The database driver's, which Django's was raised from.
        assert "The above exception was the direct cause" in twice["traceback"]

        own = project.failure("sell_out", "A-1")
        assert own["result"]["exc_type"] == "OutOfStock"
        assert own["result"]["exc_module"] == "orders.tasks"
        # A model's instance is nothing for JSON: its `repr` is stored.
        assert "<Order: A-1>" in str(own["result"]["exc_message"])

        project.failure("place", "A-1", "no number")
        assert project.do("count") == 1


@pytest.mark.skipif(not find_spec("celery.contrib.django"), reason="new in Celery 5.4")
def test_a_task_is_sent_when_the_transaction_is_committed(project: DjangoProject) -> None:
    with project.pool():
        failed = project.failure("place_and_confirm", "A-1", True)
        assert failed["result"]["exc_type"] == "OutOfStock"
        project.do("place_and_confirm", "A-2")

        def confirmed() -> bool:
            rows = project.database.query("SELECT reference, confirmed FROM orders_order")
            return [(reference, bool(value)) for reference, value in rows] == [("A-2", True)]

        wait_for(confirmed, "the confirmation")
        wait_for(lambda: len(project.results()) == 3, "the result of the confirmation")
    names = sorted(row["task_name"] for row in project.results().values())
    # One task in one child: a task that was sent before A-2's would have been run before it.
    assert names == ["orders.tasks.confirm", *["orders.tasks.place_and_confirm"] * 2]


EXTERNAL = """
from celery_subproc_pool import SubprocTask

@shared_task(base=SubprocTask, name="billing.charge", child="billing")
def charge(steps): ...

@shared_task
def place_and_charge(reference, steps, begun, gate, fail):
    with transaction.atomic():
        Order.objects.create(reference=reference, total="2.50")
        charge.delay_on_commit(steps)
        Path(begun).touch()
        while not Path(gate).exists():
            time.sleep(0.01)
        if fail:
            raise OutOfStock(reference)
"""


def _logs(worker: Worker, line: str) -> bool:
    return line in worker.log


@pytest.mark.skipif(not find_spec("celery.contrib.django"), reason="new in Celery 5.4")
@pytest.mark.skipif(POOL == "prefork", reason="it has no external children")
def test_an_external_task_is_sent_when_the_transaction_is_committed(
    project: DjangoProject, tmp_path: Path
) -> None:
    project.append("orders/tasks.py", EXTERNAL)
    children = {"billing": {"argv": python_child("obeys"), "tasks": []}}
    project.append("shop/settings.py", f"CELERY_SUBPROC_POOL = {{'children': {children!r}}}")
    with project.pool(2) as worker:
        for reference, fail in (("A-1", True), ("A-2", False)):
            begun, gate = tmp_path / f"{reference} begun", tmp_path / f"{reference} gate"
            steps = [["reply", {"result": reference}]]
            sent = project.send("place_and_charge", reference, steps, str(begun), str(gate), fail)
            wait_for(begun.exists, "the transaction")
            # Whatever was sent before this one has come before it.
            count = f"orders.tasks.count[{project.send('count')}] received"
            wait_for(partial(_logs, worker, count), "another task")
            assert "Task billing.charge" not in worker.log
            gate.touch()
            assert project.end(sent)["status"] == ("FAILURE" if fail else "SUCCESS")
        wait_for(lambda: len(project.results()) == 5, "the result of the external task")
    [row] = [row for row in project.results().values() if row["task_name"] == "billing.charge"]
    assert (row["status"], json.loads(row["result"])) == ("SUCCESS", "A-2")
    assert project.references() == ["A-2"]


QUIET = """
from celery_subproc_pool import SubprocTask

@shared_task(base=SubprocTask, name="billing.note", child="billing", ignore_result=True)
def note(steps): ...
"""


@pytest.mark.skipif(POOL == "prefork", reason="it has no external children")
def test_djangos_own_receivers_need_no_tracer(project: DjangoProject) -> None:
    project.append("orders/tasks.py", QUIET)
    children = {"billing": {"argv": python_child("obeys"), "tasks": []}}
    project.append("shop/settings.py", f"CELERY_SUBPROC_POOL = {{'children': {children!r}}}")
    with project.pool() as worker:
        sent = project.app.send_task("billing.note", [[["reply", {"result": 1}]]]).id
        wait_for(partial(_logs, worker, f"Task billing.note[{sent}] succeeded"), "its end")
        assert not worker.tracers()


def test_retries(project: DjangoProject) -> None:
    with project.pool():
        confirm = project.send("confirm", "A-1")
        waiting = project.end(confirm, "RETRY")
        assert json.loads(waiting["result"])["exc_type"] == "Order.DoesNotExist"
        project.do("place", "A-1")
        assert project.get(confirm) is True
    assert [
        bool(value) for (value,) in project.database.query("SELECT confirmed FROM orders_order")
    ]


def test_chords(project: DjangoProject) -> None:
    # django-celery-results counts the parts of a chord in a table, and sends its body from a child.
    references = [f"A-{number}" for number in range(5)]
    with project.pool(2):
        assert project.get(project.do("place_many", references)) == 5
    assert project.references() == references
    assert project.database.query("SELECT * FROM django_celery_results_chordcounter") == []


def test_time_limits(tmp_path: Path, database: Database) -> None:
    # The worker stores this result, not the child. (Prefork's keeps the connection open for good,
    # which children that it forks inherit: so nothing is asked here about connections.)
    project = DjangoProject(tmp_path / "site", database, task_track_started=True)
    begun = tmp_path / "begun"
    with project.pool() as worker:
        before = project.do("look")["pid"]
        late = project.send("hold", str(begun), "/nowhere/at/all", time_limit=2)
        wait_for(begun.exists, "the task's begin")
        assert project.end(late, "STARTED", "FAILURE")["task_name"] == "orders.tasks.hold"
        row = project.end(late)
        assert row["status"] == "FAILURE"
        assert json.loads(row["result"])["exc_type"] == "TimeLimitExceeded"
        line = f"exceeded for orders.tasks.hold[{late}]"
        wait_for(lambda: line in worker.log, "the line")
        assert project.do("look")["pid"] != before


def test_a_worker_that_is_started_elsewhere(tmp_path: Path, sqlite: Database) -> None:
    project = DjangoProject(tmp_path / "site", sqlite)
    site = project.move(tmp_path / "elsewhere")
    with project.pool() as worker:
        assert psutil.Process(worker.process.pid).cwd() == str(site)
        seen = project.do("look")
    # Nothing of it is in the environment that the worker was started with.
    assert seen["settings"] == "shop.settings"
    assert seen["cwd"] == str(site)
    assert str(site) in seen["path"]


#: A system check that leaves a mark wherever it runs.
CHECK = """
import os
from django.core import checks
@checks.register()
def stock(**_):
    with open(os.environ["SHOP_CHECKS"], "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    {does}
"""


def test_checks_are_run_and_an_error_among_them_stops_nobody(
    tmp_path: Path, sqlite: Database
) -> None:
    # Celery runs the checks, and does not look at what they return.
    code = CHECK.format(does="return [checks.Error('no stock')]")
    project = DjangoProject(tmp_path / "site", sqlite)
    project.append("orders/models.py", code)
    runs = tmp_path / "runs"
    with project.pool(SHOP_CHECKS=str(runs)) as worker:
        assert project.do("count") == 0
        assert "no stock" not in worker.log
        assert str(worker.process.pid) in runs.read_text().split()


def test_a_check_that_raises_stops_the_worker_unless_checks_are_skipped(
    tmp_path: Path, sqlite: Database
) -> None:
    code = CHECK.format(does="raise RuntimeError('no shop')")
    project = DjangoProject(tmp_path / "site", sqlite)
    project.append("orders/models.py", code)
    runs = str(tmp_path / "runs")
    done = project.run("worker", "-P", POOL, "-c", "1", SHOP_CHECKS=runs)
    assert done.returncode == 1
    assert "RuntimeError: no shop" in done.stdout
    with project.pool(SHOP_CHECKS=runs, CELERY_SKIP_CHECKS="1"):
        assert project.do("count") == 0


def test_an_app_that_cannot_be_loaded_stops_the_worker(tmp_path: Path, sqlite: Database) -> None:
    project = DjangoProject(tmp_path / "site", sqlite)
    project.append("shop/settings.py", "INSTALLED_APPS += ['nowhere']\n")
    done = project.run("worker", "-P", POOL, "-c", "1")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'nowhere'" in done.stdout


def test_orders_on_a_broker(tmp_path: Path, sqlite: Database, broker: str) -> None:
    queue, url = f"csp-test-{uuid.uuid4().hex}", BROKERS[broker]
    project = DjangoProject(tmp_path / "site", sqlite, url, task_default_queue=queue)
    references = [f"A-{number:03}" for number in range(100)]
    try:
        with project.pool(2) as worker:
            sent = [project.send("place", reference) for reference in references]
            assert sorted(project.get(task_id) for task_id in sent) == list(range(1, 101))
            wait_for(lambda: not sqlite.is_held(worker), "the connections' end")
    finally:
        with Connection(url) as connection:
            Queue(queue, channel=connection.default_channel).delete()
        project.app.close()
    assert project.references() == references
