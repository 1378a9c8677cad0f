"""A Python child: a fresh interpreter that runs the tasks of the worker's project.

It may import `wire`, `settings`, `errors`, `serve` and Celery. It knows nothing of the worker. Some
modules have two ends that must agree: `codec`, `calls`, `recipes`, `configuration` and `replay`.
They have the worker's end too, and `worker` imports it.

Read `main` first: the process until it is ready. `loading` loads the project, `serving` runs jobs,
and `exits` ends the process. `codec` and `calls` are what requests and replies hold.
"""
