"""Checks the pool's settings strictly, and makes the structures of `settings` of them.

The structures check the types. A function `_check_...` here checks what a type can't express;
`_child` and `_python` call them. Every error is one line with the setting's path, what was expected
and what came.

Must not import Celery. The caller passes the mapping that Celery's configuration holds, and the
environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .errors import ConfigError
from .settings import (
    ASYNCIO,
    ENVIRONMENT_VARIABLE,
    LEFTOVERS_CHOICES,
    PYTHON,
    REPLAYABLE,
    ROOT,
    START_CHOICES,
    STDERR_CHOICES,
    TRACERS,
    AsyncioSettings,
    ChildSettings,
    CommonSettings,
    PoolSettings,
    PythonSettings,
    TracerSettings,
    split_words,
)

__all__ = ("load",)

#: The name of the one group in the short form ``{"argv": [...]}``.
_ONLY_GROUP = "default"

#: What the setting may hold, unless it is the short form for one kind of child.
_MAPPINGS = ("children", "python", "asyncio", "tracers")

#: Whose the names are that no group of external children may have.
_RESERVED = {
    PYTHON: "the Python children, which have",
    ASYNCIO: "the asyncio children, which have",
    TRACERS: "the tracers, which have",
}

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


def load(setting: Any, environ: Mapping[str, str] = os.environ) -> PoolSettings:
    """Check the settings.

    Arguments:
        setting: the value of ``app.conf.subproc_pool``: a mapping, or None.
        environ: the environment. Its ``CELERY_SUBPROC_POOL`` replaces `setting`; its ``PATH`` is
            searched for programs.

    Returns:
        The settings. Every program in them exists.

    Raises:
        ConfigError: a setting is wrong. The one line names its path, what was expected and what
            came.
    """
    path = ROOT
    if environ.get(ENVIRONMENT_VARIABLE):
        path = f"{ROOT} (from the environment variable {ENVIRONMENT_VARIABLE})"
        setting = _decoded(path, environ[ENVIRONMENT_VARIABLE])
    if setting is None:
        setting = {}
    if not isinstance(setting, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {setting!r}")
    if "argv" in setting:
        _check_short_form(path, setting)
        return PoolSettings(children={_ONLY_GROUP: _child(path, setting, environ)})
    _check_names(path, setting)
    return PoolSettings(
        children=_children(path, setting.get("children", {}), environ),
        python=_python(f"{path}.python", setting.get("python", {}), environ),
        asyncio=_asyncio(f"{path}.asyncio", setting.get("asyncio", {}), environ),
        tracers=_tracers(f"{path}.tracers", setting.get("tracers", {})),
    )


def _decoded(path: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
        raise ConfigError(f"{path}: expected JSON: {exc}") from None


def _children(path: str, groups: Any, environ: Mapping[str, str]) -> dict[str, ChildSettings]:
    if not isinstance(groups, Mapping):
        raise ConfigError(
            f"{path}.children: expected a mapping from a name to the settings of a kind of"
            f" child, got {groups!r}"
        )
    children: dict[str, ChildSettings] = {}
    for name, value in groups.items():
        _check_group_name(path, name)
        children[name] = _child(f"{path}.children.{name}", value, environ)
    return children


def _child(path: str, value: Any, environ: Mapping[str, str]) -> ChildSettings:
    child = _converted(path, value, ChildSettings)
    _check_common(path, child)
    _check_argv(path, child, environ)
    _check_max_in_flight(path, child)
    _check_signal(path, child)
    return child


def _python(path: str, value: Any, environ: Mapping[str, str]) -> PythonSettings:
    python = _converted(path, value, PythonSettings)
    _check_common(path, python)
    _check_interpreter(path, python, environ)
    _check_start(path, python)
    _check_replay(path, python)
    return python


def _asyncio(path: str, value: Any, environ: Mapping[str, str]) -> AsyncioSettings:
    settings = _converted(path, value, AsyncioSettings)
    _check_common(path, settings)
    _check_interpreter(path, settings, environ)
    _check_start(path, settings)
    _check_replay(path, settings)
    _check_lifespan(path, settings)
    _check_uvloop(path, settings)
    return settings


def _tracers(path: str, value: Any) -> TracerSettings:
    tracers = _converted(path, value, TracerSettings)
    _check_common(path, tracers)
    return tracers


# -- names


def _check_short_form(path: str, setting: Mapping[str, Any]) -> None:
    both = [key for key in _MAPPINGS if key in setting]
    if both:
        raise ConfigError(
            f"{path}: expected either 'argv', for one kind of child, or 'children',"
            f" 'python', 'asyncio' and 'tracers', got 'argv' and {both[0]!r}: put 'argv' into"
            f" {path}.children.<name>"
        )


def _check_names(path: str, setting: Mapping[Any, Any]) -> None:
    for key in setting:
        if key not in _MAPPINGS:
            raise ConfigError(
                f"{path}.{_step(key)}: no such setting; expected 'children', 'python',"
                " 'asyncio' and 'tracers', or 'argv' and the other settings of one kind of child"
            )


def _check_group_name(path: str, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"{path}.children: expected names of letters, digits, '_' and '-', got {name!r}"
        )
    if name in _RESERVED:
        raise ConfigError(
            f"{path}.children.{name}: this name belongs to {_RESERVED[name]} their settings at"
            f" {path}.{name}; take another one"
        )


def _step(name: object) -> str:
    """Return `name` as one step of a path, on one line."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else repr(name)


# -- types


def _converted(path: str, value: Any, kind: type[_Settings]) -> _Settings:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(_explain(path, value, kind, str(exc))) from None


def _explain(path: str, value: Any, kind: type[msgspec.Struct], error: str) -> str:
    """Return msgspec's "Expected `float`, got `str` - at `$.timeout`" with our path and value."""
    text, _, where = error.partition(" - at ")
    unknown = re.search(r"unknown field `(.*)`", text, re.DOTALL)
    if unknown:
        known = ", ".join(kind.__struct_fields__)
        return f"{path}.{_step(unknown[1])}: no such setting; the settings are {known}"
    if where.startswith("`key` in"):
        text += " for a name"
    # "`$.env[...]`" or "`key` in `$.env`"
    where = where.rpartition("$")[2].strip("`")
    text = text[:1].lower() + text[1:]
    found: Any = value
    for step in re.findall(r"\w+", where):
        found = found[int(step) if step.isdigit() else step]
    return f"{path}{where}: {text}, in {found!r}" if where else f"{path}: {text}"


# -- what types can't express


def _check_common(path: str, settings: CommonSettings) -> None:
    _check_environment(path, settings.env)
    _check_directory(path, settings.cwd)
    _check_choice(f"{path}.stderr", settings.stderr, STDERR_CHOICES)
    _check_choice(f"{path}.leftovers", settings.leftovers, LEFTOVERS_CHOICES)


def _check_argv(path: str, child: ChildSettings, environ: Mapping[str, str]) -> None:
    command = _split(f"{path}.argv", child.argv)
    if not command or not command[0]:
        raise ConfigError(f"{path}.argv: expected a program and its arguments, got {child.argv!r}")
    _check_program(f"{path}.argv", command[0], child, environ)


def _check_max_in_flight(path: str, child: ChildSettings) -> None:
    if child.max_in_flight > 1 and not child.handshake:
        raise ConfigError(
            f"{path}.max_in_flight: expected 1 where handshake is not set, got"
            f" {child.max_in_flight}; only a child that announces 'multiplex' in its handshake can"
            " have several jobs at a time"
        )


def _check_signal(path: str, child: ChildSettings) -> None:
    name = child.soft_timeout_signal
    if name is not None and name not in signal.Signals.__members__:
        raise ConfigError(
            f"{path}.soft_timeout_signal: expected a signal's name such as 'SIGUSR1', got {name!r}"
        )


def _check_interpreter(path: str, python: PythonSettings, environ: Mapping[str, str]) -> None:
    wrapper = _split(f"{path}.wrapper", python.wrapper)
    if wrapper:
        _check_program(f"{path}.wrapper", wrapper[0], python, environ)
    if python.executable is not None:
        _check_program(f"{path}.executable", python.executable, python, environ)


def _check_start(path: str, python: PythonSettings) -> None:
    _check_choice(f"{path}.start", python.start, START_CHOICES)
    if python.start == "fork" and python.wrapper:
        raise ConfigError(
            f"{path}.start: expected 'spawn' where wrapper is set, got 'fork': the wrapper would"
            " wrap the process that forks the children, and not each child"
        )


def _check_replay(path: str, python: PythonSettings) -> None:
    for number, name in enumerate(python.replay):
        _check_choice(f"{path}.replay[{number}]", name, REPLAYABLE)


def _check_lifespan(path: str, settings: AsyncioSettings) -> None:
    name = settings.lifespan
    if name is not None and not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise ConfigError(f"{path}.lifespan: expected 'module:name', got {name!r}")


def _check_uvloop(path: str, settings: AsyncioSettings) -> None:
    # Whether another interpreter has it, its children say at their start.
    own = settings.executable is None
    if settings.uvloop and own and importlib.util.find_spec("uvloop") is None:
        raise ConfigError(f"{path}.uvloop: expected that uvloop is installed, it is not")


def _check_choice(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{path}: expected one of {', '.join(choices)}, got {value!r}")


def _check_environment(path: str, env: Mapping[str, str]) -> None:
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(
                f"{path}.env: expected names without '=', and no NUL, got {name!r}: {value!r}"
            )


def _check_directory(path: str, cwd: str | None) -> None:
    if cwd is not None and not os.path.isdir(cwd):
        raise ConfigError(f"{path}.cwd: expected a directory, got {cwd!r}")
    if cwd is not None and not os.access(cwd, os.R_OK | os.X_OK):
        raise ConfigError(f"{path}.cwd: the directory {cwd!r} can't be read and entered")


def _check_program(
    path: str, program: str, settings: CommonSettings, environ: Mapping[str, str]
) -> None:
    """Look for `program` where a child with these settings would."""
    where = os.path.join(settings.cwd or "", program) if os.sep in program else program
    search = settings.env.get("PATH", environ.get("PATH"))
    if "\0" in program or shutil.which(where, path=search) is None:
        hint = "" if os.sep in program else f" on the PATH {search!r}"
        raise ConfigError(f"{path}: the program {program!r} was not found{hint}")


def _split(path: str, words: tuple[str, ...] | str) -> tuple[str, ...]:
    try:
        command = split_words(words)
    except ValueError as exc:
        raise ConfigError(f"{path}: can't be split: {exc}, in {words!r}") from None
    if "\0" in "".join(command):
        raise ConfigError(f"{path}: expected text without NUL bytes, got {words!r}")
    return command
