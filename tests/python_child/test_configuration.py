"""Children get settings of the worker that importing the app does not bring."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import DEADLINE
from tests.support.projects import CELERY, RESULTS, Shaped, another_venv

POOL = ("-P", "celery_subproc_pool:Pool", "-c", "1")

#: An app whose module sets neither the broker, nor the backend, nor the queue of the worker.
MODULE = """
{header}
app.conf.update(
    broker_url="memory://",
    result_backend="cache+memory://",
    include=["ordinary_tasks"],
    secret="as imported",
    kept=lambda: "as imported",
)

class Own:
    def __init__(self, tag):
        self.tag = tag

app.conf.own = Own("imported")

@app.task(name="setting")
def setting(name):
    value = app.conf.get(name)
    value = getattr(value, "tag", value)
    return value() if callable(value) else value
"""

#: A launcher that changes settings, as many projects have.
LAUNCHER = """
import sys
from one import app, Own

if __name__ == "__main__":
    app.conf.update(
        broker_url="filesystem://",
        result_backend={backend!r},
        task_default_queue="theirs",
        secret="hunter2",
        tenant={{"name": "acme", "plans": ("a", "b")}},
        hook=lambda: "hunter2",
        home=sys.prefix + "/here",
    )
    app.conf.own = Own("set by the launcher")
    app.worker_main(sys.argv[1:])
"""


def launched(directory: Path, more: str = "", **python: Any) -> Shaped:
    backend = f"{RESULTS}{directory / 'results'}"
    files = {
        "one.py": MODULE + more,
        "launcher.py": LAUNCHER.format(backend=backend),
    }
    project = Shaped(directory, files, ["launcher.py"], {"subproc_pool": {"python": python}})
    project.app.conf.task_default_queue = "theirs"
    return project


def ask(project: Shaped, name: str, *args: Any) -> Any:
    return project.app.send_task(name, args).get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize("other", [False, True], ids=["own interpreter", "another interpreter"])
def test_children_have_the_settings_that_a_launcher_made(tmp_path: Path, other: bool) -> None:
    python = {"executable": another_venv(tmp_path / "venv", equipped=True)} if other else {}
    project = launched(tmp_path, **python)
    with project.worker(*POOL) as worker:
        inner = project.app.AsyncResult(ask(project, "calls", "setting", "secret"))
        assert inner.get(timeout=DEADLINE, interval=0.02) == "hunter2"
        assert ask(project, "setting", "task_default_queue") == "theirs"
        assert ask(project, "setting", "tenant") == {"name": "acme", "plans": ["a", "b"]}
        # It can't be sent, but importing brings it.
        assert ask(project, "setting", "kept") == "as imported"
        # These objects can't be compared, so the child keeps its own.
        assert ask(project, "setting", "own") == "imported"
        assert ask(project, "setting", "hook") is None
        assert worker.log.count("the setting hook") == 1
        assert "the setting kept" not in worker.log
        assert "hunter2" not in re.sub(r"Task setting.*succeeded.*", "", worker.log)


def test_a_missing_setting_is_logged_once_also_when_children_are_replaced(tmp_path: Path) -> None:
    project = launched(tmp_path, max_jobs=1)
    with project.worker(*POOL) as worker:
        assert ask(project, "setting", "tenant")["name"] == "acme"
        assert ask(project, "setting", "tenant")["name"] == "acme"
        assert worker.log.count("the setting hook") == 1


def test_a_configuration_module_that_is_chosen_at_run_time(tmp_path: Path) -> None:
    """The last module counts, also with settings that are not Celery's."""
    probe = launched(tmp_path)
    transport = {
        "broker_transport_options": probe.app.conf.broker_transport_options,
        "result_backend": f"{RESULTS}{tmp_path / 'results'}",
        "broker_transport": "folder_broker:Transport",
        "broker_url": "filesystem://",
    }
    (tmp_path / "production.py").write_text(
        f"import os\nglobals().update({transport!r})\n"
        "task_default_queue = 'theirs'\nregion = 'north'\n"
    )
    (tmp_path / "development.py").write_text("broker_url = 'memory://'\nregion = 'nowhere'\n")
    (tmp_path / "one.py").write_text(
        "from celery import Celery\n"
        "app = Celery('proj')\n"
        "app.config_from_object('development')\n"
        "@app.task(name='setting')\n"
        "def setting(name): return app.conf.get(name)\n"
    )
    (tmp_path / "launcher.py").write_text(
        "import sys\nfrom one import app\n"
        "app.config_from_object('production', force=True)\n"
        "app.worker_main(sys.argv[1:])\n"
    )
    with probe.worker(*POOL) as worker:
        assert ask(probe, "setting", "region") == "north"
        assert ask(probe, "setting", "task_default_queue") == "theirs"
        assert "lack the setting" not in worker.log


def test_nothing_is_logged_if_importing_brings_all_settings(tmp_path: Path) -> None:
    text = MODULE.replace("cache+memory://", f"{RESULTS}{tmp_path / 'results'}")
    text = text.replace("memory://", "filesystem://")
    project = Shaped(tmp_path, {"one.py": text}, [*CELERY, "-A", "one"])
    with project.worker(*POOL) as worker:
        assert ask(project, "setting", "secret") == "as imported"
        assert "lack the setting" not in worker.log


def test_a_child_on_another_interpreter_keeps_its_own_library_paths(tmp_path: Path) -> None:
    """A path in the library of one virtual environment is wrong in another."""
    python = another_venv(tmp_path / "venv", equipped=True)
    code = (
        "import sysconfig\n"
        "app.conf.bundle = {'ca': sysconfig.get_path('purelib') + '/cacert.pem'}\n"
        "@app.task(name='library')\n"
        "def library(): return [app.conf.bundle['ca'], sysconfig.get_path('purelib')]\n"
    )
    project = launched(tmp_path, code, executable=python)
    with project.worker(*POOL):
        bundle, library = ask(project, "library")
    assert bundle == f"{library}/cacert.pem"
    assert not library.startswith(sys.prefix)
