"""Asynchronous libraries, unmodified, in `async def` tasks: clients live as long as their child."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.basics import require
from tests.support.worker import Worker
from tests.support.workplace import BACKEND, Workplace, get

pytest.importorskip("httpx")
pytest.importorskip("aiohttp")
pytest.importorskip("structlog")
pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("no_garbage_collection")]

POSTGRESQL = "postgresql://postgres@127.0.0.1:5432/postgres"

CODE = """
import asyncio, contextlib
import aiohttp, asyncpg, httpx, structlog
import redis.asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
# At the top level of a module, where there is no event loop yet.
client = httpx.AsyncClient()
engine = create_async_engine({sqlalchemy!r}, pool_size=5)
store = redis.asyncio.from_url({redis!r})
opened = {{}}
@contextlib.asynccontextmanager
async def lifespan(app):
    async with (
        aiohttp.ClientSession() as opened["session"],
        asyncpg.create_pool({postgresql!r}, min_size=1, max_size=5) as opened["pool"],
    ):
        yield
    await engine.dispose()
@app.task(name="aio.httpx")
async def fetch_by_httpx(url):
    return (await client.get(url)).text
@app.task(name="aio.aiohttp")
async def fetch_by_aiohttp(url):
    async with opened["session"].get(url) as response:
        return await response.text()
@app.task(name="aio.asyncpg")
async def ask_by_asyncpg(number):
    async with opened["pool"].acquire() as connection, connection.transaction():
        return await connection.fetchval("select $1::int + 1 from pg_sleep(0.01)", number)
@app.task(name="aio.sqlalchemy")
async def ask_by_sqlalchemy(number):
    async with engine.connect() as connection:
        query = text("select cast(:number as int) + 1 from pg_sleep(0.01)")
        return await connection.scalar(query, {{"number": number}})
@app.task(name="aio.redis", bind=True)
async def count_by_redis(self, number):
    await store.set(self.request.id, number)
    await asyncio.sleep(0.01)
    return int(await store.getdel(self.request.id)) + 1
@app.task(name="aio.structlog", bind=True)
async def bind(self, word):
    seen = structlog.contextvars.get_contextvars()
    structlog.contextvars.bind_contextvars(word=word)
    await asyncio.sleep(0.01)
    inner = await asyncio.to_thread(structlog.contextvars.get_contextvars)
    return [seen, inner, structlog.contextvars.get_contextvars()]
"""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    #: All connect at a time.
    request_queue_size = 200


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), _Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def place_worker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workplace]:
    for server in ("rabbitmq", "redis", "postgresql"):
        require(server)
    uses_uvloop = request.param == "uvloop"
    if uses_uvloop:
        pytest.importorskip("uvloop")
    code = CODE.format(
        sqlalchemy=POSTGRESQL.replace("postgresql:", "postgresql+asyncpg:"),
        postgresql=POSTGRESQL,
        redis=BACKEND,
    )
    settings = {
        "asyncio": {"lifespan": "proj:lifespan", "uvloop": uses_uvloop},
        "python": {"size": 1},
    }
    directory = tmp_path_factory.mktemp(request.param)
    with closing(Workplace(directory, "rabbitmq", code, subproc_pool=settings)) as place:
        worker: Worker
        with place.project.worker("-P", "celery_subproc_pool:Pool", "-c", "50") as worker:
            yield place
            assert "holds up the event loop" not in worker.log


@pytest.mark.parametrize("library", ["httpx", "aiohttp"])
def test_many_requests_at_a_time(place_worker: Workplace, site: str, library: str) -> None:
    results = [
        place_worker.app.send_task(f"aio.{library}", [f"{site}/page/{number}"])
        for number in range(40)
    ]
    assert [get(result) for result in results] == [f"/page/{number}" for number in range(40)]


@pytest.mark.parametrize("library", ["asyncpg", "sqlalchemy", "redis"])
def test_many_queries_at_a_time(place_worker: Workplace, library: str) -> None:
    results = [place_worker.app.send_task(f"aio.{library}", [number]) for number in range(40)]
    assert [get(result) for result in results] == list(range(1, 41))


def test_what_a_task_binds_no_other_sees(place_worker: Workplace) -> None:
    results = {
        f"word {number}": place_worker.app.send_task("aio.structlog", [f"word {number}"])
        for number in range(50)
    }
    for word, result in results.items():
        assert get(result) == [{}, {"word": word}, {"word": word}]
