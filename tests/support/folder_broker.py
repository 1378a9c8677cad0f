"""kombu's filesystem transport and Celery's filesystem backend, whose files appear complete.

Both write where a reader may open the file before its text is there, and the reader ends with a
JSON error: seen on a busy machine.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from celery.backends.filesystem import FilesystemBackend
from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes each message beside its queue, and renames it into place."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        key = uuid.uuid4()
        # kombu before 5.4 takes whatever has the queue's name in its own.
        unfinished = os.path.join(self.data_folder_out, f"unfinished-{key}")
        with open(unfinished, "w") as file:
            file.write(dumps(payload))
        name = f"{uuid.uuid1().time}_{key}.{queue}.msg"
        os.rename(unfinished, os.path.join(self.data_folder_out, name))


class Transport(filesystem.Transport):
    """A broker that is a folder."""

    Channel = Channel

    def drain_events(self, connection: Any, timeout: float | None = None) -> Any:
        """Give up soon: a worker sees that it is to stop when this returns, and Celery waits for
        seconds."""
        return super().drain_events(connection, timeout=min(timeout or 0.2, 0.2))


class Backend(FilesystemBackend):
    """Writes each result beside its place, and renames it."""

    def set(self, key: bytes, value: str | bytes) -> None:
        place = self._filename(key)
        unfinished = place + b"-" + uuid.uuid4().hex.encode()
        with self.open(unfinished, "wb") as file:
            file.write(value.encode() if isinstance(value, str) else value)
        os.rename(unfinished, place)
