"""What acts: spawns children, reads and writes their pipes, sends signals, waits for timers.

It may import `core`, `wire`, `errors` and psutil. It knows no Celery: whoever has the jobs is a
`supervisor.Listener`. One thread turns it.

Read `supervisor` first: it owns every child and performs what `core` decides.
"""
