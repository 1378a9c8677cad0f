"""An HTTP server that takes what an agent sends to its vendor."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Sink:
    """What has arrived so far."""

    def __init__(self, port: int) -> None:
        self.port = port
        #: The bodies of requests, unpacked.
        self.bodies: list[bytes] = []

    def sentry_items(self, kind: str) -> list[dict[str, Any]]:
        """Return what Sentry's client has sent of one kind: "event", "transaction"."""
        found = []
        for body in list(self.bodies):
            # After the envelope's header come items. Each is a header and a payload.
            _, _, rest = body.partition(b"\n")
            while rest.strip():
                line, _, rest = rest.partition(b"\n")
                header = json.loads(line)
                payload, rest = rest[: header["length"]], rest[header["length"] :].lstrip(b"\n")
                if header["type"] == kind:
                    found.append(json.loads(payload))
        return found

    @property
    def sentry_dsn(self) -> str:
        """The address for Sentry's client."""
        return f"http://key@127.0.0.1:{self.port}/1"


@contextmanager
def http_sink(latency: float = 0.0) -> Iterator[Sink]:
    """Run a server on 127.0.0.1 that answers every POST with an empty object.

    Arguments:
        latency: seconds until it answers, as a distant server would need.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sink.bodies.append(body)
            time.sleep(latency)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sink = Sink(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
