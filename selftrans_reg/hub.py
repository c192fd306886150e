"""Artefacts on the Hugging Face hub, by huggingface_hub's own functions."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .artefacts import CARD, CONFIG, WEIGHTS, library_version, write_artefact
from .checkpoints import local_path, wrapped_errors
from .errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi  # imported late: it takes a second
    from typing_extensions import Unpack


class Source(TypedDict, total=False):
    """Where on the hub, and how to get there."""

    revision: str | None  # branch, tag or commit
    token: str | bool | None  # for private repositories; True for the stored one, False for none
    cache_dir: str | Path | None
    local_files_only: bool  # take the copy that is there, and ask nobody


def fetch(name: str | PathLike[str], **source: Unpack[Source]) -> Path:
    """The folder of an artefact: a local one first, else a copy in the cache of the repository ``"owner/name"``.

    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` mean what huggingface_hub says.
    """
    revision, folder = source.get("revision"), local_path(name)
    with wrapped_errors(folder):  # such as of a name that is too long, or a folder that may not be read
        is_local, in_local = folder.is_dir(), folder.parent.is_dir()
    if is_local and revision is not None:
        raise CheckpointError(f"{str(folder)!r} is a local folder, which has no revision {revision!r}: leave it out.")
    if is_local:
        return folder
    is_repository = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None
    if not is_repository or (revision is None and in_local):
        raise CheckpointError(
            f"There is no folder {str(folder)!r}.\n"
            "A repository on the hub is named 'owner/name'; if there is a folder called like its owner here, name a "
            "revision too, such as revision='main'."
        )
    with _hub(f"{str(name)!r} cannot be read from the hub", source.pop("token", None)) as api:
        return Path(api.snapshot_download(str(name), **source, allow_patterns=[CONFIG, WEIGHTS]))


@contextmanager
def _hub(what: str, token: str | bool | None) -> Iterator[HfApi]:
    """The hub's functions; whatever they, their HTTP library and the system raise is ours."""
    from huggingface_hub import HfApi

    token = token.strip() if isinstance(token, str) else token  # one that was read from a file ends with a newline
    if isinstance(token, str) and re.fullmatch(r"[!-~]+", token) is None:  # an HTTP library's error would show it
        raise CheckpointError("The token that was given is empty or has characters that no token has: copy it again.")
    try:
        yield HfApi(token=token, library_name="selftrans-reg", library_version=library_version())
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {str(error)[:2000]}") from error


class Details(TypedDict, total=False):
    """What a teacher cannot know of itself; :meth:`Shareable.save_pretrained` describes each."""

    source: str | None
    step: int | None
    latent_scale: float | Sequence[float] | None
    latent_shift: float | Sequence[float] | None
    latent_shape: Sequence[int] | None
    licence: str | None


class Shareable:
    """What can be saved in a folder and pushed to the hub, given as plain values and tensors."""

    plain: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]

    def save_pretrained(self, directory: str | PathLike[str], **details: Unpack[Details]) -> None:
        """Save weights, settings and a model card, for :meth:`from_pretrained`.

        What the first call has dropped is not saved; before it the whole model is. Functions (a null condition,
        ``select``, ``tokens``, a time convention of your own) are saved by name only, and loading asks for them. An
        older teacher in the folder is replaced, atomically; a ``README.md`` that is there stays. Call it on one rank.

        Args:
            directory: The folder; made if there is none.
            **details: What the teacher cannot know, all optional: ``source``, the run that it comes from, in words or
                as an address; ``step``, at which the weights were taken; ``latent_scale`` and ``latent_shift``, of
                latents that were (VAE's − shift) · scale, each a number or one a channel; ``latent_shape``, their
                (C, H, W); ``licence`` of the weights. They are kept in ``teacher.provenance``.

        Raises:
            CheckpointError: If the folder holds something else, something cannot be saved, or the disk is full.
        """
        folder = local_path(directory)
        write_artefact(folder, *self.plain(**details), folder.name)

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
        """Save as ``save_pretrained`` does and upload that to the hub; a ``README.md`` that is there stays.

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
            CheckpointError: If something cannot be saved, or the hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            write_artefact(Path(folder), *self.plain(**details), repository)
            with _hub(f"The upload to {repository!r} failed", token) as api:
                name = api.create_repo(repository, private=private, exist_ok=True).repo_id
                if revision is not None:
                    api.create_branch(name, branch=revision, exist_ok=True)
                kept = [CARD] if api.file_exists(name, CARD, revision=revision) else []
                commit = api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    ignore_patterns=kept,
                )
        return commit.commit_url
