"""The tasks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from celery import chord, shared_task
from celery.utils.log import get_task_logger
from django.db import connection, transaction
from django.db.models import Sum

from .models import Order

logger = get_task_logger(__name__)


class OutOfStock(Exception):
    """What was ordered is not there."""


@shared_task
def place(reference: str, total: Any = "1.00") -> int:
    """Create an order; return its key."""
    order = Order.objects.create(reference=reference, total=total)
    logger.info("placed %s", reference)
    return order.pk


@shared_task
def count() -> int:
    """Return how many orders there are."""
    return Order.objects.count()


@shared_task
def describe(reference: str) -> dict[str, Any]:
    """Return an order's columns, in types that JSON does not have."""
    order = Order.objects.get(reference=reference)
    totals = Order.objects.aggregate(Sum("total"))
    return {"total": order.total, "created": order.created, "sum": totals["total__sum"]}


@shared_task
def look() -> dict[str, Any]:
    """Return where the task runs, and whether it found its database connection closed."""
    fresh = connection.connection is None
    Order.objects.count()
    return {
        "pid": os.getpid(),
        "fresh": fresh,
        "open": connection.connection is not None,
        "cwd": os.getcwd(),
        "settings": os.environ.get("DJANGO_SETTINGS_MODULE"),
        "path": sys.path,
    }


@shared_task
def hold(begun: str, gate: str) -> int:
    """Use the database, and end when there is a file `gate`; return the process' id."""
    Order.objects.count()
    Path(begun).touch()
    while not Path(gate).exists():
        time.sleep(0.01)
    return os.getpid()


@shared_task
def lose_connection(how: str) -> int:
    """Break the database connection, as a restarted server would, and use it."""
    connection.ensure_connection()
    if how == "terminated":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    else:
        connection.connection.close()
    return Order.objects.count()


@shared_task
def find(reference: str) -> int:
    """Return an order's key; raise `Order.DoesNotExist` if there is none."""
    return Order.objects.get(reference=reference).pk


@shared_task
def sell_out(reference: str) -> None:
    """Raise an exception of the project's own, which holds a model's instance."""
    raise OutOfStock(Order.objects.get(reference=reference))


@shared_task(
    autoretry_for=(Order.DoesNotExist,), default_retry_delay=0.1, max_retries=200, bind=True
)
def confirm(self: Any, reference: str) -> bool:
    """Confirm an order, as soon as there is one; return whether that took a retry."""
    order = Order.objects.get(reference=reference)
    order.confirmed = True
    order.save()
    return bool(self.request.retries)


@shared_task
def place_and_confirm(reference: str, fail: bool = False) -> None:
    """Create an order, and confirm it in another task if the transaction is committed."""
    with transaction.atomic():
        Order.objects.create(reference=reference, total="2.50")
        confirm.delay_on_commit(reference)
        if fail:
            raise OutOfStock(reference)


@shared_task
def add_up(keys: list[int]) -> int:
    """Return how many keys there are."""
    return len(keys)


@shared_task
def place_many(references: list[str]) -> str:
    """Place orders in parallel, then count them; return the id of the count."""
    return chord(place.s(reference) for reference in references)(add_up.s()).id
