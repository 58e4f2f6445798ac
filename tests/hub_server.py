"""A stand-in for the Hugging Face hub: the routes that the client asks for, answered from folders.
For tests only.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

LFS_FROM = 1000
"""Files of this many bytes and more are large files, with a sha256."""


class HubServer:
    """Repositories ``{name: {revision: folder}}`` on a local port.

    ``requests`` lists method and path of every request. ``spoil`` may change the bytes of a file
    that is sent.
    """

    def __init__(self, repositories: dict[str, dict[str, Path]]):
        self.repositories = repositories
        self.requests: list[str] = []
        self.spoil: Callable[[str, bytes], bytes] = lambda path, content: content
        self.on_file: Callable[[], None] = lambda: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, name: str, revision: str) -> str:
        """A commit is named for the content of its folder."""
        digest = hashlib.sha1(revision.encode())
        for path in sorted(self.repositories[name][revision].iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _folder(self, name: str, revision: str) -> tuple[Path, str] | None:
        for branch, folder in self.repositories.get(name, {}).items():
            commit = self.commit(name, branch)
            if revision in (branch, commit):
                return folder, commit
        return None

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(head=True)

            def do_GET(self) -> None:
                self._answer(head=False)

            def _answer(self, *, head: bool) -> None:
                path = unquote(urlparse(self.path).path)
                server.requests.append(f"{self.command} {path}")
                pieces = path.strip("/").split("/")
                if pieces[:2] == ["api", "models"]:
                    self._api("/".join(pieces[2:4]), pieces[4:])
                elif len(pieces) >= 5 and pieces[2] == "resolve":
                    self._file("/".join(pieces[:2]), pieces[3], "/".join(pieces[4:]), head)
                else:
                    self._missing("EntryNotFound")

            def _api(self, name: str, rest: list[str]) -> None:
                if name not in server.repositories:
                    return self._missing("RepoNotFound")
                if rest == ["refs"]:
                    names = server.repositories[name]
                    branches = [
                        {
                            "name": b,
                            "ref": f"refs/heads/{b}",
                            "targetCommit": server.commit(name, b),
                        }
                        for b in names
                    ]
                    return self._json({"branches": branches, "tags": [], "converts": []})
                found = server._folder(name, rest[1] if len(rest) > 1 else "main")
                if found is None:
                    return self._missing("RevisionNotFound")
                if rest and rest[0] == "tree":
                    return self._json([_entry(path) for path in sorted(found[0].iterdir())])
                return self._json({"id": name, "sha": found[1], "siblings": []})

            def _file(self, name: str, revision: str, file: str, head: bool) -> None:
                found = server._folder(name, revision)
                if found is None or not (found[0] / file).is_file():
                    return self._missing("EntryNotFound")
                content = (found[0] / file).read_bytes()
                digest = _entry(found[0] / file)
                etag = digest["lfs"]["oid"] if "lfs" in digest else digest["oid"]
                if not head:
                    server.on_file()
                    content = server.spoil(file, content)
                self.send_response(200)
                for key, value in {
                    "ETag": f'"{etag}"',
                    "X-Repo-Commit": found[1],
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": digest["size"],
                    "Content-Length": len(content),
                    "Content-Type": "application/octet-stream",
                }.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if not head:
                    self.wfile.write(content)

            def _json(self, document: object) -> None:
                content = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _missing(self, code: str) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler


def _entry(path: Path) -> dict:
    content = path.read_bytes()
    entry: dict = {
        "type": "file",
        "path": path.name,
        "size": len(content),
        "oid": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(),
    }
    if len(content) >= LFS_FROM:
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
    return entry
