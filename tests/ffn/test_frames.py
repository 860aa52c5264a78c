"""What stands between a layer and its kernels: decoding pays for every Python frame of it, once a layer and token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseffn
from sparseffn.ffn.sigma_moe import SigmaMoEConfig
from sparseffn.ops.cpu import build

# Counted 2026-11-28; a frame takes 0.1 to 0.3 us, the kernels of this token about 20.
MOST = 16


@pytest.mark.skipif(build.unavailable() is not None, reason="no compiled kernels here")
def test_a_token_passes_no_more_frames_than_it_did() -> None:
    """Of our own code, between `layer(x)` and the kernels of its route and its experts."""
    layer = SigmaMoEConfig(d_model=412, n_experts=16, expert_size=128, k=4).build().eval()
    x, folder, found = torch.randn(1, 412), str(Path(sparseffn.__file__).parent), []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            found.append(frame.f_code.co_name)

    with torch.inference_mode():
        layer(x)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(before)
    assert {"forward", "route", "experts"} <= set(found), "nothing was counted"
    assert len(found) <= MOST, found
