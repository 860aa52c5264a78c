"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sparseffn.storage import default_cache_dir


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    """Each test starts from one generator state and leaves the next one's alone."""
    state = torch.get_rng_state()
    torch.manual_seed(42)
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token files go to a folder of the session, never to the user's cache; compiled kernels are the user's own."""
    cache, kernels = tmp_path_factory.mktemp("cache"), default_cache_dir() / "kernels"
    # Named after their sources, flags, compiler and processor, they cannot be wrong, and take a minute to compile.
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(kernels, target_is_directory=True)
    before = os.environ.get("SPARSEFFN_CACHE")
    os.environ["SPARSEFFN_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["SPARSEFFN_CACHE"]
    else:
        os.environ["SPARSEFFN_CACHE"] = before
