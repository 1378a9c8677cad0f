"""A tracer: a Python child that runs Celery's tracer for the tasks of external children.

It traces many jobs at a time, each in a greenlet of its own. May import `errors`, `python_child`,
`serve` and `wire`. Read `main`, then `serving`, then `tasks`.

`tasks` is also what an app imports to declare external tasks: it must import nothing that only a
worker needs.
"""
