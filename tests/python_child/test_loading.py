"""Python children find the app, in whatever way the worker was started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.basics import DEADLINE
from tests.support.projects import CELERY, RESULTS, Shaped
from tests.support.worker import Project

POOL = ("-P", "celery_subproc_pool:Pool", "-c", "1")

TASK = """
import os

@app.task(name="where")
def where():
    return {"pid": os.getpid(), "app": app.main, "bound": where.app is app}
"""

MAIN = """
if __name__ == "__main__":
    app.worker_main(sys.argv[1:])
"""

#: The project's files, and the command that starts the worker.
SHAPES: dict[str, tuple[dict[str, str], list[str]]] = {
    "a module": ({"one.py": "{header}" + TASK}, [*CELERY, "-A", "one"]),
    "a package with celery.py": (
        {"shop/__init__.py": "", "shop/celery.py": "{header}" + TASK},
        [*CELERY, "-A", "shop"],
    ),
    "module and attribute": (
        {"shop/__init__.py": "", "shop/main.py": "{header}\nspare = Celery('no')\n" + TASK},
        [*CELERY, "-A", "shop.main:app"],
    ),
    "a package that re-exports it": (
        {
            "shop/__init__.py": "from .main import app as celery_app\n",
            "shop/main.py": "{header}" + TASK,
        },
        [*CELERY, "-A", "shop:celery_app"],
    ),
    "a factory, and a module that calls it": (
        {
            "factory.py": "import importlib\ndef create():\n"
            "    return importlib.import_module('hidden').app\n",
            "hidden.py": "{header}" + TASK,
            "wsgi.py": "from factory import create\nqueue = create()\n",
        },
        [*CELERY, "-A", "wsgi"],
    ),
    "an app that is made when it is first used": (
        {
            "one.py": "from celery.local import Proxy\n_made = None\n"
            "def get():\n"
            "    global _made\n"
            "    if _made is None:\n"
            "        import hidden\n"
            "        _made = hidden.app\n"
            "    return _made\n"
            "app = Proxy(get)\n",
            "hidden.py": "{header}" + TASK,
        },
        [*CELERY, "-A", "one"],
    ),
    "a script": ({"script.py": "import sys\n{header}" + TASK + MAIN}, ["script.py"]),
    "a module that is run": (
        {"shop/__init__.py": "", "shop/run.py": "import sys\n{header}" + TASK + MAIN},
        ["-m", "shop.run"],
    ),
    "another working directory": (
        {"deep/down/one.py": "{header}" + TASK},
        [*CELERY, "--workdir", "deep/down", "-A", "one"],
    ),
    "an app in no variable": (
        {
            "jobs.py": TASK.replace("@app.task", "@shared_task")
            .replace("import os", "import os\nfrom celery import shared_task")
            .replace("app.main", "where.app.main")
            .replace("is app", "is not None"),
            "script.py": "def main():\n"
            "    import sys\n"
            + "".join(f"    {line}\n" for line in ["scope = {}", "exec(TEXT, scope)"])
            + "    app = scope['app']\n"
            "    app.conf.include = ['jobs']\n"
            "    app.worker_main(sys.argv[1:])\n"
            "TEXT = '''{header}'''\n"
            "if __name__ == '__main__':\n"
            "    main()\n",
        },
        ["script.py"],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_children_load_the_app_of_the_worker(tmp_path: Path, shape: str) -> None:
    files, start = SHAPES[shape]
    project = Shaped(tmp_path, files, start)
    with project.worker(*POOL) as worker:
        found = get(project.app.send_task("where"))
        assert found == {"pid": worker.children()[0].pid, "app": "proj", "bound": True}


def get(result: Any) -> Any:
    return result.get(timeout=DEADLINE, interval=0.02)


def test_a_configuration_module_and_no_app(tmp_path: Path) -> None:
    probe = Project(tmp_path)
    conf = {
        "broker_transport_options": probe.app.conf.broker_transport_options,
        "result_backend": f"{RESULTS}{tmp_path / 'results'}",
    }
    files = {
        "celeryconfig.py": f"imports = ['ordinary_tasks']\nglobals().update({conf!r})\n"
        "broker_url = 'filesystem://'\nbroker_transport = 'folder_broker:Transport'\n"
    }
    project = Shaped(tmp_path, files, [*CELERY, "--config", "celeryconfig"])
    with project.worker(*POOL):
        assert get(project.app.send_task("add", (1, 2))) == 3


def test_broker_and_backend_given_on_the_command_line(tmp_path: Path) -> None:
    """The app's code names others. A child with those could neither store nor send."""
    text = "{header}\napp.conf.update(broker_url='memory://', result_backend='cache+memory://')\n"
    given = ["-b", "filesystem://", "--result-backend", f"{RESULTS}{tmp_path / 'results'}"]
    project = Shaped(
        tmp_path,
        {"one.py": text + "app.conf.include = ['ordinary_tasks']\n"},
        [*CELERY, *given, "-A", "one"],
    )
    with project.worker(*POOL):
        inner = project.app.AsyncResult(get(project.app.send_task("calls", ("add", 2, 3))))
        assert get(inner) == 5


def test_modules_and_settings_given_to_the_worker_command(tmp_path: Path) -> None:
    code = "@app.task(name='level')\ndef level(): return app.conf.worker_redirect_stdouts_level\n"
    project = Project(tmp_path, code=code)
    words = ["-I", "ordinary_tasks", "--", "worker.redirect_stdouts_level=ERROR"]
    with project.worker(*POOL, *words):
        assert get(project.app.send_task("add", (1, 2))) == 3
        assert get(project.app.send_task("level")) == "ERROR"
