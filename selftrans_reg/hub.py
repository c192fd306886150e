"""Artefacts on the Hugging Face hub, by huggingface_hub's own functions."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from .artefacts import CARD, CONFIG, WEIGHTS, library_version, write_artefact
from .checkpoints import local_path, wrapped_errors
from .errors import CheckpointError

_LIBRARY = "selftrans-reg"


class Source(TypedDict, total=False):
    """Where on the hub, and how to get there.

    Attributes:
        revision: The repository's branch, tag or commit.
        token: An access token for private repositories; True for the stored one, False for none.
        cache_dir: Where copies are kept.
        local_files_only: Take the copy that is there, and ask nobody.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | PathLike[str] | None
    local_files_only: bool


def fetch(name: str | PathLike[str], **source: Unpack[Source]) -> Path:
    """The folder of an artefact: a local one, or a copy in the cache of a repository ``"owner/name"`` on the hub.

    A local folder of that name comes first. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` mean what
    huggingface_hub says.

    Raises:
        CheckpointError: If there is no such folder, or the repository cannot be read.
    """
    revision, cache = source.get("revision"), source.get("cache_dir")
    folder = local_path(name)
    with wrapped_errors(folder):  # such as of a name that is too long, or a folder that may not be read
        is_local, in_local = folder.is_dir(), folder.parent.is_dir()
    if is_local:
        if revision is not None:
            raise CheckpointError(
                f"{str(folder)!r} is a local folder, which has no revision {revision!r}: leave it out."
            )
        return folder
    is_repository = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
    if not is_repository or (revision is None and in_local):
        raise CheckpointError(
            f"There is no folder {str(folder)!r}.\n"
            "A repository on the hub is named 'owner/name'; if there is a folder called like its owner here, name a "
            "revision too, such as revision='main'."
        )
    with _hub_errors(f"{str(name)!r} cannot be read from the hub"):
        from huggingface_hub import snapshot_download

        copy = snapshot_download(
            str(name),
            revision=revision,
            token=_plain(source.get("token")),
            cache_dir=None if cache is None else Path(cache),
            local_files_only=source.get("local_files_only", False),
            allow_patterns=[CONFIG, WEIGHTS],
            library_name=_LIBRARY,
            library_version=library_version(),
        )
    return Path(copy)


def _plain(token: str | bool | None) -> str | bool | None:
    """The token as a header can carry it: one that was read from a file ends with a newline."""
    token = token.strip() if isinstance(token, str) else token
    if isinstance(token, str) and re.fullmatch(r"[!-~]+", token) is None:
        raise CheckpointError("The token that was given is empty or has characters that no token has: copy it again.")
    return token


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP library and the system raise into ours, without any token."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = re.sub(r"(hf_|Bearer |api_org_)[^\s'\"]+", r"\1…", f"{type(error).__name__}: {error}")[:2000]
        # What the error was made from may show the token in a traceback.
        raise CheckpointError(f"{what}: {text}") from (error if "…" not in text else None)


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
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        with _hub_errors(f"The upload to {repository!r} failed"):
            from huggingface_hub import HfApi

            api = HfApi(token=_plain(token), library_name=_LIBRARY, library_version=library_version())
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
    return commit.commit_url


class Details(TypedDict, total=False):
    """What a teacher cannot know of itself; :meth:`Shareable.save_pretrained` describes each."""

    source: str | None
    step: int | None
    latent_scale: float | None
    latent_shape: Sequence[int] | None
    licence: str | None


class Shareable:
    """What can be saved in a folder and pushed to the hub, given as plain values and tensors."""

    plain: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]

    def save_pretrained(self, directory: str | PathLike[str], **details: Unpack[Details]) -> None:
        """Save weights, settings and a model card, for :meth:`from_pretrained`.

        What the first call has dropped is not saved; before it the whole model is. Functions (a null condition,
        ``select``, ``tokens``, a time convention of your own) are saved by name only, and loading asks for them. An
        older teacher in the folder is replaced, atomically; a ``README.md`` that is there stays. In a distributed run,
        call this on one rank.

        Args:
            directory: The folder; made if there is none.
            **details: What the teacher cannot know, all optional: ``source``, the run that it comes from, in words or
                as an address; ``step``, at which the weights were taken; ``latent_scale`` and ``latent_shape``, the
                factor on the VAE's latents and their (C, H, W); ``licence`` of the weights. They are kept in
                ``teacher.provenance``.

        Raises:
            CheckpointError: If the folder holds something else, something cannot be saved, or the disk is full.
        """
        folder = local_path(directory)
        self._save(folder, folder.name, **details)

    def _save(self, folder: Path, name: str, **details: Unpack[Details]) -> None:
        write_artefact(folder, *self.plain(**details), name)

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
