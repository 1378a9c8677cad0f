"""`django-structlog` as its documentation sets it up with Celery: a bootstep of the worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import wait_for
from tests.support.worker import Project

pytestmark = pytest.mark.ecosystem

SETTINGS = """
SECRET_KEY = "secret"
USE_TZ = True
INSTALLED_APPS = ["django_structlog"]
DJANGO_STRUCTLOG_CELERY_ENABLED = True
"""

#: https://django-structlog.readthedocs.io/en/latest/celery.html
CODE = """
import logging.config, os
import django, structlog
from celery.signals import setup_logging
from django_structlog.celery.steps import DjangoStructLogInitStep

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "demo_settings")
django.setup()
app.steps["worker"].add(DjangoStructLogInitStep)

@setup_logging.connect
def receiver_setup_logging(loglevel, logfile, format, colorize, **kwargs):
    logging.config.dictConfig({
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processor": structlog.processors.JSONRenderer(),
            },
        },
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["console"], "level": "INFO"},
    })
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )

@app.task(name="charge")
def charge(amount):
    structlog.get_logger("shop").info("charging", amount=amount)
    return amount
"""

#: What a view does in a request that has an id.
SENDER = """
import structlog
from proj import charge
structlog.contextvars.bind_contextvars(request_id="request-7")
print(charge.delay(5).id)
"""


@pytest.mark.parametrize("pool", ["prefork", "celery_subproc_pool:Pool"])
def test_the_log_of_a_task_has_the_context_of_who_sent_it(tmp_path: Path, pool: str) -> None:
    (tmp_path / "demo_settings.py").write_text(SETTINGS)
    project = Project(tmp_path, code=CODE)
    with project.worker("-P", pool, "-c", "1") as worker:
        done = subprocess.run(
            [sys.executable, "-c", SENDER],
            cwd=tmp_path,
            env=project.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        task = done.stdout.split()[-1]
        wait_for(lambda: "task_succeeded" in worker.log, "the end of the task")
        context = {"task_id": task, "request_id": "request-7"}
        assert [pick(record, "event", *context) for record in records(worker.log, "shop")] == [
            {"event": "charging", **context}
        ]
        theirs = records(worker.log, "django_structlog.celery.receivers")
        assert [pick(record, "event", *context) for record in theirs] == [
            {"event": "task_started", **context},
            {"event": "task_succeeded", **context},
        ]


def records(log: str, logger: str) -> list[dict[str, Any]]:
    """Return what one logger has written in the worker or its processes."""
    found = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [record for record in found if record.get("logger") == logger]


def pick(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: record.get(name) for name in names}
