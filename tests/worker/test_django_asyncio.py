"""`async def` tasks in a Django project: the async ORM, `sync_to_async`, django-celery-results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.basics import require, wait_for

pytest.importorskip("django")
pytest.importorskip("django_celery_results")

from tests.worker.test_django import DjangoProject, Postgresql, Sqlite

TASKS = """
import asyncio
from asgiref.sync import sync_to_async
@shared_task(bind=True)
async def aplace(self, reference, total="1.00"):
    order = await Order.objects.acreate(reference=reference, total=total)
    found = await Order.objects.aget(pk=order.pk)
    def change():
        with transaction.atomic():
            locked = Order.objects.get(pk=order.pk)
            locked.confirmed = True
            locked.save()
        return self.request.id
    seen = await sync_to_async(change)()
    return [found.reference, seen == self.request.id]
@shared_task
async def areferences():
    return sorted([order.reference async for order in Order.objects.filter(confirmed=True)])
@shared_task
async def afails():
    await Order.objects.acount()
    raise OutOfStock("none left")
@shared_task
async def aopen():
    return await sync_to_async(lambda: connection.connection is not None)()
"""


def project_with(directory: Path, database: Sqlite | Postgresql) -> DjangoProject:
    project = DjangoProject(directory / "site", database)
    project.append("orders/tasks.py", TASKS)
    return project


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sqlite | Postgresql]:
    if request.param == "sqlite":
        yield Sqlite(tmp_path / "shop.sqlite3")
        return
    require("postgresql")
    pytest.importorskip("psycopg")
    server = Postgresql()
    yield server
    server.drop()


def test_many_coroutines_use_the_orm_at_a_time(
    tmp_path: Path, database: Sqlite | Postgresql
) -> None:
    project = project_with(tmp_path, database)
    with project.pool() as worker:
        sent = {f"A-{number}": project.send("aplace", f"A-{number}") for number in range(20)}
        for reference, task_id in sent.items():
            assert project.get(task_id) == [reference, True]
        assert project.do("areferences") == sorted(sent)
        failed = project.send("afails")
        wait_for(lambda: failed in project.results(), "the failure to be stored")
        assert "SynchronousOnlyOperation" not in worker.log
    assert {project.results()[task_id]["status"] for task_id in sent.values()} == {"SUCCESS"}
    row = project.results()[failed]
    assert row["status"] == "FAILURE"
    assert "none left" in row["traceback"]


@pytest.mark.postgresql
def test_a_connection_that_the_server_has_closed_is_replaced(tmp_path: Path) -> None:
    require("postgresql")
    pytest.importorskip("psycopg")
    database = Postgresql()
    project = project_with(tmp_path, database)
    with project.pool():
        assert project.do("aplace", "A-1") == ["A-1", True]
        database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        # One task may find the connection broken. Those after it must not.
        first = project.send("aplace", "A-2")
        wait_for(lambda: first in project.results(), "the task to end")
        assert project.do("aplace", "A-3") == ["A-3", True]
    database.drop()
