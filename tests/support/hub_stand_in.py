"""A stand-in for the hub: the HTTP endpoints that huggingface_hub asks, served from memory on 127.0.0.1.

Repositories with branches and commits, private ones, git and LFS uploads. ``requests`` lists what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download

TOKEN = "hf_stand_in"  # may read and write everything


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; the id of the commit."""
        content = {**self.commits[self.branches[branch]], **files}
        names = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(content.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {names}".encode()).hexdigest()
        self.commits[sha] = content
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class Hub:
    """The repositories, the log of requests, and the server while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lfs: dict[str, bytes] = {}
        self.endpoint = ""

    def add(self, name: str, folder: Path | dict[str, bytes], *, private: bool = False) -> str:
        """A repository with the files of a folder; the id of its commit."""
        files = folder if isinstance(folder, dict) else {p.name: p.read_bytes() for p in folder.iterdir()}
        return self.repositories.setdefault(name, Repository(private)).commit(files)

    def downloads(self) -> list[str]:
        """The paths of the files that were downloaded."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", line) for line in self.requests)
        return sorted(match[1] for match in found if match)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, endpoint in _ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                endpoint(self, **match.groupdict())
                return
        self._send(404, {"error": f"no endpoint {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _send(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str) -> Repository | None:
        """The repository, if the asker may see it; else the answer is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may_write):
            self._send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def _content(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        sha = repository.find(revision)
        if sha is None:
            self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return sha, repository.commits[sha]

    # --- Reading

    def info(self, name: str, revision: str) -> None:
        if found := self._content(name, revision):
            sha, files = found
            files = [{"rfilename": file} for file in files]
            private = self.hub.repositories[name].private
            self._send(200, {"id": name, "sha": sha, "private": private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self._content(name, revision):
            entries = []
            for path, data in found[1].items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
                if path.endswith(".safetensors"):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self._send(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if found := self._content(name, revision):
            sha, files = found
            if path not in files:
                self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
                return
            data = files[path]
            tag = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else _git_id(data)
            self._send(200, data, ETag=f'"{tag}"', X_Repo_Commit=sha, X_Linked_Size=str(len(data)))

    # --- Writing

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write:
            self._send(401, {"error": "Invalid credentials"})
        elif name in self.hub.repositories:
            self._send(409, {"error": "exists", "url": f"{self.hub.endpoint}/{name}"})
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[name] = Repository(private)
            self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        if repository := self._repository(name):
            known = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self._send(409 if known else 200, {})

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        licence = re.search(r'^license: "?([\w.-]+)"?$', header[1], re.MULTILINE) if header else None
        wrong = header is None or (licence is not None and licence[1] not in ("mit", "apache-2.0", "other"))
        self._send(400 if wrong else 200, {"errors": [{"message": "metadata"}] * wrong, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self.hub.lfs[oid] = self.body
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if not self.may_write:
            self._send(403, {"error": "read-only token"})
            return
        files = {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        sha = repository.commit(files, revision)
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ENDPOINTS = [
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>.+)", _Handler.tree),
    ("HEAD GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
]


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """A hub that answers, as the one that huggingface_hub asks in this process; its downloads go to ``cache``.

    What the environment variables HF_ENDPOINT, HF_HUB_OFFLINE=0, HF_HUB_CACHE and HF_HUB_DISABLE_XET=1 would have set
    when huggingface_hub was imported is set for the time being.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            # huggingface_hub's own upload calls its HTTP library in a deprecated way.
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            for name, value in settings.items():
                patch.setattr(constants, name, value)
                patch.setattr(file_download, name, value, raising=False)  # before release 1.0 it has its own copies
            patch.setenv("HF_TOKEN", "")  # none of whoever runs the tests
            yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
