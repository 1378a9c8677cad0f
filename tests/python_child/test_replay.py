"""Tasks see what the worker does before its pool starts: signals, bootsteps. Real workers.

With `CSP_TEST_POOL=prefork` most of it shows what users are used to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import DEADLINE
from tests.support.projects import Shaped
from tests.support.worker import Project

POOL = os.environ.get("CSP_TEST_POOL", "celery_subproc_pool:Pool")
WORDS = ("-P", POOL, "-c", "2")
ours = pytest.mark.skipif(POOL == "prefork", reason="a property of this pool's")

CODE = """
import os
from celery import bootsteps, signals
from click import Option

seen = {}
app.user_options["preload"].add(Option(["--ini"], default="none"))
app.user_options["worker"].add(Option(["--tenant"], default="none"))

@signals.user_preload_options.connect
def on_options(options, app, **_):
    seen["ini"] = options["ini"]

@signals.celeryd_init.connect
def on_init(sender, instance, conf, options, **_):
    conf.task_default_queue = "chosen"
    seen["init"] = [sender, instance.hostname, options["loglevel"], options["tenant"]]
    seen["app"] = instance.app is app and conf is app.conf

@signals.celeryd_init.connect(sender="other@host")
def for_another_worker(**_):
    seen["other"] = True

class Prepares(bootsteps.Step):
    def __init__(self, parent, tenant=None, **options):
        seen["step"] = [tenant, parent.hostname, parent.app is app]
        seen["created"] = False

    def create(self, parent):
        if not hasattr(parent, "blueprint"):
            seen["created"] = True

class Hears(bootsteps.StartStopStep):
    def __init__(self, parent, **options):
        signals.task_prerun.connect(self.prerun)

    def prerun(self, task_id, **_):
        seen["prerun"] = True

class Fails(bootsteps.Step):
    def __init__(self, parent, **options):
        parent.nothing_of_the_kind

app.steps["worker"].update({Prepares, Hears})

@app.task(name="seen")
def what_is_seen():
    return {**seen, "queue": app.conf.task_default_queue}
"""

WORKERS_OWN = """
@signals.worker_init.connect
def prepare(sender, **_):
    seen["worker_init"] = [sender.hostname, sender.app is app, sender.loglevel]

@signals.celeryd_after_setup.connect
def after_setup(sender, instance, conf, **_):
    seen["after"] = [sender, instance.hostname, conf is app.conf]
"""


def project_with(directory: Path, code: str = "", **python: Any) -> Project:
    conf = {"subproc_pool": {"python": python}} if python else {}
    project = Project(directory, conf=conf, code=CODE + code)
    project.app.conf.task_default_queue = "chosen"
    return project


def launched(directory: Path, launcher: str, old: str, new: str) -> Shaped:
    """Return a project that the script `launcher` starts, with `new` for `old` in the code."""
    files = {"one.py": "{header}" + CODE.replace(old, new), "launcher.py": launcher}
    project = Shaped(directory, files, ["launcher.py"])
    project.app.conf.task_default_queue = "chosen"
    return project


def seen_by_a_task(project: Project) -> Any:
    return project.app.send_task("seen").get(timeout=DEADLINE, interval=0.02)


def test_children_repeat_what_prefork_processes_inherit(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    words = ("--ini", "production.ini", "--tenant", "acme")
    with project.worker(*WORDS, *words) as worker:
        assert seen_by_a_task(project) == {
            "ini": "production.ini",
            "init": [project.node, project.node, 20, "acme"],
            "app": True,
            "queue": "chosen",
            "step": ["acme", project.node, True],
            "created": False,
            "prerun": True,
        }
        assert "WARNING" not in worker.log.replace("WARNING/MainProcess] No hostname", "")


@ours
def test_receivers_that_only_the_worker_runs_are_logged_once(tmp_path: Path) -> None:
    project = project_with(tmp_path, WORKERS_OWN)
    with project.worker(*WORDS) as worker:
        found = seen_by_a_task(project)
        assert "worker_init" not in found
        assert "after" not in found
        said = "fresh interpreters: proj.prepare (worker_init), proj.after_setup"
        assert worker.log.count(f"{said} (celeryd_after_setup). If they should") == 1


def test_children_repeat_what_the_setting_names(tmp_path: Path) -> None:
    every = ["user_preload_options", "celeryd_init", "worker_init", "bootsteps"]
    project = project_with(tmp_path, WORKERS_OWN, replay=[*every, "celeryd_after_setup"])
    with project.worker(*WORDS) as worker:
        found = seen_by_a_task(project)
        assert found["worker_init"] == [project.node, True, 20]
        assert found["after"] == [project.node, project.node, True]
        assert "fresh interpreters" not in worker.log


@ours
def test_children_repeat_nothing_if_the_setting_is_empty(tmp_path: Path) -> None:
    project = project_with(tmp_path, replay=[])
    with project.worker(*WORDS) as worker:
        assert seen_by_a_task(project) == {"queue": "chosen"}
        for name in (
            "proj.on_options (user_preload_options)",
            "proj.on_init (celeryd_init)",
            "proj.Hears (bootsteps)",
        ):
            assert worker.log.count(name) == 1
        assert "for_another_worker" not in worker.log


@ours
def test_a_bootstep_that_fails_in_children_is_logged_once(tmp_path: Path) -> None:
    code = (
        "\nif 'CELERY_SUBPROC_POOL_SLOT' in os.environ: app.steps['worker'].add(Fails)\n"
        "@signals.celeryd_init.connect\ndef breaks(**_):\n"
        "    if 'CELERY_SUBPROC_POOL_SLOT' in os.environ: raise ValueError('no such thing')\n"
    )
    project = project_with(tmp_path, code)
    with project.worker(*WORDS) as worker:
        assert seen_by_a_task(project)["prerun"] is True
        assert worker.log.count("The bootstep proj.Fails can't be constructed") == 1
        said = "proj.breaks (celeryd_init) fails in the Python children"
        assert worker.log.count(said) == 1
        assert "ValueError('no such thing')" in worker.log


@ours
def test_receivers_that_importing_does_not_bring_are_logged_once(tmp_path: Path) -> None:
    launcher = (
        "import sys\nfrom celery.signals import celeryd_init\nfrom one import app\n"
        "def main():\n"
        "    @celeryd_init.connect(weak=False)\n"
        "    def late(conf, **_): conf.task_default_queue = 'chosen'\n"
        "    app.worker_main(sys.argv[1:])\n"
        "if __name__ == '__main__': main()\n"
    )
    project = launched(tmp_path, launcher, '    conf.task_default_queue = "chosen"\n', "")
    with project.worker(*WORDS) as worker:
        # The setting that it made is there.
        assert seen_by_a_task(project)["queue"] == "chosen"
        said = "does not bring __main__.main.<locals>.late (celeryd_init)"
        assert worker.log.count(said) == 1


@ours
def test_an_embedded_worker_has_no_command_line(tmp_path: Path) -> None:
    """`app.Worker`, without the `celery` command."""
    start = (
        "import sys\nfrom one import app\n"
        "if __name__ == '__main__':\n"
        "    name, pool = sys.argv[sys.argv.index('-n') + 1], sys.argv[sys.argv.index('-P') + 1]\n"
        "    app.Worker(hostname=name, pool_cls=pool, concurrency=1, loglevel='INFO',\n"
        "               without_mingle=True, without_gossip=True, tenant='acme').start()\n"
    )
    old, new = 'options["loglevel"], options["tenant"]', 'options.get("tenant")'
    project = launched(tmp_path, start, old, new)
    with project.worker(*WORDS):
        found = seen_by_a_task(project)
        assert found["init"] == [project.node, project.node, "acme"]
        assert found["step"] == ["acme", project.node, True]
        assert "ini" not in found
