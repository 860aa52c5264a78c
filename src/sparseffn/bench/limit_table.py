"""The roofs of a machine, and the limits of the blocks under them, without timing any block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sparseffn.bench.head import result
from sparseffn.bench.layer import DENSE, DTYPES, LayerSettings, Shape
from sparseffn.bench.limits import expected_bytes, limit
from sparseffn.bench.machine import find_device
from sparseffn.bench.race import Say
from sparseffn.bench.roofline import Roof, measure_all


def bench_roofline(shapes: Sequence[Shape], settings: LayerSettings, *, say: Say = lambda text: None) -> dict[str, Any]:
    """Measured speeds, and what they allow each block at each number of tokens.

    Tokens are taken to choose their units evenly; `bench layer` counts what its tokens touch.

    Returns:
        The JSON-able result.

    Raises:
        UserError: the device is not there.
    """
    device = find_device(settings.device)
    say("measuring matrix products and bandwidth, with one thread and with all")
    # PyTorch multiplies float16 very slowly on many CPUs; whoever asks for it waits.
    names = ("float32", "bfloat16", *(["float16"] if settings.dtype == "float16" or device.type == "cuda" else []))
    speeds = measure_all([DTYPES[name] for name in names], device)
    own = next(s for s in speeds if s["threads"] == torch.get_num_threads() and s["dtype"] == settings.dtype)
    reading = own["reading"]
    roof = Roof(
        flops_per_s=own["product"]["flops_per_s"],
        bytes_per_s=reading["bytes_per_s"],
        scattered_bytes_per_s=reading["scattered"]["bytes_per_s"],
    )
    itemsize = DTYPES[settings.dtype].itemsize
    rows = []
    for shape in shapes:
        for label, config in {DENSE: shape.dense, **shape.methods}.items():
            for n_tokens in settings.tokens:
                row: dict[str, Any] = {"shape": shape.name, "label": label, "tokens": n_tokens}
                touched = expected_bytes(config, n_tokens=n_tokens, itemsize=itemsize)
                row["touched_bytes"] = touched
                for name, training in (("forward", False), ("training", True)):
                    bound = limit(config, roof, n_tokens=n_tokens, touched_bytes=touched, itemsize=itemsize, training=training)
                    row[name] = {**dataclasses.asdict(bound), "limit_s": bound.seconds}
                rows.append(row)
    return result("roofline", device, dataclasses.asdict(settings), speeds=speeds, rows=rows)
