"""Artefacts on the Hugging Face hub, by huggingface_hub's own functions."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypedDict

from .artefacts import CARD, CONFIG, WEIGHTS, library_version
from .errors import CheckpointError

_LIBRARY = "selftrans-reg"


class Source(TypedDict, total=False):
    """Where on the hub, and how to get there; :func:`fetch` describes each."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | PathLike[str] | None
    local_files_only: bool


def fetch(
    name: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of an artefact: a local one, or a copy in the cache of a repository ``"owner/name"`` on the hub.

    A local folder of that name comes first. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` mean what
    huggingface_hub says.

    Args:
        name: A folder or a repository.
        revision: The repository's branch, tag or commit.
        token: An access token for private repositories; True for the stored one, False for none.
        cache_dir: Where copies are kept.
        local_files_only: Take the copy that is there, and ask nobody.

    Raises:
        CheckpointError: If there is no such folder, or the repository cannot be read.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{str(folder)!r} is a local folder, which has no revision {revision!r}: leave it out."
            )
        return folder
    repository = fspath(name)
    is_repository = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
    if not is_repository or (revision is None and folder.parent.is_dir()):
        raise CheckpointError(
            f"There is no folder {repository!r}.\n"
            "A repository on the hub is named 'owner/name'; if there is a folder called like its owner here, name a "
            "revision too, such as revision='main'."
        )
    from huggingface_hub import snapshot_download

    try:
        copy = snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS],
            library_name=_LIBRARY,
            library_version=library_version(),
        )
    except Exception as error:  # its own, of the HTTP library, of the file system
        raise CheckpointError(f"{repository!r} cannot be read from the hub: {type(error).__name__}: {error}") from error
    return Path(copy)


def push(
    repository: str,
    save: Callable[[Path], None],
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload what ``save`` writes, creating the repository if there is none; the address of the commit.

    A ``README.md`` that the repository already has stays.

    Raises:
        CheckpointError: If the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name=_LIBRARY, library_version=library_version())
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            created = api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(created.repo_id, branch=revision, exist_ok=True)
            has_card = api.file_exists(created.repo_id, CARD, revision=revision)
            commit = api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=[CARD] if has_card else None,
            )
        except Exception as error:
            raise CheckpointError(f"The upload to {repository!r} failed: {type(error).__name__}: {error}") from error
    return commit.commit_url


class Shareable:
    """What teacher and criterion share: an upload of what ``save_pretrained`` saves."""

    _save: Callable[..., None]  # (folder, name, **details): saves; the model card calls it by the name

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload by selftrans_reg",
        **details: Any,
    ) -> str:
        """Save as ``save_pretrained`` does and upload that to the hub.

        Args:
            repository: ``"owner/name"``; created if there is none.
            private: Whether a new repository is private.
            token: An access token that may write; by default the stored one.
            revision: The branch; created if there is none.
            commit_message: Of the upload.
            **details: As for ``save_pretrained``.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: If something cannot be saved, or the hub refuses.
        """
        return push(
            repository,
            lambda folder: self._save(folder, repository, **details),
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )
