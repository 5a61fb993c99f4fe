"""A stand-in for the Hugging Face Hub: the part of its HTTP API that fasttrain needs, in a thread.

It knows one user, `me` with the token `hf_me`, and keeps the files of all repositories in memory.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_me"
COMMIT = "0" * 39


class Hub(ThreadingHTTPServer):
    """The server. `repos` has the files of each repository by name, and `log` all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield self
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["lfs", digest]:
                hub.blobs[digest] = body
                assert hashlib.sha256(body).hexdigest() == digest
                self._answer({})
            case ["api", "validate-yaml"]:
                yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
                self._answer({})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest, body)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                upload = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self._answer({"transfer": "basic", "objects": upload})
            case [owner, name, "resolve", _, *file]:
                self._file(f"{owner}/{name}", "/".join(file))
            case _:
                self._refuse(404, "")

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        if not self._may_read(repo):
            return
        files = self.server.repos[repo]
        if rest[:1] in (["preupload"], ["commit"]) and not self._may_write(repo.split("/")[0]):
            return
        if rest[:1] == ["preupload"]:
            modes = []
            for path in (file["path"] for file in json.loads(body)["files"]):
                mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
                modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            self._answer({"files": modes})
        elif rest[:1] == ["commit"]:
            self._commit(repo, [json.loads(line) for line in body.splitlines()])
        elif rest[:1] == ["tree"]:
            self._answer([{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer({"id": repo, "sha": self._sha(), "siblings": siblings, "tags": [], "downloads": 0})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if not self._may_write(wanted["organization"]):
            return
        exists = repo in self.server.repos
        self.server.repos.setdefault(repo, {})
        # Versions before 1.0 send `private`.
        if "private" in (wanted.get("visibility"), *[key for key, value in wanted.items() if value is True]):
            self.server.private.add(repo)
        self._answer({"url": f"{self.server.url}/{repo}"}, 409 if exists else 200)

    def _commit(self, repo: str, operations: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo]
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "header":
                self.server.commits.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self._answer(
            {"commitUrl": f"{self.server.url}/{repo}/commit/{self._sha()}", "commitOid": self._sha()}
        )

    def _file(self, repo: str, path: str) -> None:
        if not self._may_read(repo):
            return
        content = self.server.repos[repo].get(path)
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self._sha()})

    def _sha(self) -> str:
        return f"{COMMIT}{len(self.server.commits) % 10}"

    def _is_me(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_read(self, repo: str) -> bool:
        # Like the Hub, which does not say whether a private repository exists.
        may = repo in self.server.repos and (repo not in self.server.private or self._is_me())
        if not may:
            self._refuse(404 if self._is_me() else 401, "RepoNotFound")
        return may

    def _may_write(self, owner: str) -> bool:
        may = self._is_me() and owner == "me"
        if not may:
            self._refuse(403 if self._is_me() else 401, "")
        return may

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
