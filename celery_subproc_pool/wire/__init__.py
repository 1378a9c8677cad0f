"""What goes through the pipes of a child: bytes, lines, messages. Pure.

It may import `errors` and msgspec. It knows no process, no clock and no Celery.

Read `messages` first: the protocol of external children, as docs/protocol.md has it. `python` has
what only the pool's own Python children say and hear. `lines` cuts bytes into lines, and `text`
makes them safe for a log.
"""
