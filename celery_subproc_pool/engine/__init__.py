"""What acts: spawns children, reads and writes their pipes, sends signals, waits for deadlines.

It may import `core`, `wire`, `errors` and psutil. It knows no Celery: the owner of the jobs is a
`performer.Listener`. One thread turns it.

Read `supervisor` first: it says which part owns what. Then `loop`: it says in which order things
happen.
"""
