"""An asyncio child: a Python child that runs the project's `async def` tasks in one event loop.

It runs many jobs at a time. Celery's tracer runs in a greenlet for each, which waits while the
coroutine of the task runs. May import `errors`, `python_child`, `serve` and `wire`. Read `main`,
then `serving`, then `traces`.
"""
