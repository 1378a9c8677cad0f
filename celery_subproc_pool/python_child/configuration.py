"""The worker's configuration on its way to a Python child: what importing the app may not bring.

Layer: below `launch` and `loading`; imports Celery. Both ends stand here, the worker's and the
child's, so that they agree. On prefork a process has the configuration that the worker had when it
forked, whoever has set it: the app's module, a launcher, a receiver of `celeryd_init`. No value of
a setting is ever put into the log: it may be a password.
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

#: Celery's own notes among an app's settings.
_NOTES = ("deprecated_settings",)

_BY_IDENTITY: Any = object.__eq__


def collect(app: Celery, homes: Iterable[str] = ()) -> SentSettings:
    """Return what the configuration of `app` has that is no default of Celery's.

    Arguments:
        app: the worker's app.
        homes: directories that are this interpreter's own: a setting that names one stays what it
            is in a child that has it.
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
    """Set in the configuration of `app`, a child's, what differs from the worker's.

    Returns:
        Why it does without a setting, by the name of each such.
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
        # What a module of settings imports for itself is none.
        if name not in _NOTES and not isinstance(value := conf[name], ModuleType):
            yield name, value


def _own_names(source: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the settings that stand in one source, Celery's and the project's own.

    Of an object such as Django's settings, which has a thousand others, only Celery's count: they
    are found by their names.
    """
    if isinstance(source, DictAttribute):
        source = vars(source.obj) if isinstance(source.obj, ModuleType) else {}
    for name in source:
        if isinstance(name, str) and not name.startswith("_"):
            yield name


def _is_same(own: Any, value: Any, data: bytes) -> bool:
    """Return whether a child's `own` value of a setting is the worker's, `value`, pickled `data`.

    Objects that compare by identity, a registry or a client of some service, are taken for the
    same: each interpreter has made its own.
    """
    if type(own) is type(value) and type(own).__eq__ is _BY_IDENTITY:
        return True
    try:
        return bool(own == value) or pickle.dumps(own, protocol=4) == data
    except Exception:
        return False


def _kind(value: Any) -> str:
    """Return what can be told of a value that can't be pickled, without showing it."""
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
