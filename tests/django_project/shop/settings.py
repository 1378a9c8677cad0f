"""The project's settings. Two come from the environment: the database's and the broker's URL."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit


def database(url: str) -> dict[str, Any]:
    """Return Django's settings for `sqlite:///PATH` or `postgresql://USER@HOST:PORT/NAME`."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        # Tasks that write at the same time wait for each other, instead of failing.
        options = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": parts.path,
            "OPTIONS": options,
        }
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.lstrip("/"),
        "USER": parts.username,
        "HOST": parts.hostname,
        "PORT": parts.port,
    }


SECRET_KEY = "not secret"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django_celery_results",
    "orders",
]
DATABASES = {"default": database(os.environ["SHOP_DATABASE_URL"])}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "Australia/Tasmania"
USE_TZ = True

CELERY_BROKER_URL = os.environ.get("SHOP_BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
CELERY_TIMEZONE = TIME_ZONE
