"""The hub as a folder: `push_to_hub` runs to its end, upload included, and what it would have sent can be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import hub


class FolderHub:
    """In place of `HfApi`: repositories are folders of `root`, by their names."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.commits: list[set[str]] = []
        """Files of each upload."""
        self.repo_id = ""
        monkeypatch.setattr(hub, "hf_api", lambda: self)
        monkeypatch.setattr(ModelCard, "load", self.load_card)

    def create_repo(self, repo_id: str, **kwargs: Any) -> FolderHub:
        self.repo_id = repo_id
        (self.root / repo_id).mkdir(parents=True, exist_ok=kwargs["exist_ok"])
        return self

    def load_card(self, repo_id: str, **kwargs: Any) -> ModelCard:
        path = self.root / repo_id / "README.md"
        if not path.exists():
            raise LocalEntryNotFoundError(str(path))
        return ModelCard(path.read_text())

    def create_commit(self, repo_id: str, operations: Sequence[CommitOperationAdd], **kwargs: Any) -> None:
        for operation in operations:
            shutil.copyfile(operation.path_or_fileobj, self.root / repo_id / operation.path_in_repo)
        self.commits.append({operation.path_in_repo for operation in operations})
