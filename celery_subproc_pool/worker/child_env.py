"""The scrubbed environment: which of the worker's variables external children do not get.

External children run other people's programs, and these don't need the broker. A program that has
the broker's password can send any task to any worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote, urlsplit

from celery import Celery

from ..settings import ENVIRONMENT_VARIABLE, ROOT

__all__ = ("withheld",)

logger = logging.getLogger("celery_subproc_pool")

#: The variables that give Celery its broker and result backend (celery/app/utils.py: `Settings`);
#: and the one with this pool's settings, which include the environment of other children.
OWN_VARIABLES = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
    ENVIRONMENT_VARIABLE,
)


def withheld(app: Celery, environ: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the variables that would let a child log in to the broker.

    They are `OWN_VARIABLES`, and all variables that hold the password of one of the app's broker
    URLs: as the whole value, or in an address (``:password@``).

    Arguments:
        app: the worker's app.
        environ: the worker's environment.
    """
    passwords = set(_passwords(app))
    names = frozenset(
        name
        for name, value in environ.items()
        if name in OWN_VARIABLES or any(_tells(value, password) for password in passwords)
    )
    if names:
        logger.info(
            "External children do not get these environment variables, which hold what the worker"
            " needs to reach its broker: %s. One that they need can be given in %s.children.<name>"
            ".env",
            ", ".join(sorted(names)),
            ROOT,
        )
    return names


def _tells(value: str, password: str) -> bool:
    return value == password or f":{password}@" in value


def _passwords(app: Celery) -> Iterator[str]:
    conf = app.conf
    if conf.broker_password and conf.broker_password != conf.broker_user:
        yield conf.broker_password
    for url in _urls((conf.broker_url, conf.broker_read_url, conf.broker_write_url)):
        try:
            parts = urlsplit(url)
        except ValueError:
            # kombu may understand it. Otherwise it says so later.
            continue
        # A password that is the user's name is no secret: `guest`.
        if parts.password and parts.password != parts.username:
            yield parts.password
            yield unquote(parts.password)


def _urls(settings: Iterable[object]) -> Iterator[str]:
    for setting in settings:
        if isinstance(setting, str):
            yield from setting.split(";")
        elif isinstance(setting, (list, tuple)):
            yield from _urls(setting)
