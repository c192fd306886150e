"""Pushing to the hub what can be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
            ArtefactError: If something cannot be saved, or the hub refuses.
        """
        from .hub import push  # late: the hub's library is slow to import

        return push(
            repository,
            lambda folder: self._save(folder, repository, **details),
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )
