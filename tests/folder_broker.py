"""kombu's filesystem transport, whose messages appear complete.

kombu writes a message where a reader may open it before its text is there, and the reader ends with
a JSON error: seen with kombu 5.7 on a busy machine.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes each message beside its queue, and renames it into place."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{uuid.uuid1().time}_{uuid.uuid4()}.{queue}.msg"
        path = os.path.join(self.data_folder_out, name)
        with open(f"{path}.unfinished", "w") as file:
            file.write(dumps(payload))
        os.rename(f"{path}.unfinished", path)


class Transport(filesystem.Transport):
    """A broker that is a folder."""

    Channel = Channel
