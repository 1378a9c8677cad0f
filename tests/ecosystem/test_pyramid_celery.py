"""`pyramid-celery` by the scenario of its README: ``worker --ini development.ini``."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from tests.support.basics import DEADLINE, require
from tests.support.worker import Project
from tests.support.workplace import BACKEND, BROKERS

pytestmark = [
    pytest.mark.ecosystem,
    # It needs `configparser.SafeConfigParser`.
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="pyramid-celery runs on no such Python"),
]

INI = """
[app:main]
use = call:shop:main
greeting = hello from %(place)s

[celery]
broker_url = {broker}
result_backend = {backend}
task_default_queue = {queue}
imports = shop.tasks
worker_hijack_root_logger = true

[celeryroute:greet]
queue = {queue}

[loggers]
keys = root
[handlers]
keys =
[formatters]
keys =
[logger_root]
level = INFO
handlers =
"""

APPLICATION = """
from pyramid.config import Configurator

def main(global_config, **settings):
    config = Configurator(settings=settings)
    config.include("pyramid_celery")
    config.configure_celery(global_config["__file__"])
    return config.make_wsgi_app()
"""

TASKS = """
from pyramid_celery import celery_app as app

@app.task(name="greet")
def greet(name):
    registry = app.conf["PYRAMID_REGISTRY"]
    return f"{registry.settings['greeting']}, {name}"

@app.task(name="greet_later")
def greet_later(name):
    return greet.delay(name).id
"""


class Pyramid(Project):
    """A Pyramid project, whose app is the package's."""

    def __init__(self, directory: Path) -> None:
        queue = f"csp-test-{uuid.uuid4().hex}"
        broker = BROKERS["redis"]
        super().__init__(directory, broker, BACKEND, {"task_default_queue": queue})
        (directory / "proj.py").unlink()
        (directory / "shop").mkdir()
        (directory / "shop" / "__init__.py").write_text(APPLICATION)
        (directory / "shop" / "tasks.py").write_text(TASKS)
        text = INI.format(broker=broker, backend=BACKEND, queue=queue)
        (directory / "development.ini").write_text(text)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "pyramid_celery.celery_app", *words]


@pytest.mark.parametrize("pool", ["prefork", "celery_subproc_pool:Pool"])
def test_tasks_see_the_registry_that_the_ini_file_made(tmp_path: Path, pool: str) -> None:
    require("redis")
    project = Pyramid(tmp_path)
    ini = ("--ini", "development.ini", "--ini-var", "place=here")
    with project.worker("-P", pool, "-c", "2", *ini, PYTHONPATH=str(tmp_path)):
        greeting = project.app.send_task("greet", ("you",)).get(timeout=DEADLINE)
        assert greeting == "hello from here, you"
        inner = project.app.send_task("greet_later", ("me",)).get(timeout=DEADLINE)
        assert project.app.AsyncResult(inner).get(timeout=DEADLINE) == "hello from here, me"
    project.app.close()
