"""A stand-in for the hub on this machine: accounts, repositories, uploads and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "a-token-of-no-known-shape"
COMMIT = "0123456789" * 4
REVISION = {"X-Repo-Commit": COMMIT}


@dataclass
class Hub:
    """What the hub holds and was asked.

    files: of every repository. refuse: status by step (whoami, create, preupload, lfs, commit).
    """

    url: str = ""
    role: str = "write"
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"), ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(.+)/preupload/main", "preupload"),
        ("GET", r"/api/models/(.+)/tree/\w+", "tree"), ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/(.+)\.git/info/lfs/objects/batch", "batch"), ("PUT", r"/lfs/(\w+)", "lfs"),
        ("POST", r"/api/models/(.+)/commit/main", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+?)(?:/revision/\w+)?", "info"),
    )

    def do_GET(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if file := re.fullmatch(r"/(.+)/resolve/\w+/(.+)", path):
            return self._resolve(*file.groups())
        for method, pattern, step in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                self.hub.steps.append(step)
                if step in self.hub.refuse:
                    return self._answer({"error": f"{step} is refused"}, self.hub.refuse[step])
                if step not in ("lfs", "validate") and (
                        self.headers.get("Authorization") != f"Bearer {TOKEN}"):
                    return self._answer({"error": "Invalid user token."}, 401)
                answer, status = getattr(self, f"_{step}")(body, *match.groups())
                return self._answer(answer, status)
        self.hub.steps.append(f"unknown: {self.command} {self.path}")
        return self._answer({"error": "not found"}, 404)

    do_POST = do_PUT = do_HEAD = do_GET

    def _whoami(self, body: bytes) -> tuple[Any, int]:
        return {"name": "me", "type": "user", "orgs": [],
                "auth": {"accessToken": {"role": self.hub.role}}}, 200

    def _create(self, body: bytes) -> tuple[Any, int]:
        wish = json.loads(body)
        name = f"{wish['organization'] or 'me'}/{wish['name']}"
        if name in self.hub.files:
            return {"error": "You already created it", "url": f"{self.hub.url}/{name}"}, 409
        self.hub.files[name] = {".gitattributes": b""}
        self.hub.private[name] = wish.get("visibility") == "private" or wish.get("private") is True
        return {"url": f"{self.hub.url}/{name}"}, 200

    def _info(self, body: bytes, name: str) -> tuple[Any, int]:
        if name not in self.hub.files:
            return {"error": "not found"}, 404
        files = [{"rfilename": path} for path in self.hub.files[name]]
        return {"id": name, "sha": COMMIT, "siblings": files}, 200

    def _resolve(self, name: str, path: str) -> None:
        """A file of a repository, for who may read it."""
        data = self.hub.files.get(name, {}).get(path)
        self.hub.steps.append(f"{self.command} {name} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if data is None:
            code = "EntryNotFound" if name in self.hub.files else "RepoNotFound"
            return self._answer({"error": code}, 404, {"X-Error-Code": code, **REVISION})
        return self._send(data, 200, {"ETag": hashlib.sha256(data).hexdigest(), **REVISION})

    def _preupload(self, body: bytes, name: str) -> tuple[Any, int]:
        return {"files": [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]]}, 200

    def _tree(self, body: bytes, name: str) -> tuple[Any, int]:
        return [{"type": "file", "path": path, "size": len(data), "oid": COMMIT}
                for path, data in self.hub.files[name].items()], 200

    def _validate(self, body: bytes) -> tuple[Any, int]:
        """The metadata has to be YAML of the kinds that the hub knows."""
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        kinds = {"library_name": str, "pipeline_tag": str, "base_model": str, "tags": list}
        wrong = [key for key, value in head.items() if not isinstance(value, kinds[key])]
        errors = [{"message": key} for key in wrong]
        return {"errors": errors, "warnings": []}, 400 if wrong else 200

    def _batch(self, body: bytes, name: str) -> tuple[Any, int]:
        return {"transfer": "basic", "objects": [
            {**thing, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}"}}}
            for thing in json.loads(body)["objects"]]}, 200

    def _lfs(self, body: bytes, oid: str) -> tuple[Any, int]:
        self.hub.blobs[oid] = body
        return {}, 200 if hashlib.sha256(body).hexdigest() == oid else 400

    def _commit(self, body: bytes, name: str) -> tuple[Any, int]:
        files = self.hub.files[name]
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.hub.commits.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return {"error": key}, 400
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}, 200

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, answer: Any, status: int, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(answer).encode(), status,
                   {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass
