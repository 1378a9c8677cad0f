"""Task messages of every odd shape, as foreign producers, old clients and mistakes send them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from kombu import Connection

__all__ = ("Message", "Sender", "good", "odd_messages")

#: What stands where something else is expected.
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, 5, -1, 2**62, 2**70, 1.5, -0.5, float("nan"), float("inf"), "", "text", "300",
    "3.5", "-1", "ü\u2028\0", "\ud800", "x" * 20_000, [], [1], [None, None], [1, 2, 3],
    ["300", "200"], [[], {}], ["a", "b"], {}, {"a": 1}, {"soft": 1, "hard": 2},
)  # fmt: skip

#: The headers and properties that Celery 5 sends, and some that it does not.
HEADERS = (
    "lang", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit",
    "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
    "replaced_task_nesting", "stamped_headers", "stamps", "headers", "get", "args", "kwargs",
    "task_id", "hostname", "delivery_info", "callbacks", "chord", "chain", "errbacks", "utc",
    "compression", "tenant",
)  # fmt: skip
PROPERTIES = ("correlation_id", "reply_to", "priority")
EMBEDDED = ("callbacks", "errbacks", "chain", "chord", "tenant")
CONTENT_TYPES = ("application/json", "application/x-nothing", "application/data", "text/plain", "")
CONTENT_ENCODINGS = ("utf-8", "binary", "latin-1", "nonsense", "")
BODIES: tuple[Any, ...] = (
    "", "{", "null", "5", '"text"', "{}", "[]", "[[], {}]", "[[], {}, {}, {}]", "[{}, [], {}]",
    "[5, {}, {}]", '["ab", {}, {}]', "[[], 5, {}]", "[[], {}, 5]", "[[], null, null]",
    "[null, {}, {}]", '[[], {"": 1}, {}]', '[[], {"self": 1}, {}]', '[[1, 2, 3], {"x": 1}, {}]',
    '[["\\ud800"], {}, {}]', "[[1e400], {}, {}]", "[[" + "9" * 5000 + "], {}, {}]",
    "[" * 3000 + "]" * 3000, "\0", "\xff\xfe", "[[], {}, {}] and more", "[[NaN], {}, {}]",
    '[[], {}, {"callbacks": [{"task": 5}]}]',
)  # fmt: skip


class Message(NamedTuple):
    """A message as it goes to the broker."""

    #: What is odd about it.
    label: str
    headers: dict[str, Any]
    body: str
    properties: dict[str, Any]
    content_type: str = "application/json"
    content_encoding: str = "utf-8"

    @property
    def title(self) -> str:
        """What is odd about it, cut short."""
        return self.label[:100]


def good(task: str, *args: Any, **headers: Any) -> Message:
    """Return a message as Celery sends it."""
    task_id = str(uuid.uuid4())
    full = {
        "lang": "py",
        "task": task,
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "tests",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        **headers,
    }
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([args, {}, embed])
    return Message("good", full, body, {"correlation_id": task_id, "reply_to": "nobody"})


def odd_messages(task: str) -> Iterator[Message]:
    """Yield messages for `task`, each with one thing that is odd."""
    yield from _odd_headers(task)
    yield from _odd_bodies(task)
    yield from _old_messages(task)
    for value in ODD_VALUES:
        for name in PROPERTIES:
            message = good(task)
            yield message._replace(
                label=f"property {name}={value!r}", properties={**message.properties, name: value}
            )


def _odd_headers(task: str) -> Iterator[Message]:
    yield good(task)._replace(label="no headers at all", headers={})
    for name in HEADERS:
        message = good(task)
        message.headers.pop(name, None)
        yield message._replace(label=f"no header {name}")
        for value in ODD_VALUES:
            yield good(task, **{name: value})._replace(label=f"header {name}={value!r}")


def _odd_bodies(task: str) -> Iterator[Message]:
    for name in EMBEDDED:
        for value in ODD_VALUES:
            body = json.dumps([[], {}, {name: value}])
            yield good(task)._replace(label=f"embedded {name}={value!r}", body=body)
    for body in BODIES:
        yield good(task)._replace(label=f"body {body!r}", body=body)
    for name in CONTENT_TYPES:
        yield good(task)._replace(label=f"content type {name!r}", content_type=name)
    for name in CONTENT_ENCODINGS:
        yield good(task)._replace(label=f"content encoding {name!r}", content_encoding=name)


def _old_messages(task: str) -> Iterator[Message]:
    """Yield messages of an older client, which has everything in the body."""
    for value in ODD_VALUES:
        whole = {"task": task, "id": str(uuid.uuid4()), "args": [], "kwargs": {}}
        for name in ("id", "args", "kwargs", "retries", "timelimit", "eta", "expires", "utc"):
            label = f"protocol 1 {name}={value!r}"
            yield Message(label, {}, json.dumps({**whole, name: value}), {})


class Sender:
    """Publishes messages as they are.

    Arguments:
        url: the broker's.
        queue: the name of the queue.
    """

    def __init__(self, url: str, queue: str) -> None:
        self._url, self._queue = url, queue
        self._connect()

    def _connect(self) -> None:
        # RabbitMQ closes the connection some time after a message that it can't take, which would
        # cost the next one.
        options = {"confirm_publish": True}
        self._connection = Connection(self._url, transport_options=options)
        self._producer = self._connection.Producer(self._connection.default_channel)

    def send(self, message: Message) -> bool:
        """Publish `message`; return whether the broker's protocol can hold it."""
        try:
            self._producer.publish(
                message.body.encode("utf-8", "surrogatepass"),
                exchange="",
                routing_key=self._queue,
                headers=message.headers,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                delivery_mode=1,
                **message.properties,
            )
        except Exception:
            # What is half written can't be taken back.
            self.close()
            self._connect()
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        with suppress(Exception):
            self._connection.release()
