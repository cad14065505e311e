"""A hub on this machine: enough of the Hugging Face hub's protocol for `huggingface_hub` and
`datasets` to list, ask for and stream the files of a folder `datasets/owner/name` or `owner/name`.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
API = re.compile(
    r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+(/.*)?)?$"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)$")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", X_Error_Code=code, X_Error_Message=f"{self.path}: {code}")

    def _send_file(self, path: Path) -> None:
        body = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if span := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            self._send(206, body[first : last + 1], **headers)
        else:
            self._send(200, body, **headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if file := FILE.match(path):
            repository = self.root / (file[1] or "") / file[2]
            if not repository.is_dir():
                self._missing("RepoNotFound")
            elif not (repository / file[3]).is_file():
                self._missing("EntryNotFound")
            else:
                self._send_file(repository / file[3])
        elif api := API.match(path):
            repository = self.root / api[1].replace("models", "") / api[2]
            files = sorted(repository.iterdir()) if repository.is_dir() else []
            if not files:
                self._missing("RepoNotFound")
            elif api[4]:  # repositories here are flat
                self._missing("EntryNotFound")
            elif api[3] in ("tree", "paths-info"):
                if api[3] == "paths-info":
                    wanted = parse_qs(body.decode()).get("paths", [])
                    files = [p for p in files if p.name in wanted]
                self._send_json(
                    [
                        {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                        for p in files
                    ]
                )
            else:
                siblings = [{"rfilename": p.name} for p in files]
                self._send_json({"id": api[2], "sha": COMMIT, "siblings": siblings})
        else:
            self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = _answer

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serve `root`; gives the address for HF_ENDPOINT."""
    handler = type("Hub", (Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
