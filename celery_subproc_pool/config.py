"""The pool's settings, checked strictly and frozen.

Layer: above `errors` only. Must not import Celery: it is given the mapping that Celery's
configuration holds under ``subproc_pool``, and the environment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeVar

import msgspec

from .errors import ConfigError

__all__ = (
    "BOOTSTEPS",
    "CELERY_PREFIX",
    "ENVIRONMENT_VARIABLE",
    "PYTHON",
    "REPLAYABLE",
    "ROOT",
    "ChildSettings",
    "PoolSettings",
    "PythonSettings",
    "load",
    "with_limits",
)

#: The path that error messages begin with: the setting's name in Celery's configuration.
ROOT = "subproc_pool"

#: Holds the settings as JSON; what it says replaces the whole mapping.
ENVIRONMENT_VARIABLE = "CELERY_SUBPROC_POOL"

#: Celery's own tasks begin so. A pattern takes them only if it begins so too; otherwise the
#: worker itself runs them.
CELERY_PREFIX = "celery."

#: The name of the one group in the short form ``{"argv": [...]}``.
_ONLY_GROUP = "default"

#: The name of the group of Python children.
PYTHON = "python"

#: Where a child's stderr can go.
STDERR_CHOICES = ("log", "inherit", "null")

#: What becomes of what a child has left running when it goes.
LEFTOVERS_CHOICES = ("keep", "kill")

#: The word for the worker's bootsteps among what can be done again in a Python child.
BOOTSTEPS = "bootsteps"

#: What can be done again in a Python child, in the order in which the worker does it: signals by
#: their names, and the construction of bootsteps.
REPLAYABLE = (
    "user_preload_options",
    "celeryd_init",
    "worker_init",
    BOOTSTEPS,
    "celeryd_after_setup",
)

#: Seconds: more than a hundred years are a mistake, and overflow clocks.
Positive = Annotated[float, msgspec.Meta(gt=0, le=100 * 365 * 86400.0)]
#: Seconds too, where none is an answer.
Moment = Annotated[float, msgspec.Meta(ge=0, le=100 * 365 * 86400.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


class CommonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all groups have."""

    #: Added to the child's environment.
    env: dict[str, str] = {}
    #: Working directory; None is the worker's.
    cwd: str | None = None
    #: Number of children; None is as many as the worker's concurrency needs.
    size: Count | None = None
    #: Seconds that a child may take to boot: until it says that it is ready, if it does that; if
    #: not, and its first job should have been done by then, until it reads that.
    start_timeout: Positive = 60.0
    #: Seconds between closing stdin, SIGTERM and SIGKILL when a child is stopped.
    stop_timeout: Positive = 10.0
    #: Seconds between SIGTERM and SIGKILL when a job has to be ended that goes on over its hard
    #: limit; 0 is SIGKILL at once.
    kill_grace: Moment = 0.0
    #: Where the child's stderr goes: the worker's log, the worker's stderr, or nowhere.
    stderr: str = "log"
    #: What becomes of the programs that a child has left running when it goes in good order:
    #: "keep", until the worker ends, or "kill".
    leftovers: str = "kill"
    #: How many jobs a child gets before another takes its place; None is without end, or what
    #: ``--max-tasks-per-child`` says.
    max_jobs: Count | None = None
    #: Seconds that a child serves; None is without end.
    max_age: Positive | None = None
    #: Resident bytes that a child may have after a job, with all that it started; None is without
    #: end, or what ``--max-memory-per-child`` says. Less than one MiB is a mistake of the unit.
    max_memory: Annotated[int, msgspec.Meta(ge=2**20)] | None = None
    #: By what share, at most, a child's own limits are lower than those three, so that not all are
    #: recycled at the same time.
    recycle_jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    #: How many children one job may cost, over its redeliveries to this worker, before its message
    #: is rejected; None is without end.
    max_crashes: Count | None = 3

    @property
    def recycles(self) -> bool:
        """Whether there is a limit to a child's life."""
        return any(most is not None for most in (self.max_jobs, self.max_age, self.max_memory))


class ChildSettings(CommonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One group of external children: ``subproc_pool.children.<name>``."""

    #: The program and its arguments; or one string, split as a shell would. No shell runs.
    argv: tuple[str, ...] | str
    #: Task names or `fnmatch` patterns that this group takes.
    tasks: tuple[Text, ...] = ("*",)
    #: Start from an empty environment (but for PATH) instead of the worker's.
    clean_env: bool = False
    #: Seconds for one job when Celery sets no limit of its own; None is none.
    timeout: Positive | None = 600.0
    #: Whether the child writes a line that says ``ready`` before it gets jobs.
    handshake: bool = False
    #: The longest line that a child may write, in bytes.
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 67108864
    #: How often one task may be throttled before it fails; None is without end.
    throttle_max_retries: NotNegative | None = None
    #: Signal that tells the child of a soft time limit (``"SIGUSR1"``); None tells it nothing.
    soft_timeout_signal: str | None = None

    #: How many jobs a child that announces `multiplex` has at a time, at most.
    max_in_flight: Count = 1
    #: Seconds after which a job has reached its limit if its child has told nothing of it; None is
    #: without end.
    inactivity_timeout: Positive | None = None
    #: Seconds that a child, which announces `cancel`, has to end a job when it was told to.
    cancel_grace: Positive = 5.0

    @property
    def command(self) -> tuple[str, ...]:
        """The program and its arguments, split."""
        return _words(self.argv)

    def size_for(self, limit: int) -> int:
        """Return how many children a worker that does `limit` jobs at a time has of the group."""
        return -(-limit // self.max_in_flight) if self.size is None else self.size

    def takes(self, task_name: str) -> bool:
        """Return whether a name or pattern of `tasks` matches `task_name`."""
        own = task_name.startswith(CELERY_PREFIX)
        return any(
            fnmatchcase(task_name, pattern)
            for pattern in self.tasks
            if not own or pattern.startswith(CELERY_PREFIX)
        )

    def exact_tasks(self) -> tuple[str, ...]:
        """Return the entries of `tasks` that are plain names."""
        return tuple(name for name in self.tasks if not set(name) & set("*?["))


class PythonSettings(CommonSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The Python children, which run the project's ordinary tasks: ``subproc_pool.python``."""

    #: The interpreter, of another virtual environment maybe; None is the worker's.
    executable: Text | None = None
    #: A program and its arguments to run each child under: ``["nice", "-n", "10"]``; or one
    #: string, split as a shell would.
    wrapper: tuple[str, ...] | str = ()
    #: As of all groups, but to the worker's stderr by default.
    stderr: str = "inherit"
    #: As of all groups, but kept by default.
    leftovers: str = "keep"
    #: As of all groups, but prefork's moment by default (billiard/pool.py: `_trywaitkill`), in
    #: which ``finally`` blocks run.
    kill_grace: Moment = 0.1
    #: What the worker does before its pool starts that each child does again: of `REPLAYABLE`.
    replay: tuple[str, ...] = ("user_preload_options", "celeryd_init", BOOTSTEPS)
    #: Seconds that what is registered with `atexit` may take when a child goes.
    exit_grace: Positive = 5.0

    @property
    def prefix(self) -> tuple[str, ...]:
        """The wrapper, split."""
        return _words(self.wrapper)

    def as_child(self, argv: tuple[str, ...]) -> ChildSettings:
        """Return the settings of the group, whose children are started with `argv`.

        Their limits are Celery's alone, as on prefork, and a soft one is told by SIGUSR1
        (billiard/pool.py: SIG_SOFT_TIMEOUT).
        """
        common = {name: getattr(self, name) for name in CommonSettings.__struct_fields__}
        return ChildSettings(
            argv=argv, timeout=None, handshake=True, soft_timeout_signal="SIGUSR1", **common
        )


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that stands under ``subproc_pool``: the groups by name, in the order written."""

    children: dict[str, ChildSettings] = {}
    python: PythonSettings = PythonSettings()


def with_limits(
    child: ChildSettings, max_jobs: int | None, max_memory: int | None
) -> ChildSettings:
    """Return the settings of a group, recycled as the worker's options say where it does not.

    Arguments:
        child: the group's settings.
        max_jobs: jobs for each child; None or 0 is no limit.
        max_memory: KiB for each child, as Celery counts; None or 0 is no limit.
    """
    if max_jobs and child.max_jobs is None:
        child = msgspec.structs.replace(child, max_jobs=max_jobs)
    if max_memory and child.max_memory is None:
        child = msgspec.structs.replace(child, max_memory=max_memory * 1024)
    return child


def _words(text: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(shlex.split(text)) if isinstance(text, str) else text


def load(setting: Any, environ: Mapping[str, str] = os.environ) -> PoolSettings:
    """Check the settings.

    Arguments:
        setting: the value of ``app.conf.subproc_pool``: a mapping, or None.
        environ: looked up for ``CELERY_SUBPROC_POOL``, which wins over `setting`.

    Returns:
        The settings, every program in them found.

    Raises:
        ConfigError: something is wrong; one line names the path, what was expected and what came.
    """
    source = ROOT
    if environ.get(ENVIRONMENT_VARIABLE):
        source = f"{ROOT} (from the environment variable {ENVIRONMENT_VARIABLE})"
        try:
            setting = msgspec.json.decode(environ[ENVIRONMENT_VARIABLE])
        except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
            raise ConfigError(f"{source}: expected JSON: {exc}") from None
    if setting is None:
        setting = {}
    if not isinstance(setting, Mapping):
        raise ConfigError(f"{source}: expected a mapping, got {setting!r}")
    if "argv" in setting:
        both = [key for key in ("children", "python") if key in setting]
        if both:
            raise ConfigError(
                f"{source}: expected either 'argv', for one kind of child, or 'children' and"
                f" 'python', got 'argv' and {both[0]!r}: put 'argv' into {source}.children.<name>"
            )
        return PoolSettings(children={_ONLY_GROUP: _child(source, setting, environ)})
    unknown = [key for key in setting if key not in ("children", "python")]
    if unknown:
        raise ConfigError(
            f"{source}.{_step(unknown[0])}: no such setting; expected 'children' and 'python', or"
            " 'argv' and its companions for one kind of child"
        )
    groups = setting.get("children", {})
    if not isinstance(groups, Mapping):
        raise ConfigError(
            f"{source}.children: expected a mapping from a name to the settings of a kind of"
            f" child, got {groups!r}"
        )
    return PoolSettings(
        children={
            _group_name(source, name): _child(f"{source}.children.{name}", value, environ)
            for name, value in groups.items()
        },
        python=_python(f"{source}.python", setting.get("python", {}), environ),
    )


def _step(name: object) -> str:
    """Return `name` as a step of a path, on one line whatever it is."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else repr(name)


def _group_name(source: str, name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"{source}.children: expected names of letters, digits, '_' and '-', got {name!r}"
        )
    if name == PYTHON:
        raise ConfigError(
            f"{source}.children.{PYTHON}: this name belongs to the Python children, which have"
            f" their settings at {source}.{PYTHON}; take another one"
        )
    return name


def _child(path: str, value: Any, environ: Mapping[str, str]) -> ChildSettings:
    child = _convert(path, value, ChildSettings)
    _check_environment(path, child.env)
    command = _split(f"{path}.argv", child.argv)
    if not command or not command[0]:
        raise ConfigError(f"{path}.argv: expected a program and its arguments, got {child.argv!r}")
    _check_directory(path, child.cwd)
    _check_program(f"{path}.argv", command[0], child.cwd, child.env, environ)
    _check_choices(path, child)
    if child.max_in_flight > 1 and not child.handshake:
        raise ConfigError(
            f"{path}.max_in_flight: expected 1 where handshake is not set, got"
            f" {child.max_in_flight}; only a child that announces 'multiplex' in its handshake can"
            " have several jobs at a time"
        )
    name = child.soft_timeout_signal
    if name is not None and name not in signal.Signals.__members__:
        raise ConfigError(
            f"{path}.soft_timeout_signal: expected a signal's name such as 'SIGUSR1', got {name!r}"
        )
    return child


def _python(path: str, value: Any, environ: Mapping[str, str]) -> PythonSettings:
    python = _convert(path, value, PythonSettings)
    _check_environment(path, python.env)
    _check_directory(path, python.cwd)
    wrapper = _split(f"{path}.wrapper", python.wrapper)
    if wrapper:
        _check_program(f"{path}.wrapper", wrapper[0], python.cwd, python.env, environ)
    if python.executable is not None:
        _check_program(f"{path}.executable", python.executable, python.cwd, python.env, environ)
    _check_choices(path, python)
    for number, name in enumerate(python.replay):
        if name not in REPLAYABLE:
            raise ConfigError(
                f"{path}.replay[{number}]: expected one of {', '.join(REPLAYABLE)}, got {name!r}"
            )
    return python


def _convert(path: str, value: Any, kind: type[_Settings]) -> _Settings:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(_explain(path, value, kind, str(exc))) from None


def _explain(path: str, value: Any, kind: type[msgspec.Struct], error: str) -> str:
    """Turn msgspec's "Expected `float`, got `str` - at `$.timeout`" into our own path and value."""
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


def _split(path: str, words: tuple[str, ...] | str) -> tuple[str, ...]:
    try:
        command = _words(words)
    except ValueError as exc:
        raise ConfigError(f"{path}: can't be split: {exc}, in {words!r}") from None
    if "\0" in "".join(command):
        raise ConfigError(f"{path}: expected text without NUL bytes, got {words!r}")
    return command


def _check_directory(path: str, cwd: str | None) -> None:
    if cwd is not None and not os.path.isdir(cwd):
        raise ConfigError(f"{path}.cwd: expected a directory, got {cwd!r}")
    if cwd is not None and not os.access(cwd, os.R_OK | os.X_OK):
        raise ConfigError(f"{path}.cwd: the directory {cwd!r} can't be read and entered")


def _check_program(
    path: str, program: str, cwd: str | None, env: Mapping[str, str], environ: Mapping[str, str]
) -> None:
    where = os.path.join(cwd or "", program) if os.sep in program else program
    search = env.get("PATH", environ.get("PATH"))
    if "\0" in program or shutil.which(where, path=search) is None:
        hint = "" if os.sep in program else f" on the PATH {search!r}"
        raise ConfigError(f"{path}: the program {program!r} was not found{hint}")


def _check_environment(path: str, env: Mapping[str, str]) -> None:
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(
                f"{path}.env: expected names without '=', and no NUL, got {name!r}: {value!r}"
            )


def _check_choices(path: str, settings: CommonSettings) -> None:
    for name, choices in (("stderr", STDERR_CHOICES), ("leftovers", LEFTOVERS_CHOICES)):
        value = getattr(settings, name)
        if value not in choices:
            raise ConfigError(f"{path}.{name}: expected one of {', '.join(choices)}, got {value!r}")
