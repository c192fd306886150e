"""A stand-in for the hub: the calls of huggingface_hub's HfApi, by their real signatures, on repositories in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

TOKEN = "hf_stand_in"  # may read and write everything


@dataclass
class Repository:
    private: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})  # branches and commits


class HubError(OSError):
    """As huggingface_hub's own errors, which are several classes."""


class Hub:
    """The repositories, and what was asked of them; downloads go to the folder ``cache``."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; the id of the commit."""
        revisions = self.repositories.setdefault(name, Repository()).revisions
        revisions[branch] = {**revisions[branch], **files}
        commit = hashlib.sha1(repr(sorted(revisions[branch].items())).encode()).hexdigest()
        revisions[commit] = revisions[branch]
        return commit

    def _find(self, api: HfApi, name: str, revision: str | None = None, writes: bool = False) -> dict[str, bytes]:
        self.requests.append(name)
        allowed = (os.environ.get("HF_TOKEN") if api.token is None else api.token) == TOKEN
        repository = self.repositories.get(name)
        if repository is None or ((writes or repository.private) and not allowed):
            raise HubError(f"401 for {name}: not found, or not authenticated")
        if (revision or "main") not in repository.revisions:
            raise HubError(f"404 for {name}: no revision {revision}")
        return repository.revisions[revision or "main"]

    def create_repo(self, api: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        there = {repo_id: Repository(bool(private)), **self.repositories}
        with mock.patch.dict(self.repositories, there):
            self._find(api, repo_id, writes=True)
        self.repositories.update(there)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, api: HfApi, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        main = self._find(api, repo_id, writes=True)
        self.repositories[repo_id].revisions.setdefault(branch, main)

    def file_exists(self, api: HfApi, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return filename in self._find(api, repo_id, revision)

    def upload_folder(self, api: HfApi, *, repo_id: str, folder_path: str, revision: str | None, **options: Any) -> Any:
        self._find(api, repo_id, revision, writes=True)
        found = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        files = {name: found[name] for name in filter_repo_objects(found, ignore_patterns=options["ignore_patterns"])}
        if "README.md" in files:
            assert ModelCard(files["README.md"].decode()).data.license in (None, "mit", "other")  # or it is refused
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{self.add(repo_id, files, revision or 'main')}")

    def snapshot_download(
        self, api: HfApi, repo_id: str, *, revision: str | None = None, cache_dir: Path | None = None, **options: Any
    ) -> str:
        folder = (cache_dir or self.cache) / repo_id.replace("/", "--") / (revision or "main")
        if not options.get("local_files_only"):
            files = self._find(api, repo_id, revision)
            folder.mkdir(parents=True, exist_ok=True)
            for name in filter_repo_objects(files, allow_patterns=options["allow_patterns"]):
                (folder / name).write_bytes(files[name])
        elif not folder.exists():
            raise HubError(f"no copy of {repo_id} in the cache")
        return str(folder)


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """The hub that huggingface_hub asks while inside."""
    hub = Hub(cache)
    with ExitStack() as stack:
        for name in ("create_repo", "create_branch", "file_exists", "upload_folder", "snapshot_download"):
            patched = mock.patch.object(HfApi, name, autospec=True, side_effect=getattr(hub, name))
            stack.enter_context(patched)
        yield hub
