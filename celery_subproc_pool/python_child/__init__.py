"""A Python child's own side: a fresh interpreter that runs the tasks of the worker's project.

It may import `wire`, `config`, `errors`, `serve` and Celery. It knows nothing of the worker. Where
both ends must agree (`codec`, `configuration`, `replay`), the worker's end stands here too, and
`worker` imports it.

Read `main` first: the process from its first line to its exit. `loading` loads the project.
"""
