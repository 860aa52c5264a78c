"""Layers make their tensors where their input is, and wait for no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseffn.ffn import list_methods, method_class

MAKE = torch.tensor


def demanding(*values: Any, **options: Any) -> Tensor:
    """`torch.tensor` that will not guess the device, which on a GPU would be the wrong one."""
    assert "device" in options, "torch.tensor makes a tensor on the CPU where no device is named"
    return MAKE(*values, **options)


@pytest.mark.parametrize("name", list_methods())
def test_references_name_the_device_of_what_they_make(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation, which is what the correctness check of the benchmark compares on a GPU."""
    monkeypatch.setattr(torch, "tensor", demanding)
    for config in method_class(name).examples():
        layer, x = config.build().eval(), torch.randn(3, config.d_model)
        assert layer.reference(x).shape == x.shape


@pytest.mark.parametrize("name", list_methods())
def test_no_step_reads_a_value(name: str) -> None:
    """On the meta device there is none: forward with statistics, masked too, and backward run without waiting for a device.

    BASE with a mask picks the tokens that it assigns, and assigns on the host.
    """
    for config in method_class(name).examples():
        with torch.device("meta"):
            layer = config.build()
        x = torch.randn(2, 6, config.d_model, device="meta", requires_grad=True)
        mask = torch.ones(2, 6, dtype=torch.bool, device="meta")
        for training in (False, True):
            for given in (None, mask) if name != "base" or not training else (None,):
                y, stats = layer.train(training)(x, mask=given, return_stats=True)
                (y.sum() + stats.balance_loss).backward()
                assert y.shape == x.shape and y.device.type == "meta"
