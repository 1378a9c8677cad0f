"""A way to a server that can be cut or held up at any time, as a network does it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class CuttingProxy:
    """Passes on what comes to `port` on 127.0.0.1 to another port there, until it is closed."""

    def __init__(self, server: int) -> None:
        self._server = ("127.0.0.1", server)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections, and let no new one in."""
        # Wakes `accept`, which `close` alone does not.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.go_on()
        self.cut()

    def url(self, url: str) -> str:
        """Return the address of a server as it is through here."""
        return url.replace(f":{self._server[1]}/", f":{self.port}/")

    def cut(self) -> None:
        """End all connections; new ones are let in again."""
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Pass on nothing until `go_on`; the connections stay open."""
        self._flows.clear()

    def go_on(self) -> None:
        """Pass on what was held, and what comes."""
        self._flows.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            ends = [client, server]
            for pair in (ends, ends[::-1]):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        # Each thread closes the end that it alone reads.
        with self._lock:
            self._open.discard(source)
            source.close()
