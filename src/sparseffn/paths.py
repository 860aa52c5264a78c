"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$SPARSEFFN_CACHE`, else `$XDG_CACHE_HOME/sparseffn`, else `~/.cache/sparseffn`."""
    if chosen := os.environ.get("SPARSEFFN_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sparseffn"
    return Path.home() / ".cache" / "sparseffn"
