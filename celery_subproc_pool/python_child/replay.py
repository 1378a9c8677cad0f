"""Repeats in a Python child what the worker did before prefork would fork: signals, bootsteps.

Prefork processes inherit what receivers of `celeryd_init` and similar signals have prepared, and
what the worker's bootsteps have. Both ends are here: what the worker notes, and what the child does
with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import click
from celery import Celery, signals
from celery.bootsteps import Step
from kombu.utils.imports import symbol_by_name

from .. import PACKAGE
from ..settings import BOOTSTEPS, REPLAYABLE
from ..wire.python import Prelude
from .compat import live_receivers

__all__ = ("Replay", "note", "unseen")

#: Packages whose receivers and bootsteps are not the project's.
_NOT_THE_PROJECTS = ("celery", "kombu", PACKAGE)

#: Options of `celery worker` that do not reach the worker.
_OF_THE_COMMAND = ("app", "gid", "hostname", "uid")

#: The types of a worker's attributes that can go into another process.
_PLAIN = (str, int, float, bool, type(None))


# -- the worker's end


def note(
    app: Celery,
    hostname: str,
    worker: Any,
    context: click.Context | None,
    chosen: Collection[str],
) -> Prelude:
    """Return what the children need to repeat what the worker has done.

    Arguments:
        app: the worker's app.
        hostname: the worker's node name.
        worker: Celery's worker, or None if it is not known.
        context: the context of the `celery worker` command, or None if there is none.
        chosen: what to repeat: values of `settings.REPLAYABLE`.
    """
    params: Mapping[str, Any] = {} if context is None else context.params
    preload = {option.name for option in app.user_options.get("preload", ())} & params.keys()
    given = {name: params[name] for name in params if name not in preload}
    options = {**getattr(worker, "options", {}), **given}
    return Prelude(
        order=[name for name in REPLAYABLE if name in chosen],
        receivers={name: sorted(_names(app, name, hostname, worker)) for name in chosen},
        preload=_pickled({name: params[name] for name in preload}),
        options=_pickled({key: options[key] for key in options if key not in _OF_THE_COMMAND}),
        step_options=_pickled(getattr(worker, "options", {})),
        worker=_pickled(_plain_attributes(worker)),
    )


def unseen(app: Celery, hostname: str, worker: Any, chosen: Collection[str]) -> list[str]:
    """Return the receivers and bootsteps that only the worker runs, each with its signal.

    Tasks do not see what these do.

    Arguments:
        app, hostname, worker: as for `note`.
        chosen: what children repeat: values of `settings.REPLAYABLE`.
    """
    return [
        f"{receiver} ({name})"
        for name in REPLAYABLE
        if name not in chosen
        for receiver in sorted(_names(app, name, hostname, worker))
    ]


def _names(app: Celery, name: str, hostname: str, worker: Any) -> set[str]:
    """Return the names of the project's receivers of the signal `name`, or of its bootsteps."""
    if name == BOOTSTEPS:
        found: Iterable[Any] = _steps(app)
    else:
        found = live_receivers(
            getattr(signals, name), worker if name == "worker_init" else hostname
        )
    return {_name(each) for each in found if _is_the_projects(each)}


def _steps(app: Celery) -> list[type[Step]]:
    found: list[type[Step]] = [symbol_by_name(step) for step in app.steps["worker"]]
    return sorted((step for step in found if _is_the_projects(step)), key=_name)


def _is_the_projects(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] not in _NOT_THE_PROJECTS


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    # Celery puts the module into the name of a bootstep.
    return f"{named.__module__}.{named.__qualname__.removeprefix(f'{named.__module__}.')}"


def _plain_attributes(worker: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = getattr(worker, "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) in _PLAIN}


def _pickled(values: Mapping[str, Any]) -> dict[str, bytes]:
    found = {}
    for name, value in values.items():
        try:
            found[name] = pickle.dumps(value, protocol=4)
        except Exception:
            # The option makes sense only in the worker.
            continue
    return found


# -- the child's end


class WorkerStandIn:
    """Takes the place of Celery's worker in a child. It has the worker's plain attributes.

    Arguments:
        app: the child's app.
        hostname: the worker's node name.
        facts: the worker's plain attributes.
    """

    def __init__(self, app: Celery, hostname: str, facts: Mapping[str, Any]) -> None:
        vars(self).update(facts)
        self.app = app
        self.hostname = hostname
        #: The bootsteps. They must live: Celery holds the receivers that they connect weakly.
        self.steps: list[Any] = []


class Replay:
    """Repeats in a child what its worker has done.

    Arguments:
        app: the child's app.
        hostname: the worker's node name.
        prelude: what `note` returned in the worker.
    """

    def __init__(self, app: Celery, hostname: str, prelude: Prelude) -> None:
        self._app = app
        self._hostname = hostname
        self._prelude = prelude
        self._worker = WorkerStandIn(app, hostname, dict(_unpickled(prelude.worker)))
        self._failures: list[str] = []
        self._do: dict[str, Callable[[], None]] = {
            "user_preload_options": self._preload,
            "celeryd_init": self._init,
            "worker_init": lambda: self._send("worker_init", self._worker),
            BOOTSTEPS: self._construct,
            "celeryd_after_setup": lambda: self._send(
                "celeryd_after_setup", hostname, instance=self._worker, conf=app.conf
            ),
        }

    def through(self, *names: str) -> None:
        """Repeat those of `names` that the settings chose, in the worker's order."""
        for name in self._prelude.order:
            if name in names:
                self._do[name]()

    def complaints(self) -> list[str]:
        """Return texts for the log about what tasks will not see. Call this last."""
        return [*self._failures, *self._absent()]

    def _preload(self) -> None:
        if self._prelude.preload:
            self._send(
                "user_preload_options",
                None,
                app=self._app,
                options=dict(_unpickled(self._prelude.preload)),
            )

    def _init(self) -> None:
        options = dict(_unpickled(self._prelude.options))
        self._send(
            "celeryd_init",
            self._hostname,
            instance=self._worker,
            conf=self._app.conf,
            options=options,
        )

    def _send(self, name: str, sender: Any, **arguments: Any) -> None:
        for receiver, answer in getattr(signals, name).send(sender=sender, **arguments):
            # Celery returns what a receiver raises. It also logs that, but logging is not set up.
            if isinstance(answer, Exception) and _is_the_projects(receiver):
                self._failures.append(
                    f"{_name(receiver)} ({name}) fails in the Python children: {answer!r}. Tasks do"
                    " not see what it does"
                )

    def _construct(self) -> None:
        """Construct the project's bootsteps. Don't call their `create` or `start`."""
        options = dict(_unpickled(self._prelude.step_options))
        for step in _steps(self._app):
            try:
                self._worker.steps.append(step(self._worker, **options))
            except Exception as exc:
                self._failures.append(
                    f"The bootstep {_name(step)} can't be constructed in the Python children:"
                    f" {exc!r}. Tasks do not see what it does"
                )

    def _absent(self) -> Iterator[str]:
        for name in self._prelude.order:
            there = _names(self._app, name, self._hostname, self._worker)
            for receiver in self._prelude.receivers.get(name, ()):
                if receiver not in there:
                    yield (
                        f"Loading the app in the Python children does not bring {receiver}"
                        f" ({name}), and tasks do not see what it does. Connect it at the top level"
                        " of a module that loading the app imports"
                    )


def _unpickled(values: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
    for name, data in values.items():
        try:
            yield name, pickle.loads(data)
        except Exception:
            # The child's interpreter lacks a class.
            continue
