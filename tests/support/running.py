"""A worker that runs, on the pool that `CSP_TEST_POOL` names: this one, or prefork."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support.basics import DEADLINE
from tests.support.worker import Project, Worker

POOL = os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool")

#: Marks tests that are about this pool only.
ours = pytest.mark.skipif("subproc" not in POOL, reason="about this pool only")


class Running:
    """A project with a worker that runs."""

    def __init__(self, project: Project, worker: Worker) -> None:
        self.project = project
        self.worker = worker

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.project.app.send_task(name, args, **options)

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        return get(self.send(name, *args, **options))


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)
