"""Measures the pool alone, without a worker around it.

Use: ``python -m benchmarks.alone SETUP SIZE COUNT``. It prints the microseconds of CPU that this
process took for a job. Celery's requests reach the pool as from Celery's consumer. They are made
before the clock starts, and their callbacks only count. A loop of kombu's runs the engine.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from typing import Any

from celery import Celery
from celery.worker.request import Request
from kombu.asynchronous import Hub
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.message import Message
from kombu.serialization import dumps

from celery_subproc_pool.worker.pool import Pool

from .setups import SETUPS, VARIABLE

#: Jobs before the clock starts. Children boot during the first ones.
WARM_UP = 200


class Counted(Request):  # type: ignore[misc]
    """A request that only counts its successes."""

    done = 0

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Do nothing."""

    def on_success(self, failed__retval__runtime: Any, **_: Any) -> None:
        """Count the job."""
        Counted.done += 1

    def on_failure(self, exc_info: Any, **_: Any) -> None:
        """Exit: no job may fail."""
        sys.exit(f"a job failed: {exc_info}")


def _request(app: Celery, name: str) -> Request:
    made = app.amqp.as_task_v2(uuid.uuid4().hex, name, (), {}, ignore_result=True)
    content_type, encoding, body = dumps(made.body, "json")
    message = Message(
        body=body,
        content_type=content_type,
        content_encoding=encoding,
        headers=made.headers,
        properties={**made.properties, "application_headers": made.headers},
        delivery_info={"exchange": "", "routing_key": "queue", "redelivered": False},
        accept={content_type},
    )
    return Counted(message, app=app, hostname="alone@localhost", task=app.tasks[name])


def _run(pool: Pool, semaphore: LaxBoundedSemaphore, loop: Any, requests: list[Request]) -> float:
    """Run `requests`, and return the CPU seconds that this process took."""
    end = Counted.done + len(requests)
    before = time.process_time()
    for request in requests:
        # As in the consumer, a request without a free slot waits in the semaphore.
        semaphore.acquire(request.execute_using_pool, pool)
    while Counted.done < end:
        next(loop)
    return time.process_time() - before


def main(setup: str, size: int, count: int) -> float:
    """Return the microseconds of CPU that a job costs the pool.

    Arguments:
        setup: the name of a setup in `setups` that has our pool.
        size: the number of children.
        count: the number of jobs.
    """
    chosen = SETUPS[setup]
    settings = {
        "conf": {"broker_url": "memory://", **chosen.conf},
        "signals": chosen.signals,
    }
    os.environ[VARIABLE] = json.dumps(settings)
    from .app import app

    name = "noop" if setup == "python" else "echo"
    app.finalize()
    semaphore = LaxBoundedSemaphore(size)
    options = {"threads": False, "putlocks": False, "semaphore": semaphore}
    pool = Pool(size, app=app, initargs=(app, "alone@localhost"), **options)
    pool.start()
    try:
        hub = Hub()
        pool.register_with_event_loop(hub)
        loop = hub.create_loop()
        _run(pool, semaphore, loop, [_request(app, name) for _ in range(WARM_UP)])
        requests = [_request(app, name) for _ in range(count)]
        return _run(pool, semaphore, loop, requests) / count * 1e6
    finally:
        pool.terminate()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
