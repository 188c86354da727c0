"""view: shows a published page in the browser, from a small server on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError

DEFAULT_PORT = 8008
PORTS_TRIED = 20
SERVED = (
    "index.html",
    "report.html",
    "report.json",
    "scene.ply",
    "scene.sog",
)  # nothing else leaves the folder


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of the files named in SERVED."""

    server_version = "spaceport"
    sys_version = ""

    def send_head(self) -> Any:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0].strip("[]")
        name = self.path.split("?", 1)[0].split("#", 1)[0].lstrip("/") or "index.html"
        bound = str(self.connection.getsockname()[0])
        # A page elsewhere that resolves its own name to this machine shall not read from it.
        if bound == "127.0.0.1" and host not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return None
        path = Path(self.directory) / name
        if name not in SERVED or path.is_symlink():
            self.send_error(404)
            return None
        self.path = "/" + name
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server_for(folder: Path, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server for a folder with index.html; port 0 takes the first free one from 8008 on."""
    if not (folder / "index.html").is_file():
        raise InputError(f"{folder}: no index.html; publish the scene first (`spaceport publish`)")
    ports = [port] if port else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for candidate in ports:
        try:
            return ThreadingHTTPServer((host, candidate), partial(_Handler, directory=str(folder)))
        except OSError as error:
            failure = error
    raise InputError(f"cannot listen on {host} port {ports[-1]}: {failure.strerror}; choose another --port")


def serve(server: ThreadingHTTPServer, tell: Callable[[str], None] = print) -> None:
    """Serves until Ctrl-C."""
    host, port = server.server_address[:2]
    tell(f"http://{host!s}:{port}/ (Ctrl-C ends)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def page_folder(scene: Path) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The folder to serve for an OUT folder, a .sog or a .ply; the latter two get a page in a temporary one."""
    if scene.is_dir():
        return scene, None
    from spaceport_gs.pipeline.compress import compress
    from spaceport_gs.pipeline.publish import PublishSettings, publish
    from spaceport_gs.ply import read_ply

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    sog = scene
    if scene.suffix.lower() == ".ply":
        sog = folder / "scene.sog"
        compress(read_ply(scene), sog)
    elif scene.suffix.lower() != ".sog":
        raise InputError(f"{scene}: expected a .ply, a .sog or a folder with a result")
    publish(sog, folder / "index.html", PublishSettings(title=scene.stem))
    return folder, temporary
