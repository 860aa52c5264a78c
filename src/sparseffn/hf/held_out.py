"""What a conversion costs and saves: perplexity on held-out text, and tokens per second before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.hf.calibration import WINDOWS_AT_ONCE
from sparseffn.hf.swap import evaluating, put
from sparseffn.results.convert_result import Pass, Speed

# Of each pass: medians of as many; and the tokens that are decoded.
_ROUNDS = 5
_DECODED = 16


@torch.no_grad()
def window_nats(model: nn.Module, windows: Tensor) -> np.ndarray:
    """float64 `[n]`: mean cross-entropy in nats of each window's predictions, its first token is context alone.

    Raises:
        UserError: a loss is not finite.
    """
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for ids in windows.split(WINDOWS_AT_ONCE):
            logits = model(ids.to(device), use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].to(device).flatten(), reduction="none")
            found.append(losses.double().view(len(ids), -1).mean(dim=1).cpu())
    nats = torch.cat(found).numpy()
    if not np.isfinite(nats).all():
        raise UserError("the loss on held-out text must be finite; got another number; fix: look at the model's weights")
    return nats


@torch.inference_mode()
def speeds(model: nn.Module, ways: Mapping[str, Mapping[str, nn.Module]], ids: Tensor) -> list[Speed]:
    """Tokens per second of a prompt and of decoding by each way to fill the model's blocks; the ways take turns.

    Args:
        model: left with the blocks of the last way.
        ways: "before" and "after", blocks by name.
        ids: `[1, n]`, a window; its last tokens are decoded after the others.
    """
    n_decoded = min(_DECODED, ids.shape[1] // 2)
    n_prompt = ids.shape[1] - n_decoded
    ids = ids.to(next(model.parameters()).device)

    def prompt() -> None:
        model(ids[:, :n_prompt], use_cache=True)

    def decoding() -> Callable[[], None]:
        cache = model(ids[:, :n_prompt], use_cache=True).past_key_values

        def decode() -> None:
            kept = cache
            for one in ids[:, n_prompt:].split(1, dim=1):
                kept = model(one, past_key_values=kept, use_cache=True).past_key_values

        return decode

    passes: dict[Pass, tuple[int, Callable[[], Callable[[], None]]]] = {
        "prompt": (n_prompt, lambda: prompt),
        "decoding": (n_decoded, decoding),
    }
    with evaluating(model):
        return [_speed(name, model, ways, n_tokens, make) for name, (n_tokens, make) in passes.items()]


def _speed(
    name: Pass,
    model: nn.Module,
    ways: Mapping[str, Mapping[str, nn.Module]],
    n_tokens: int,
    make: Callable[[], Callable[[], None]],
) -> Speed:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    # The first round warms up.
    for _ in range(_ROUNDS + 1):
        for way, blocks in ways.items():
            put(model, blocks)
            call = make()
            start = time.perf_counter()
            call()
            taken[way].append(time.perf_counter() - start)
    before, after = taken["before"][1:], taken["after"][1:]
    return Speed(
        what=name,
        tokens=n_tokens,
        before=n_tokens / statistics.median(before),
        after=n_tokens / statistics.median(after),
        times_faster=statistics.median(b / a for b, a in zip(before, after, strict=True)),
    )
