"""The settings: what is accepted, what is refused, and the one line that says why."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from celery import Celery

from celery_subproc_pool.config import load
from celery_subproc_pool.errors import ConfigError
from celery_subproc_pool.settings import (
    UNBOUNDED,
    AsyncioSettings,
    ChildSettings,
    PoolSettings,
    PythonSettings,
    TracerSettings,
    with_limits,
)
from celery_subproc_pool.worker.routes import Routes

ARGV = {"argv": ["cat"]}
VARIABLE = "CELERY_SUBPROC_POOL"
FROM_VARIABLE = f"subproc_pool (from the environment variable {VARIABLE})"
COMMON = (
    "env, cwd, size, start_timeout, stop_timeout, kill_grace, stderr, leftovers, max_jobs, max_age,"
    " max_memory, recycle_jitter, max_crashes"
)
KNOWN = (
    f"{COMMON}, argv, tasks, clean_env, timeout, handshake, max_message_bytes,"
    " throttle_max_retries, soft_timeout_signal, max_in_flight, concurrency, inactivity_timeout,"
    " cancel_grace"
)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which the only programs are `cat` and `ls`."""
    for name in ("cat", "ls"):
        program = tmp_path / name
        program.touch()
        program.chmod(0o755)
    return {"PATH": str(tmp_path)}


def only(settings: PoolSettings) -> ChildSettings:
    (child,) = settings.children.values()
    return child


# -- what is accepted


@pytest.mark.parametrize("setting", [None, {}, {"children": {}}])
def test_no_settings_mean_no_children(setting: Any, environ: dict[str, str]) -> None:
    assert load(setting, environ).children == {}


def test_the_short_form_is_one_group(environ: dict[str, str]) -> None:
    settings = load({"argv": ["cat", "-u"], "size": 2}, environ)
    assert list(settings.children) == ["default"]
    assert only(settings).command == ("cat", "-u")
    assert only(settings).size == 2


def test_the_long_form_keeps_names_and_order(environ: dict[str, str]) -> None:
    settings = load({"children": {"rails": ARGV, "go-2": {"argv": "ls"}, "ä_1": ARGV}}, environ)
    assert list(settings.children) == ["rails", "go-2", "ä_1"]
    assert settings.children["go-2"].command == ("ls",)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["cat"], ("cat",)),
        (["cat", "a b", ""], ("cat", "a b", "")),
        (("cat", "-u"), ("cat", "-u")),
        ("cat", ("cat",)),
        ("cat -u 'a b' \"c d\" e\\ f", ("cat", "-u", "a b", "c d", "e f")),
        ("cat $HOME > x", ("cat", "$HOME", ">", "x")),
    ],
)
def test_argv_is_a_list_or_a_string_that_no_shell_sees(
    argv: Any, command: tuple[str, ...], environ: dict[str, str]
) -> None:
    assert only(load({"argv": argv}, environ)).command == command


def test_the_defaults(environ: dict[str, str]) -> None:
    child = only(load(ARGV, environ))
    assert child == ChildSettings(
        argv=("cat",),
        tasks=("*",),
        env={},
        clean_env=False,
        cwd=None,
        size=None,
        timeout=600.0,
        stop_timeout=10.0,
        kill_grace=0.0,
        stderr="log",
        max_message_bytes=64 * 1024 * 1024,
        throttle_max_retries=None,
        soft_timeout_signal=None,
    )


def test_every_setting_can_be_set(environ: dict[str, str], tmp_path: Path) -> None:
    setting: dict[str, Any] = {
        "argv": ["cat"],
        "tasks": ("a.b", "c.*"),
        "env": {"LANG": "C"},
        "clean_env": True,
        "cwd": str(tmp_path),
        "size": 3,
        "timeout": 5,
        "stop_timeout": 0.5,
        "kill_grace": 0.25,
        "stderr": "inherit",
        "max_message_bytes": 1024,
        "throttle_max_retries": 0,
        "soft_timeout_signal": "SIGUSR1",
    }
    child = only(load(setting, environ))
    assert child == ChildSettings(**{**setting, "argv": ("cat",)})


def test_any_mapping_is_accepted(environ: dict[str, str]) -> None:
    frozen = MappingProxyType(ARGV)
    assert only(load(frozen, environ)).command == ("cat",)
    settings = load(MappingProxyType({"children": MappingProxyType({"a": frozen})}), environ)
    assert list(settings.children) == ["a"]


def test_settings_are_frozen(environ: dict[str, str]) -> None:
    settings = load(ARGV, environ)
    with pytest.raises(AttributeError):
        settings.children = {}  # type: ignore[misc]
    with pytest.raises(AttributeError):
        only(settings).timeout = 1.0  # type: ignore[misc]


def test_a_program_is_found_by_path(environ: dict[str, str], tmp_path: Path) -> None:
    assert only(load({"argv": [str(tmp_path / "cat")]}, {})).command == (str(tmp_path / "cat"),)
    assert load({"argv": "./cat", "cwd": str(tmp_path)}, {})
    assert load({"argv": "cat", "env": {"PATH": str(tmp_path)}}, {"PATH": "/nowhere"})


# -- the environment variable


def test_the_environment_variable_wins(environ: dict[str, str]) -> None:
    environ[VARIABLE] = '{"children":{"b":{"argv":"ls"}}}'
    settings = load({"children": {"a": ARGV}}, environ)
    assert list(settings.children) == ["b"]
    assert only(settings).command == ("ls",)


def test_the_environment_variable_wins_over_a_bad_setting(environ: dict[str, str]) -> None:
    environ[VARIABLE] = "null"
    assert load({"argv": 5}, environ).children == {}


def test_an_empty_environment_variable_is_ignored(environ: dict[str, str]) -> None:
    environ[VARIABLE] = ""
    assert only(load(ARGV, environ)).command == ("cat",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{x", ": expected JSON: "),
        ("[1]", ": expected a mapping, got [1]"),
        ('{"argv":["ls"],"size":0}', ".size: expected `int` >= 1, in 0"),
        ('{"children":{"a":{"argv":5}}}', ".children.a.argv: expected"),
        ("[" * 100_000, ": expected JSON: "),
        ('"\udcff"', ": expected JSON: "),
    ],
    ids=["no JSON", "an array", "a bad value", "a bad group", "deep nesting", "not UTF-8"],
)
def test_a_bad_environment_variable_is_named(
    text: str, message: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ARGV, {**environ, VARIABLE: text})
    assert str(caught.value).startswith(FROM_VARIABLE + message)
    assert len(str(caught.value).splitlines()) == 1


# -- tasks and groups


@pytest.mark.parametrize(
    ("tasks", "name", "taken"),
    [
        (["*"], "billing.charge", True),
        (["billing.charge"], "billing.charge", True),
        (["billing.charge"], "billing.charge2", False),
        (["billing.*"], "billing.charge", True),
        (["billing.*"], "Billing.charge", False),
        (["billing.*"], "shipping.send", False),
        (["a.?"], "a.b", True),
        (["a.[bc]"], "a.c", True),
        (["a", "b"], "b", True),
        ([], "a", False),
        (["*"], "celery.chord_unlock", False),
        (["*.chord_unlock"], "celery.chord_unlock", False),
        (["celery.*"], "celery.chord_unlock", True),
        (["celery.chord_unlock"], "celery.chord_unlock", True),
        (["celery.map"], "celery.chord_unlock", False),
        (["*"], "celery_app.tasks.add", True),
    ],
)
def test_which_tasks_a_group_takes(tasks: list[str], name: str, taken: bool) -> None:
    assert ChildSettings(argv=("cat",), tasks=tuple(tasks)).takes(name) is taken


def test_exact_tasks_are_those_without_wildcards() -> None:
    child = ChildSettings(argv=("cat",), tasks=("a.b", "c.*", "d.?", "e.[fg]", "h"))
    assert child.exact_tasks() == ("a.b", "h")


def test_the_first_group_that_takes_a_task_gets_it() -> None:
    settings = PoolSettings(
        children={
            "one": ChildSettings(argv=("cat",), tasks=("a.special",)),
            "two": ChildSettings(argv=("cat",), tasks=("a.*", "a.other")),
            "three": ChildSettings(argv=("cat",), tasks=("a.special", "b.*", "b.x")),
        }
    )
    assert Routes(Celery(), settings).external == {
        "a.special": "one",
        "a.other": "two",
        "b.x": "three",
    }


# -- what is refused

#: Settings, and the message about them without the path's first word. `{PATH}` is the PATH.
REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], ": expected a mapping, got []"),
    "a string": ("cat", ": expected a mapping, got 'cat'"),
    "an unknown name": (
        {"child": {}},
        ".child: no such setting; expected 'children', 'python', 'asyncio' and 'tracers', or"
        " 'argv' and the other"
        " settings of one kind of child",
    ),
    "an unknown name beside children": (
        {"children": {}, "size": 1},
        ".size: no such setting; expected 'children', 'python', 'asyncio' and 'tracers', or"
        " 'argv' and the other"
        " settings of one kind of child",
    ),
    "children beside argv": (
        {"argv": ["cat"], "children": {}},
        ": expected either 'argv', for one kind of child, or 'children', 'python',"
        " 'asyncio' and 'tracers', got 'argv'"
        " and 'children': put 'argv' into subproc_pool.children.<name>",
    ),
    "children of None": (
        {"children": None},
        ".children: expected a mapping from a name to the settings of a kind of child, got None",
    ),
    "a list of children": (
        {"children": [ARGV]},
        ".children: expected a mapping from a name to the settings of a kind of child,"
        " got [{'argv': ['cat']}]",
    ),
    "a name with a blank": (
        {"children": {"a b": ARGV}},
        ".children: expected names of letters, digits, '_' and '-', got 'a b'",
    ),
    "a name with a newline": (
        {"children": {"a\n": ARGV}},
        ".children: expected names of letters, digits, '_' and '-', got 'a\\n'",
    ),
    "an empty name": (
        {"children": {"": ARGV}},
        ".children: expected names of letters, digits, '_' and '-', got ''",
    ),
    "a name that is a number": (
        {"children": {5: ARGV}},
        ".children: expected names of letters, digits, '_' and '-', got 5",
    ),
    "a child of None": (
        {"children": {"a": None}},
        ".children.a: expected `object`, got `null`",
    ),
    "a child that is a list": (
        {"children": {"a": ["cat"]}},
        ".children.a: expected `object`, got `array`",
    ),
    "a child without argv": (
        {"children": {"a": {}}},
        ".children.a: object missing required field `argv`",
    ),
    "a misspelt setting": (
        {"children": {"a": {"argv": ["cat"], "timout": 5}}},
        f".children.a.timout: no such setting; the settings are {KNOWN}",
    ),
    "argv of None": ({"argv": None}, ".argv: expected `str | array`, got `null`, in None"),
    "argv is a number": ({"argv": 5}, ".argv: expected `str | array`, got `int`, in 5"),
    "argv holds a number": (
        {"children": {"a": {"argv": ["cat", 5]}}},
        ".children.a.argv[1]: expected `str`, got `int`, in 5",
    ),
    "argv is empty": ({"argv": []}, ".argv: expected a program and its arguments, got ()"),
    "argv is blank": ({"argv": " "}, ".argv: expected a program and its arguments, got ' '"),
    "an empty program": (
        {"argv": ["", "x"]},
        ".argv: expected a program and its arguments, got ('', 'x')",
    ),
    "an open quotation": (
        {"argv": "cat 'x"},
        ".argv: can't be split: No closing quotation, in \"cat 'x\"",
    ),
    "argv with a NUL": (
        {"argv": ["cat", "a\0b"]},
        ".argv: expected text without NUL bytes, got ('cat', 'a\\x00b')",
    ),
    "no such program": (
        {"argv": "nonesuch -x"},
        ".argv: the program 'nonesuch' was not found on the PATH '{PATH}'",
    ),
    "no such program on a PATH of its own": (
        {"argv": "cat", "env": {"PATH": "/nowhere"}},
        ".argv: the program 'cat' was not found on the PATH '/nowhere'",
    ),
    "no program at that path": (
        {"argv": "/nowhere/cat"},
        ".argv: the program '/nowhere/cat' was not found",
    ),
    "no such directory": (
        {"argv": ["cat"], "cwd": "/nowhere"},
        ".cwd: expected a directory, got '/nowhere'",
    ),
    "a directory of five": (
        {"argv": ["cat"], "cwd": 5},
        ".cwd: expected `str | null`, got `int`, in 5",
    ),
    "tasks as a string": (
        {"argv": ["cat"], "tasks": "a.b"},
        ".tasks: expected `array`, got `str`, in 'a.b'",
    ),
    "an empty task name": (
        {"argv": ["cat"], "tasks": ["a", ""]},
        ".tasks[1]: expected `str` of length >= 1, in ''",
    ),
    "env is a list": (
        {"argv": ["cat"], "env": []},
        ".env: expected `object`, got `array`, in []",
    ),
    "env holds a number": (
        {"argv": ["cat"], "env": {"A": 1}},
        ".env[...]: expected `str`, got `int`, in {'A': 1}",
    ),
    "clean_env is a number": (
        {"argv": ["cat"], "clean_env": 1},
        ".clean_env: expected `bool`, got `int`, in 1",
    ),
    "size 0": ({"argv": ["cat"], "size": 0}, ".size: expected `int` >= 1, in 0"),
    "size True": (
        {"argv": ["cat"], "size": True},
        ".size: expected `int | null`, got `bool`, in True",
    ),
    "size is a string": (
        {"argv": ["cat"], "size": "2"},
        ".size: expected `int | null`, got `str`, in '2'",
    ),
    "timeout 0": ({"argv": ["cat"], "timeout": 0}, ".timeout: expected `float` > 0.0, in 0"),
    "timeout is a word": (
        {"argv": ["cat"], "timeout": "never"},
        ".timeout: expected `float | null`, got `str`, in 'never'",
    ),
    "handshake is a number": (
        {"argv": ["cat"], "handshake": 1},
        ".handshake: expected `bool`, got `int`, in 1",
    ),
    "start_timeout 0": (
        {"argv": ["cat"], "handshake": True, "start_timeout": 0},
        ".start_timeout: expected `float` > 0.0, in 0",
    ),
    "a group called python": (
        {"children": {"python": {"argv": ["cat"]}}},
        ".children.python: this name belongs to the Python children, which have their settings at"
        " subproc_pool.python; take another one",
    ),
    "a group called tracers": (
        {"children": {"tracers": {"argv": ["cat"]}}},
        ".children.tracers: this name belongs to the tracers, which have their settings at"
        " subproc_pool.tracers; take another one",
    ),
    "tracers is a list": (
        {"tracers": []},
        ".tracers: expected `object`, got `array`",
    ),
    "python is a list": (
        {"python": []},
        ".python: expected `object`, got `array`",
    ),
    "a misspelt setting of python": (
        {"python": {"exe": "python3"}},
        f".python.exe: no such setting; the settings are {COMMON}, executable, concurrency,"
        " wrapper, start, not_forkable, replay, exit_grace",
    ),
    "another way to start": (
        {"python": {"start": "thread"}},
        ".python.start: expected one of auto, fork, spawn, got 'thread'",
    ),
    "a wrapper of what is forked": (
        {"python": {"start": "fork", "wrapper": "cat"}},
        ".python.start: expected 'spawn' where wrapper is set, got 'fork': the wrapper would wrap"
        " the process that forks the children, and not each child",
    ),
    "a lifespan that is no name": (
        {"asyncio": {"lifespan": "proj.aio"}},
        ".asyncio.lifespan: expected 'module:name', got 'proj.aio'",
    ),
    "uvloop, which is not installed": (
        {"asyncio": {"uvloop": True}},
        ".asyncio.uvloop: expected that uvloop is installed, it is not",
    ),
    "a limit of memory in MiB": (
        {"argv": "cat", "max_memory": 512},
        ".max_memory: expected `int` >= 1048576, in 512",
    ),
    "no job at all": (
        {"argv": "cat", "max_jobs": 0},
        ".max_jobs: expected `int` >= 1, in 0",
    ),
    "jitter of more than everything": (
        {"python": {"recycle_jitter": 1.5}},
        ".python.recycle_jitter: expected `float` <= 1.0, in 1.5",
    ),
    "an interpreter that is not there": (
        {"python": {"executable": "/nowhere/python"}},
        ".python.executable: the program '/nowhere/python' was not found",
    ),
    "an empty interpreter": (
        {"python": {"executable": ""}},
        ".python.executable: expected `str` of length >= 1, in ''",
    ),
    "a wrapper that is not there": (
        {"python": {"wrapper": ["nicer", "-n", "10"]}},
        ".python.wrapper: the program 'nicer' was not found on the PATH '{PATH}'",
    ),
    "a wrapper that can't be split": (
        {"python": {"wrapper": "nice 'x"}},
        """.python.wrapper: can't be split: No closing quotation, in "nice 'x\"""",
    ),
    "python cwd is a file": (
        {"python": {"cwd": __file__}},
        f".python.cwd: expected a directory, got {__file__!r}",
    ),
    "python stderr goes nowhere known": (
        {"python": {"stderr": "file"}},
        ".python.stderr: expected one of log, inherit, null, got 'file'",
    ),
    "a signal that can't be repeated": (
        {"python": {"replay": ["celeryd_init", "worker_ready"]}},
        ".python.replay[1]: expected one of user_preload_options, celeryd_init, worker_init,"
        " bootsteps, celeryd_after_setup, got 'worker_ready'",
    ),
    "an impossible environment of python": (
        {"python": {"env": {"A=": "x"}}},
        ".python.env: expected names without '=', and no NUL, got 'A=': 'x'",
    ),
    "timeout nan": (
        {"argv": ["cat"], "timeout": float("nan")},
        ".timeout: expected `float` > 0.0, in nan",
    ),
    "a negative stop_timeout": (
        {"argv": ["cat"], "stop_timeout": -1.5},
        ".stop_timeout: expected `float` > 0.0, in -1.5",
    ),
    "a negative kill_grace": (
        {"python": {"kill_grace": -1}},
        ".python.kill_grace: expected `float` >= 0.0, in -1",
    ),
    "leftovers that are neither kept nor killed": (
        {"argv": ["cat"], "leftovers": "sell"},
        ".leftovers: expected one of keep, kill, got 'sell'",
    ),
    "leftovers of python": (
        {"python": {"leftovers": True}},
        ".python.leftovers: expected `str`, got `bool`, in True",
    ),
    "no time to exit": (
        {"python": {"exit_grace": 0}},
        ".python.exit_grace: expected `float` > 0.0, in 0",
    ),
    "stderr to nowhere known": (
        {"argv": ["cat"], "stderr": "file"},
        ".stderr: expected one of log, inherit, null, got 'file'",
    ),
    "lines too short to be of use": (
        {"argv": ["cat"], "max_message_bytes": 1023},
        ".max_message_bytes: expected `int` >= 1024, in 1023",
    ),
    "a negative throttle_max_retries": (
        {"argv": ["cat"], "throttle_max_retries": -1},
        ".throttle_max_retries: expected `int` >= 0, in -1",
    ),
    "no such signal": (
        {"argv": ["cat"], "soft_timeout_signal": "USR1"},
        ".soft_timeout_signal: expected a signal's name such as 'SIGUSR1', got 'USR1'",
    ),
    "many jobs for a child that can't say so": (
        {"argv": ["cat"], "max_in_flight": 2},
        ".max_in_flight: expected 1 where handshake is not set, got 2; only a child that announces"
        " 'multiplex' in its handshake can have several jobs at a time",
    ),
    "a signal's number": (
        {"argv": ["cat"], "soft_timeout_signal": 10},
        ".soft_timeout_signal: expected `str | null`, got `int`, in 10",
    ),
}


@pytest.mark.parametrize(("setting", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_setting_is_refused_in_one_line(
    setting: Any, message: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(setting, environ)
    assert str(caught.value) == "subproc_pool" + message.replace("{PATH}", environ["PATH"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"argv": ["cat"], 5: 1},
        {"argv": ["cat"], "env": {5: "x"}},
        {"argv": ["cat"], "a\nb": 1},
        {"child\nren": {}},
    ],
    ids=["a key that is a number", "such a key in env", "a newline in a key", "in a root key"],
)
def test_a_bad_key_is_refused_in_one_line_with_its_path(
    setting: Any, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(setting, environ)
    assert str(caught.value).startswith(("subproc_pool:", "subproc_pool."))
    assert len(str(caught.value).splitlines()) == 1


def test_a_directory_that_cannot_be_entered_is_refused(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may enter every directory.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError) as caught:
        load({"argv": ["cat"], "cwd": str(tmp_path)}, environ)
    assert str(caught.value) == (
        f"subproc_pool.cwd: the directory {str(tmp_path)!r} can't be read and entered"
    )


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": "x\0y"}, {"A\0": "x"}])
def test_an_environment_that_no_process_can_have_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^subproc_pool\.env: expected names without '='"):
        load({"argv": ["sh"], "env": env})


def test_the_settings_of_python_children(environ: dict[str, str]) -> None:
    python = load({"python": {"wrapper": "ls -l", "executable": "cat", "size": 2}}, environ).python
    assert python.prefix == ("ls", "-l")
    child = python.as_child(("cat", "-u"))
    assert (child.command, child.size) == (("cat", "-u"), 2)
    assert (child.handshake, child.timeout) == (True, None)
    assert (child.soft_timeout_signal, child.stderr) == ("SIGUSR1", "inherit")
    # As on prefork.
    assert child.kill_grace == 0.1


def test_the_settings_of_asyncio_children(environ: dict[str, str]) -> None:
    settings = load({"asyncio": {"cancel_grace": 2, "concurrency": 5}}, environ).asyncio
    child = settings.as_child(("cat", "-u"))
    assert (child.size, child.max_in_flight, child.handshake) == (1, UNBOUNDED, True)
    assert (child.cancel_grace, child.concurrency, child.timeout) == (2, 5, None)
    # They are told of a soft limit by a message.
    assert child.soft_timeout_signal is None
    settings = load({"asyncio": {"size": 2, "max_in_flight": 7}}, environ).asyncio
    child = settings.as_child(("cat",))
    assert (child.size, child.max_in_flight) == (2, 7)


def test_the_settings_of_tracers(environ: dict[str, str]) -> None:
    tracers = load({"tracers": {"max_in_flight": 9, "cancel_grace": 3}}, environ).tracers
    child = tracers.as_child(("cat", "-u"), 4)
    assert (child.command, child.size, child.max_in_flight) == (("cat", "-u"), 4, 9)
    assert (child.handshake, child.timeout, child.cancel_grace) == (True, None, 3.0)
    assert load({"tracers": {"size": 2}}, environ).tracers.as_child(("cat",), 4).size == 2


def test_python_children_need_no_setting() -> None:
    python = load(None).python
    assert (python.executable, python.prefix, python.size) == (None, (), None)


# -- the documentation


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        (ChildSettings, ("All groups", "External children")),
        (PythonSettings, ("All groups", "Python children")),
        (AsyncioSettings, ("All groups", "Python children", "Asyncio children")),
        (TracerSettings, ("All groups", "Tracers")),
    ],
)
def test_the_document_has_every_setting_and_no_other(kind: Any, sections: tuple[str, ...]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    found: list[str] = []
    for section in text.split("\n## ")[1:]:
        if section.startswith(sections):
            found += re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(found) == sorted(kind.__struct_fields__)


def test_the_workers_options_count_if_a_group_sets_no_limit() -> None:
    bare, own = ChildSettings(argv="cat"), ChildSettings(argv="cat", max_jobs=5, max_memory=2**21)
    limited = with_limits(bare, 7, 3000)
    assert (limited.max_jobs, limited.max_memory) == (7, 3000 * 1024)
    assert with_limits(own, 7, 3000) is own
    assert with_limits(bare, None, 0) is bare
    assert (bare.recycles, own.recycles) == (False, True)
