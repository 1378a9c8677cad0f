"""What a Django project of middle size imports."""

from __future__ import annotations

import importlib

__all__ = ("set_up",)

#: Beside Django: what such projects use.
MODULES = (
    "sqlalchemy.orm",
    "sqlalchemy.dialects.postgresql",
    "pydantic",
    "django.contrib.admin.sites",
)

APPS = ("admin", "auth", "contenttypes", "sessions", "messages", "staticfiles", "sitemaps")


def set_up() -> None:
    """Load Django with its own apps, and the other packages."""
    import django
    from django.conf import settings

    settings.configure(
        INSTALLED_APPS=[f"django.contrib.{name}" for name in APPS],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        ROOT_URLCONF="django.contrib.auth.urls",
        USE_TZ=True,
    )
    django.setup()
    for name in MODULES:
        importlib.import_module(name)
