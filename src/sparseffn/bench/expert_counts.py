"""Does a layer's time depend on how many experts it does not use? Many against few, interleaved in one run (figure 9).

Forward reads the experts that tokens choose; forward and backward also write the gradients of all experts, whose bytes stand
beside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparseffn.bench.backends import resolved
from sparseffn.bench.candidates import Candidate
from sparseffn.bench.layer import LayerSettings, over_limits
from sparseffn.bench.race import Say, race
from sparseffn.bench.roofline import Roof
from sparseffn.bench.sweeps import SWEEPS
from sparseffn.bench.timing import ratio, spread

COUNTS = (8, 256)
"""The ends of the paper's figure 9."""
N_TOKENS = 4096


def bench_expert_counts(
    settings: LayerSettings, *, counts: tuple[int, int] = COUNTS, n_tokens: int = N_TOKENS, say: Say = lambda text: None
) -> dict[str, Any]:
    """Time of sigma-MoE with figure 9's experts, the larger number of them over the smaller.

    Args:
        settings: rounds, dtype, device and the backend, the first of those named.
        counts: numbers of experts, few and many.
        n_tokens: of a call.
        say: told what is being done.

    Raises:
        UserError: a kernel is wrong.
    """
    setting, backend = settings.setting(n_tokens), settings.backends[0]
    few, many = (f"N_E {count}" for count in counts)
    candidates = [
        Candidate(label=label, config=SWEEPS[9].mixture(count), backend=backend)
        for label, count in zip((few, many), counts, strict=True)
    ]
    roof = Roof.measure(setting.dtype, setting.device)
    done = race(candidates, setting, rounds=settings.rounds, cold_tokens=0, say=say)
    roof = roof.highest(Roof.measure(setting.dtype, setting.device))
    limits = {c.label: over_limits(c, done, setting, roof) for c in candidates}
    layers = {
        c.label: {
            "forward": {**dataclasses.asdict(spread(done.forward[c.label])), **limits[c.label]["forward"]},
            "training": {**dataclasses.asdict(spread(done.training[c.label])), **limits[c.label]["training"]},
            "gradient_bytes": c.config.num_params() * setting.dtype.itemsize,
        }
        for c in candidates
    }
    return {
        "tokens": n_tokens,
        "fixed": SWEEPS[9].fixed,
        "backend": resolved(backend, setting.device, setting.dtype),
        "layers": layers,
        "forward_over_few": ratio(done.forward, many, few),
        "training_over_few": ratio(done.training, many, few),
    }
