"""A Django project that knows nothing of the pool: written as Celery's documentation says."""

from .celery import app as celery_app

__all__ = ("celery_app",)
