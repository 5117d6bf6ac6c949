"""A model hub on loopback."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses; ``respond`` of a subclass finds the files."""

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def refuse(self, code, status=404):
        """Answer with one of the hub's error codes."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    @property
    def commit(self):
        """The commit that the path asks for, or that of every branch."""
        revision = self.path.partition("/resolve/")[2].partition("/")[0]
        return revision if len(revision) == len(COMMIT) else COMMIT

    def send_headers(self, name, size):
        """Start the answer with a file of ``size`` bytes."""
        self.send_response(200)
        self.send_header("ETag", f'"{name}-{size}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def serving(handler, **attributes) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server with ``attributes``, which ``handler`` finds at ``self.server``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
