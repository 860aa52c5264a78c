"""Training of new blocks to compute what the dense ones computed: layer by layer, then all together.

layer by layer:  mean over tokens of |new(x) - dense(x)|^2 / max(|dense(x)|^2, m) + balancing loss, x the dense model's own,
                 m the median of |dense(x)|^2 over the step's tokens
end to end:      KL(dense model || new model), mean over tokens, + balancing losses; everything but the blocks is fixed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward, collect_stats
from sparseffn.hf.dense_blocks import DenseBlock
from sparseffn.hf.swap import keyed_generator, put

# Share of the steps over which the step size rises; it then falls to zero.
_WARMUP = 0.1
# A fitted router's step size over that of the rest: its small logits would else be overwritten in the first steps. Measured on
# block 15 of SmolLM2-135M, 64 experts of which half are kept, 200 steps of 1e-3: relative error 0.241 before, then 0.222 at 1,
# 0.187 at 0.1, 0.188 at 0.03, 0.189 with the router fixed.
_ROUTER_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Distil:
    """How long and how fast."""

    steps: int
    lr: float
    tokens: int
    """Tokens of a step."""
    seed: int = 0

    def optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Adam:
        """Routers in a group of their own."""
        routers = {name: p for name, p in parameters.items() if name.endswith("selector")}
        others = [p for name, p in parameters.items() if name not in routers]
        groups = [{"params": others, "share": 1.0}, {"params": list(routers.values()), "share": _ROUTER_SHARE}]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=self.lr, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Linear rise, linear fall."""
        rise = min(1.0, (step + 1) / max(_WARMUP * self.steps, 1.0))
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * self.lr * rise * (1 - step / self.steps)


def distil_block(layer: FeedForward, block: DenseBlock, inputs_TD: Tensor, how: Distil, name: str) -> None:
    """Train one float32 layer towards its dense block on stored inputs; what is drawn depends on the seed and the name."""
    optimizer = how.optimizer(dict(layer.named_parameters()))
    generator = keyed_generator(how.seed, "distil", name)
    layer.train()
    with _Seeded(how.seed, "distil", name):
        for step in range(how.steps):
            rows = torch.randint(len(inputs_TD), (how.tokens,), generator=generator)
            x_TD = inputs_TD[rows].to(block.keys.device)
            with torch.no_grad():
                wanted_TD = block(x_TD).float()
            y_TD, stats = layer(x_TD.float(), return_stats=True)
            loss = token_error(y_TD, wanted_TD) + stats.balance_loss
            how.set_lr(optimizer, step)
            _update(optimizer, loss, f"block {name}, step {step}")
    layer.eval()


def token_error(found_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    """Mean over tokens of the squared deviation over the wanted one's square, or over the median of those where it is larger.

    Some blocks answer to the first token of a text with outputs a thousand times as large as to others; in a sum of squares it
    would be the only one.
    """
    sizes_T = wanted_TD.square().sum(dim=1)
    return ((found_TD - wanted_TD).square().sum(dim=1) / sizes_T.clamp_min(float(sizes_T.median())).clamp_min(1e-30)).mean()


@torch.no_grad()
def block_error(layer: nn.Module, block: DenseBlock, inputs_TD: Tensor) -> float:
    """Mean over tokens of the squared deviation from the dense output over its square."""
    total = 0.0
    for x_TD in inputs_TD.split(1024):
        y_TD = block(x_TD).double()
        sizes_T = y_TD.square().sum(dim=1).clamp_min(1e-300)
        total += float(((layer(x_TD).double() - y_TD).square().sum(dim=1) / sizes_T).sum())
    return total / len(inputs_TD)


@final
class EndToEnd:
    """Distillation of a whole model whose blocks are exchanged for each forward; its state can be saved at any step."""

    def __init__(
        self, model: nn.Module, dense: Mapping[str, nn.Module], new: Mapping[str, nn.Module], windows: Tensor, how: Distil
    ) -> None:
        """Args: `model` in evaluation mode; `dense` and `new`, blocks by name, `new` in float32; `windows` `[n, context]`."""
        self.model, self.dense, self.windows, self.how = model, dense, windows, how
        dtype = next(model.parameters()).dtype
        self.new = {name: _InFloat32(layer, dtype) for name, layer in new.items()}
        self.parameters = {f"{name}:{key}": p for name, layer in new.items() for key, p in layer.named_parameters()}
        self.optimizer = how.optimizer(self.parameters)
        self.step = 0
        # What is fixed must not collect gradients.
        model.requires_grad_(False)

    def run(self, until: int, progress: Callable[[str], None]) -> None:
        """Steps up to `until`; the model has its dense blocks again afterwards."""
        device = next(self.model.parameters()).device
        n_windows = max(1, self.how.tokens // self.windows.shape[1])
        try:
            while self.step < until:
                generator = keyed_generator(self.how.seed, "end to end", self.step)
                chosen = torch.randint(len(self.windows), (n_windows,), generator=generator)
                with _Seeded(self.how.seed, "end to end", self.step):
                    loss, kl = self._loss(self.windows[chosen].to(device))
                    self.how.set_lr(self.optimizer, self.step)
                    _update(self.optimizer, loss, f"end to end, step {self.step}")
                self.step += 1
                progress(f"end to end, step {self.step} of {self.how.steps}: {kl:.4f} nats from the dense model")
        finally:
            put(self.model, self.dense)

    def _loss(self, ids: Tensor) -> tuple[Tensor, float]:
        put(self.model, self.dense)
        with torch.no_grad():
            wanted = self.model(ids, use_cache=False).logits.float().log_softmax(-1)
        put(self.model, self.new)
        for layer in self.new.values():
            layer.train()
        with collect_stats(self.model) as stats:
            found = self.model(ids, use_cache=False).logits.float().log_softmax(-1)
        for layer in self.new.values():
            layer.eval()
        kl = F.kl_div(found.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean")
        return kl + stats.balance_loss, float(kl.detach())

    def state(self) -> dict[str, Tensor]:
        """Parameters and the optimiser's moments, by name."""
        found = {f"parameter:{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {})
            found |= {f"{key}:{name}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` gave at a step."""
        for name, p in self.parameters.items():
            p.copy_(state[f"parameter:{name}"])
            self.optimizer.state[p] = {key: state[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        self.step = step


class _InFloat32(nn.Module):
    """A float32 block in a model of another dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(self.dtype)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, what: str) -> None:
    if not torch.isfinite(loss):
        raise UserError(f"the loss of the distillation must be finite; got {float(loss.detach())} at {what}; fix: a lower --lr")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class _Seeded:
    """PyTorch's global generator on a seed of its own, for dropout, and back as it was on leaving."""

    def __init__(self, seed: int, *key: object) -> None:
        self.seed = keyed_generator(seed, *key).initial_seed()

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: Any) -> None:
        torch.set_rng_state(self.state)
