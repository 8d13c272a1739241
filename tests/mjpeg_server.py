"""A camera that misbehaves: MJPEG over HTTP from the standard library, for tests of what a real one does to us."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np


def jpeg(value: int, height: int = 48, width: int = 64) -> bytes:
    """A grey picture as JPEG."""
    import cv2

    return cv2.imencode(".jpg", np.full((height, width, 3), value, np.uint8))[1].tobytes()


Part = bytes | Callable[[threading.Event], None]
"""What goes out next: the bytes of one picture, or something to do instead, given the event that ends the server."""


def wait(seconds: float) -> Callable[[threading.Event], None]:
    """Send nothing for `seconds` (or until the server ends)."""
    return lambda ended: ended.wait(seconds) and None


@contextmanager
def mjpeg_server(parts: Callable[[], Iterator[Part]], *, answers: bool = True, status: int = 200) -> Iterator[str]:
    """Serve `parts()` to each client; yields the address, with a user name and password in it.

    `answers=False` accepts the connection and never says a word. When the parts run out, the connection closes.
    """
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not answers:
                ended.wait(30)
                return
            self.send_response(status)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            if status != 200:
                return
            try:
                for part in parts():
                    if ended.is_set():
                        return
                    if callable(part):
                        part(ended)
                        continue
                    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(part)
                    self.wfile.write(head + part + b"\r\n")
                    self.wfile.flush()
            except OSError:
                pass  # the client left

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://viewer:s3cret@127.0.0.1:{server.server_address[1]}/video"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
