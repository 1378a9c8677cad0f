"""What decides: which child does which job, and what becomes of both. Pure.

It may import `wire`, `settings`, `errors` and msgspec. It knows no clock, no process, no thread and
no Celery. Events come in as method calls with the time at which they happened; actions come out,
for `engine` to perform.

Read `model` first: the rules, then the state of jobs, children, slots and groups. Then `scheduler`,
which takes the events, and `lifecycle`, which decides what becomes of children.
"""
