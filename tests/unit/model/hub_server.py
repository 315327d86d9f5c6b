"""A server that speaks as much of the Hugging Face Hub's API as a download needs."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "0" * 40


class HubServer:
    """Serves the files of a directory as every model; as a context manager.

    Attributes:
        num_downloads: How often each file's content was asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.num_downloads: Counter[str] = Counter()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(directory, self))
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(directory: Path, server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, *, with_content: bool) -> None:
            headers = {"X-Repo-Commit": _COMMIT}
            path = self.path.partition("?")[0]
            if "/tree/" in path:
                body = json.dumps([_entry(file) for file in directory.iterdir()]).encode()
            elif path.startswith("/api/models/"):
                body = json.dumps({"id": "some/model", "sha": _COMMIT}).encode()
            elif "/resolve/" in path:
                file = directory / Path(path).name
                body = file.read_bytes()
                headers["ETag"] = f'"{_entry(file)["oid"]}"'
                server.num_downloads[file.name] += with_content
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_content:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _entry(file: Path) -> dict[str, str | int]:
    digest = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest}
