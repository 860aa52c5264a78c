"""Where a corpus may be found on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from sparseffn.storage import default_cache_dir


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The user's folder and the cache."""

    # The user's file or folder, if one is given.
    data_dir: Path | None = None
    # Where downloads, unpacked text and tokens are kept.
    cache_dir: Path = field(default_factory=default_cache_dir)

    def corpus_dir(self, name: str) -> Path:
        """The cache's folder of a corpus."""
        return self.cache_dir / "corpora" / name
