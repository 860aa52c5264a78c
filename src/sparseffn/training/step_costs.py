"""What a training step costs in closed form: FLOPs, the bytes that it keeps for its backward pass, and its peak of memory.

FLOPs count 2 for each multiply-add of a matrix product; backward is twice the forward, and what a kernel computes again is not
counted.

Bytes are those of every tensor that autograd keeps from a micro-batch's forward pass, term by term; tests hold them against the
tensors that it really keeps and against the allocator's peak. Beside them a backward pass needs room to work in, which is
counted by its largest tensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseffn.accounting import BACKWARD_OVER_FORWARD
from sparseffn.devices import Precision
from sparseffn.ffn.mixture import MixtureConfig
from sparseffn.models import ModelConfig, TransformerXLConfig
from sparseffn.models.decoder_config import DecoderConfig
from sparseffn.models.relative_mix import scores_held
from sparseffn.training.config import TrainConfig

FLOAT = 4
"""Bytes of what is float32 whatever the precision: parameters, gradients, moments, residual stream, norms, losses."""
INDEX = 8
"""Bytes of a token's number."""
# Score matrices that the attention's backward pass holds of a block: scores, position scores, gradients of weights and scores.
_SCORE_TENSORS = 4


def forward_flops(model: ModelConfig, train: TrainConfig) -> float:
    """FLOPs a token of a training forward: attention over the memory too, blocks with selector, output."""
    if isinstance(model, DecoderConfig):
        attention = _decoder_attention_flops(model, train)
    else:
        attention = _relative_attention_flops(model, train)
    layer = attention + model.ffn.forward_flops(training=True)
    return model.n_layers * layer + 2 * model.d_model * model.vocab_size


def _relative_attention_flops(model: TransformerXLConfig, train: TrainConfig) -> float:
    width, n_keys = model.n_heads * model.d_head, train.context + train.memory
    # Query and output of the window; keys and values of the memory as well.
    projections = 2 * model.d_model * width * (2 + 2 * n_keys / train.context)
    # The distances are the same for all sequences.
    positions = 2 * model.d_model * width * (n_keys + 1) / (train.batch * train.context)
    mixing = 2 * width * (2 * n_keys + n_keys + 1)
    return projections + positions + mixing


def _decoder_attention_flops(model: DecoderConfig, train: TrainConfig) -> float:
    # Scores and mixed values of the whole window, as if there were no future.
    return 2 * model.attention_params() + 4 * model.n_heads * model.d_head * train.context


def step_flops(model: ModelConfig, train: TrainConfig) -> float:
    """FLOPs of one training step, of all micro-batches on all devices."""
    return (1 + BACKWARD_OVER_FORWARD) * forward_flops(model, train) * train.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one device computes at a time."""

    n_streams: int
    context: int
    memory: int
    """Positions before the window."""
    precision: Precision = "float32"
    device_type: str = "cuda"

    @property
    def n_tokens(self) -> int:
        return self.n_streams * self.context

    @property
    def n_keys(self) -> int:
        """Positions of memory and window."""
        return self.memory + self.context

    @property
    def half(self) -> bool:
        """Whether products are computed in two bytes, under autocast."""
        return self.precision != "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.half else FLOAT

    def mask_bytes(self, itemsize: int) -> int:
        """Bytes a number of what dropout keeps: on a CPU the factors themselves, in the dtype of what is dropped."""
        return itemsize if self.device_type == "cpu" else 1


@dataclass(frozen=True, kw_only=True)
class KeptBytes:
    """What a micro-batch's forward pass keeps for its backward pass."""

    attention: int
    """Of one layer, with its norm, residual and dropout."""
    feedforward: int
    """Of one layer, with its norm, residual and dropout; the block's own part is `FFNConfig.saved_bytes`."""
    output: int
    """Embedding, last norm, output projection and the logarithms of the probabilities."""
    casts: int
    """Copies of parameters in the dtype of autocast."""
    n_layers: int

    @property
    def total(self) -> int:
        return self.n_layers * (self.attention + self.feedforward) + self.output + self.casts


def kept_bytes(model: ModelConfig, batch: MicroBatch) -> KeptBytes:
    """Bytes of every tensor that autograd keeps of a forward pass with its loss, without parameters."""
    attention = _decoder_attention(model, batch) if isinstance(model, DecoderConfig) else _relative_attention(model, batch)
    dropped = model.dropout > 0
    stream = batch.n_tokens * model.d_model
    mask = stream * batch.mask_bytes(batch.itemsize) if dropped else 0
    norm = _norm_bytes(model, batch, batch.n_tokens)
    block = model.ffn.input_bytes(batch.n_tokens, half=batch.half) + model.ffn.saved_bytes(batch.n_tokens, batch.itemsize)
    # What a product takes of a norm's output is a copy in two bytes, or that output itself.
    wide_mask = stream * batch.mask_bytes(FLOAT) if dropped else 0
    log_shares = batch.n_tokens * model.vocab_size * FLOAT
    output = 2 * wide_mask + norm + stream * batch.itemsize + log_shares + 2 * batch.n_tokens * INDEX
    return KeptBytes(
        attention=attention + mask,
        feedforward=norm + block + mask,
        output=output,
        casts=_casts(model) if batch.half else 0,
        n_layers=model.n_layers,
    )


def _norm_bytes(model: ModelConfig, batch: MicroBatch, n: int) -> int:
    """A norm's input and its statistics, of n positions."""
    if isinstance(model, TransformerXLConfig):
        return n * (model.d_model + 2) * FLOAT
    # Not fused on a CPU, where it also keeps what it is before its weights.
    tensors = 2 if batch.device_type == "cpu" else 1
    return n * (tensors * model.d_model + 1) * FLOAT


def _relative_attention(model: TransformerXLConfig, batch: MicroBatch) -> int:
    """Transformer-XL's: the norm of memory and window, what is projected, and what `relative_mix` saves."""
    n_seen, width, itemsize = batch.n_streams * batch.n_keys, model.n_heads * model.d_head, batch.itemsize
    # Queries are of the window alone, which is a copy; under autocast keys and values take copies of their own as well.
    projected = (2 if batch.half else 1) * n_seen + batch.n_tokens
    # Queries with each bias, before and after scaling, and the mixed values.
    queries = 5 * batch.n_tokens * width
    positions = (batch.n_keys + 1) * (model.d_model + width)
    kept = projected * model.d_model + queries + 2 * n_seen * width + positions
    log_sums = batch.n_tokens * model.n_heads * FLOAT
    return _norm_bytes(model, batch, n_seen) + kept * itemsize + log_sums


def _decoder_attention(model: DecoderConfig, batch: MicroBatch) -> int:
    """Grouped-query attention by a fused kernel: rotated queries and keys, values, the mixed ones before and after layout."""
    width, kv_width = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    projected = (3 if batch.half else 1) * model.d_model
    kept = batch.n_tokens * (projected + 3 * width + 2 * kv_width)
    # Cosines and sines: in float32 all layers share them.
    rotations = batch.context * model.d_head / (1 if batch.half else model.n_layers)
    log_sums = batch.n_tokens * model.n_heads * FLOAT
    return _norm_bytes(model, batch, batch.n_tokens) + round(kept + rotations) * batch.itemsize + log_sums


def _casts(model: ModelConfig) -> int:
    """Two bytes for each parameter of a product; routers stay in float32."""
    ffn = model.ffn
    block = ffn.n_products * ffn.n_channels * ffn.d_model if isinstance(ffn, MixtureConfig) else ffn.num_params()
    width = model.n_heads * model.d_head
    # What sines are multiplied by is not kept, as they have no gradient; nor are biases.
    left_out = model.d_model * width + 2 * width + 1 if isinstance(model, TransformerXLConfig) else 0
    attention = model.attention_params() - left_out
    return 2 * (model.n_blocks * (attention + block) + model.d_model * model.vocab_size)


def attention_work(model: ModelConfig, batch: MicroBatch) -> int:
    """Room that the attention's backward pass works in: a block's scores, and gradients of queries, keys and values."""
    width, n_seen = model.n_heads * model.d_head, batch.n_streams * batch.n_keys
    gradients = (4 * n_seen + 4 * batch.n_tokens) * width * batch.itemsize
    if isinstance(model, DecoderConfig):
        return gradients
    scores = scores_held(batch.n_streams, batch.context, model.n_heads, batch.n_keys, batch.device_type)
    return _SCORE_TENSORS * scores * FLOAT + gradients
