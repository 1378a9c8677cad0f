"""What goes through a child's pipes: bytes, lines, messages. Pure.

It may import `errors` and msgspec. It knows no process, no clock and no Celery.

Read `messages` first: the protocol of external children, as in docs/protocol.md. `python` has the
messages that only the pool's own Python children use. `json_lines` turns any message into a line
and back, `lines` cuts bytes into lines, and `text` makes what children write safe for a log.
"""
