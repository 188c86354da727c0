"""`watch --web`: a scene followed in the browser, from a small server on this machine; pictures come straight from the bucket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.status import Status, told_in
from spaceport_gs.pipeline.aws.watch import PREVIEW, as_progress

HOST = "127.0.0.1"
LINK_SECONDS = 3600


class Page:
    """What the browser gets: a page, and the state that it asks for again and again."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud, self._state = cloud, b"{}"
        self.html = (resources.files(__package__) / "watch.html").read_bytes()

    def show(self, found: Status) -> None:
        run = found.run
        state = {
            "run": run.name,
            "status": run.status,
            "reason": run.reason,
            "page": (run.output or {}).get("page", ""),
            "stages": [asdict(progress) for progress in as_progress(found)],
            "links": self._links(found),
        }
        self._state = json.dumps(state).encode()

    def _links(self, found: Status) -> Mapping[str, str]:
        """To the preview, good for an hour."""
        training = [job for job in found.jobs if job.is_training]
        if not training:
            return {}
        bucket, folder = told_in(training[-1])
        place = {"Bucket": bucket, "Key": f"{folder}{PREVIEW}"}
        return {"preview": self._cloud.client("s3").generate_presigned_url("get_object", place, LINK_SECONDS)}

    def answer(self, path: str) -> tuple[bytes, str] | None:
        """(body, type) for a path; None if there is no such thing."""
        if path == "/":
            return self.html, "text/html; charset=utf-8"
        return (self._state, "application/json") if path == "/state.json" else None

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its address, while it can be reached."""
        server = ThreadingHTTPServer((HOST, 0), _handler_of(self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            server.server_close()


def _handler_of(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "spaceport", ""

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            # A page elsewhere that resolves its own name to this machine shall not read from it.
            answer = page.answer(self.path) if host in (HOST, "localhost") else None
            if answer is None:
                self.send_error(404)
                return
            body, kind = answer
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
