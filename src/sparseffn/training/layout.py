"""Devices that a run is spread over, and what must divide by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sparseffn.errors import UserError, unknown_name
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig
from sparseffn.training.config import TrainConfig
from sparseffn.training.step_costs import MicroBatch

Strategy = Literal["ddp", "ep", "fsdp", "ep-fsdp"]
"""`ddp`: parameters and optimiser whole in every process; `ep`: but each process has its part of a mixture's experts, to which
the tokens go; `fsdp`: every tensor sharded, gathered layer by layer; `ep-fsdp`: but the experts spread, as `ep` does."""
Kept = Literal["ddp", "fsdp"]

# More than anybody has.
_MOST_GPUS = 2**20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices, and what is spread over them."""

    gpus: int = 1
    strategy: Kept = "ddp"
    """`ddp`: parameters and optimiser whole on every device; `fsdp`: sharded over them."""
    expert_parallel: int = 1
    """Devices that the experts of a layer are spread over; each such group holds all of them."""
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Kept):
            raise unknown_name("`--strategy`", self.strategy, get_args(Kept))
        if not 1 <= self.gpus <= _MOST_GPUS:
            raise UserError(f"`--gpus` must be 1 to {_MOST_GPUS}; got {self.gpus}; fix: --gpus 1 is one device")
        if self.expert_parallel < 1 or self.gpus % self.expert_parallel:
            raise UserError(
                f"`--expert-parallel` must divide --gpus {self.gpus}; got {self.expert_parallel}; "
                f"fix: one of {_some_divisors(self.gpus)}"
            )

    @classmethod
    def of(cls, n_processes: int, strategy: Strategy, device_type: str) -> Layout:
        """That of a run in so many processes.

        Raises:
            UserError: there is no such strategy.
        """
        if strategy not in get_args(Strategy):
            raise unknown_name("`strategy`", strategy, get_args(Strategy))
        spread = n_processes if strategy in ("ep", "ep-fsdp") else 1
        kept: Kept = "fsdp" if strategy in ("fsdp", "ep-fsdp") else "ddp"
        return cls(gpus=n_processes, strategy=kept, expert_parallel=spread, device_type=device_type)

    def check(self, model: ModelConfig, train: TrainConfig) -> None:
        """Refuse a run that cannot be spread so.

        Raises:
            UserError: streams or experts do not divide, the method has no experts to spread, or shards have scaled gradients.
        """
        self.micro_batch(train)
        _check_experts(model, self.expert_parallel)
        in_shards = self.strategy == "fsdp" or self.expert_parallel > 1
        if self.gpus > 1 and in_shards and train.precision == "float16":
            raise UserError(
                "`--precision` must be float32 or bfloat16 where parameters are in shards; got float16, whose scaled gradients "
                "are looked at by shard; fix: --precision bfloat16"
            )

    def micro_batch(self, train: TrainConfig) -> MicroBatch:
        """What one device computes at a time.

        Raises:
            UserError: the streams do not divide.
        """
        parts = self.gpus * train.accumulation
        if train.batch % parts:
            down = train.batch - train.batch % parts
            fits = f"{down} or {down + parts}" if down else str(parts)
            raise UserError(
                f"`--batch` must be a multiple of processes x accumulation = {self.gpus} x {train.accumulation}; "
                f"got {train.batch}; fix: --batch {fits}"
            )
        return MicroBatch(
            n_streams=train.batch // parts,
            context=train.context,
            memory=train.memory,
            precision=train.precision,
            device_type=self.device_type,
        )


def expert_params(model: ModelConfig) -> int:
    """Parameters of a layer's experts."""
    ffn = model.ffn
    return ffn.n_products * ffn.n_channels * ffn.d_model if isinstance(ffn, MixtureConfig) else 0


def _check_experts(model: ModelConfig, n: int) -> None:
    """Refuse experts that cannot be spread over n devices."""
    ffn = model.ffn
    if n == 1:
        return
    if not isinstance(ffn, MixtureConfig):
        raise UserError(f"experts can be spread over 1 device for {ffn.name}, which has none; got {n}; fix: spread none")
    if ffn.survivors is not None:
        raise UserError(f"`inner_k` must be none where experts are spread; got {ffn.survivors}; fix: leave it out")
    if ffn.n_experts % n:
        raise UserError(
            f"the devices that share experts must divide the {ffn.n_experts} of a layer; got {n}; "
            f"fix: one of {_some_divisors(ffn.n_experts)}, or another expert_size"
        )


def _some_divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
