"""Takes the worker's configuration to a Python child.

A prefork process has the configuration that the worker had at the fork, whatever has set it: the
app's module, a launcher, a receiver of `celeryd_init`. Importing the app brings only a part of it.

Both ends are here, the worker's and the child's, so that they agree. Never put the value of a
setting into the log: it may be a password.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from celery import Celery
from celery.utils.collections import DictAttribute

from ..wire.python import SentSettings

__all__ = ("collect", "take_over")

#: What Celery keeps among an app's settings though it is none.
_NO_SETTINGS = ("deprecated_settings",)

_BY_IDENTITY: Any = object.__eq__


def collect(app: Celery, homes: Iterable[str] = ()) -> SentSettings:
    """Return the settings of `app` that are not defaults of Celery's.

    Arguments:
        app: the worker's app.
        homes: directories of this interpreter. A child that has a setting keeps its own value if
            the worker's value names one of them.
    """
    places = [home.encode() for home in homes]
    values: dict[str, bytes] = {}
    unsendable: dict[str, str] = {}
    for name, value in _settings(app):
        try:
            values[name] = pickle.dumps(value, protocol=4)
        except Exception:
            unsendable[name] = _kind(value)
    at_home = [name for name, data in values.items() if any(place in data for place in places)]
    return SentSettings(values=values, unsendable=unsendable, at_home=at_home)


def take_over(app: Celery, sent: SentSettings) -> dict[str, str]:
    """Give `app`, a child's app, the settings that differ from the worker's.

    Returns:
        The reason for each setting that the child lacks, by the setting's name.
    """
    conf = app.conf
    lacking: dict[str, str] = {}
    for name, data in sent.values.items():
        if name in sent.at_home and conf.value_set_for(name):
            continue
        try:
            value = pickle.loads(data)
        except Exception as exc:
            if not conf.value_set_for(name):
                lacking[name] = f"its value can't be unpickled here: {type(exc).__name__}"
            continue
        if name not in conf or not _is_same(conf[name], value, data):
            conf[name] = value
    for name, kind in sent.unsendable.items():
        if not conf.value_set_for(name) or _kind(conf[name]) != kind:
            lacking[name] = f"its value can't be pickled: {kind}"
    return lacking


def _settings(app: Celery) -> Iterator[tuple[str, Any]]:
    conf = app.conf
    *given, defaults = conf.maps
    names = {name for name in defaults if conf.value_set_for(name)}
    names.update(*map(_own_names, given))
    for name in sorted(names):
        # A module of settings may import other modules. They are no settings.
        if name not in _NO_SETTINGS and not isinstance(value := conf[name], ModuleType):
            yield name, value


def _own_names(source: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the names of the settings in one source, both Celery's and the project's own.

    Yield nothing for an object such as Django's settings: most of its thousand names are not for
    Celery. `_settings` looks up Celery's by their names.
    """
    if isinstance(source, DictAttribute):
        source = vars(source.obj) if isinstance(source.obj, ModuleType) else {}
    for name in source:
        if isinstance(name, str) and not name.startswith("_"):
            yield name


def _is_same(own: Any, value: Any, data: bytes) -> bool:
    """Return whether the child's `own` value of a setting equals the worker's.

    Objects that compare by identity, for example a client of some service, count as equal if they
    have the same type: each interpreter has made its own.

    Arguments:
        own: the child's value.
        value: the worker's value.
        data: the worker's value, pickled.
    """
    if type(own) is type(value) and type(own).__eq__ is _BY_IDENTITY:
        return True
    try:
        return bool(own == value) or pickle.dumps(own, protocol=4) == data
    except Exception:
        return False


def _kind(value: Any) -> str:
    """Return the name of a function or class, or of the type of any other value."""
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
