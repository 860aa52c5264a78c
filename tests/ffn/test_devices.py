"""References of layers make their tensors where their input is."""

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
    """In evaluation, which is what the gate of the benchmark compares on a GPU."""
    monkeypatch.setattr(torch, "tensor", demanding)
    for config in method_class(name).examples():
        layer, x = config.build().eval(), torch.randn(3, config.d_model)
        assert layer.reference(x).shape == x.shape
