"""A stand-in of the Hugging Face hub's HTTP routes, for tests without a network.

It keeps repositories in memory: what `huggingface_hub` asks for when a repository is made, written to in
one commit, looked at and fetched. Writing needs the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"
OWNER = "somebody"


class Hub:
    """Repositories by name: branches and commits with their files. requests: "METHOD path" of each."""

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.url = ""

    def commit(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Writes files onto a branch; returns the commit."""
        branches = self.revisions.setdefault(name, {})
        merged = {**self.commits.get(branches.get(revision, ""), {}), **files}
        text = json.dumps([name, revision, *(f"{k} {hash(v)}" for k, v in sorted(merged.items()))])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = merged
        branches[revision] = branches[sha] = sha
        return sha

    def answer(
        self, method: str, path: str, body: bytes, token: str | None
    ) -> tuple[int, Any, dict]:
        """Status, body and headers of a request."""
        if method == "POST" and token != TOKEN:
            return 401, {"error": "Invalid credentials"}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            described = {"url": f"{self.url}/{name}", "name": name}
            if name in self.revisions:
                return 409, {"error": "exists", **described}, {}
            self.commit(name, {".gitattributes": b""})
            return 200, described, {}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": OWNER, "orgs": []}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            name, what, revision = found[1], found[2], found[3]
            if name not in self.revisions:
                return 404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"}
            if what == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for f in json.loads(body)["files"]]  # fmt: skip
                return 200, {"files": files}, {}
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            sha = self.commit(name, files, revision)
            address = f"{self.url}/{name}/commit/{sha}"
            return 200, {"success": True, "commitOid": sha, "commitUrl": address}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, revision = found[1], found[3] or "main"
            files, error = self._files(name, revision)
            if error:
                return error
            listed = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in files.items()
            ]
            if found[2] == "tree":
                return 200, listed, {}
            sha = self.revisions[name][revision]
            siblings = [{"rfilename": p} for p in files]
            return 200, {"id": name, "sha": sha, "siblings": siblings, "tags": []}, {}
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found[1], found[2], found[3]
            files, error = self._files(name, revision)
            if error:
                return error
            sha = self.revisions[name][revision]
            if file not in files:
                return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            etag = hashlib.sha1(files[file]).hexdigest()
            return 200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": sha}
        return 404, {"error": f"no route {method} {path}"}, {}

    def _files(self, name: str, revision: str) -> tuple[dict[str, bytes], Any]:
        if name not in self.revisions:
            return {}, (404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in self.revisions[name]:
            return {}, (404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        return self.commits[self.revisions[name][revision]], None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `Hub.url` as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content, headers = hub.answer(self.command, path, body, token)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
