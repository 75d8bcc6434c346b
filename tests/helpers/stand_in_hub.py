"""A small stand-in for the hub on this machine, for the hub's own library to ask."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_test"


class StandIn(BaseHTTPRequestHandler):
    """What the library asks of the hub: a repository's information, its tree, and its files.

    Names of datasets begin with "datasets/".
    """

    repos: Mapping[str, Mapping[str, bytes]]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        type(self).asked.append(f"{self.command} {path}")
        is_api = path.startswith("api/")
        place = path.removeprefix("api/").removeprefix("models/")
        kind = "datasets/" if place.startswith("datasets/") else ""
        parts = place.removeprefix(kind).split("/")
        repo = kind + "/".join(parts[:2])
        files = self.repos.get(repo)
        authorized = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if files is None or (repo == "org/private" and not authorized):
            # The hub does not tell strangers whether a repository exists.
            return self.refuse(404 if authorized else 401, "RepoNotFound")
        if is_api:
            if parts[2:] and parts[3] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if parts[2:3] == ["tree"]:
                return self.answer(json.dumps([self.entry(n, d) for n, d in files.items()]).encode())
            siblings = [{"rfilename": name} for name in files]
            name = repo.removeprefix(kind)
            return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        name = "/".join(parts[4:])
        if repo.endswith("org/gated") and not authorized:
            return self.refuse(401, "GatedRepo")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        return self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer(self, data: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[ThreadingHTTPServer]:
    StandIn.repos, StandIn.asked = repos, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
