"""`sparseffn convert`: a model's dense blocks replaced, distilled, measured and saved; broken off, it goes on.

    result = convert(ConvertSettings(model="smollm2", method="sigma-moe", options={"n_experts": 64, "k": 32}, ...), progress)

Stages, each kept in `OUT/work` until the end, which removes it:

1. inputs     what every block sees on the calibration text, in memory-mapped files
2. filled     every new block as its fill leaves it, one at a time
3. distilled  every new block after its own distillation, one at a time
4. whole      parameters and optimiser of the end-to-end distillation, every some steps
5. losses     of the dense, the filled and the converted model on held-out text

Each block and each step draws from a generator of its own, so that a conversion that was killed gives what another one gives.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparseffn.errors import UserError
from sparseffn.ffn import FeedForward
from sparseffn.hf.calibration import StoredInputs, digest_of_ids, read_windows
from sparseffn.hf.converted import ConvertedForCausalLM
from sparseffn.hf.dense_blocks import Layers
from sparseffn.hf.distillation import Distil, EndToEnd, block_error, distil_block
from sparseffn.hf.fill import Fill, mark_fill
from sparseffn.hf.held_out import speeds, window_nats
from sparseffn.hf.model_card import CARD
from sparseffn.hf.swap import Planned, find_fill, keyed_generator, plan, put, visit_inputs, with_dropout
from sparseffn.results.convert_result import (
    ConvertedBlock,
    ConvertFacts,
    ConvertResult,
    Loss,
    TextFacts,
    read_conversion,
)
from sparseffn.stats import difference
from sparseffn.storage import environment, json_digest, read_json, sole_writer, write_folder, write_json, write_text

Progress = Callable[[str], None]

# Steps between checkpoints of the end-to-end distillation, and held-out tokens that errors of blocks are measured on.
_CHECKPOINT_EVERY = 20
_ERROR_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What to convert, into what, on which text."""

    model: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fill: str | Fill | None = None
    layers: Layers = None
    """As `replace_ffn` takes them; None: all blocks of known families."""
    calibrate: Path
    held_out: Path | None = None
    """None: what follows the calibration tokens in their own file."""
    tokens: int = 32_768
    eval_tokens: int = 16_384
    context: int = 256
    distill: int = 0
    end_to_end: int | None = None
    """None: a quarter of `distill`."""
    batch_tokens: int = 512
    lr: float = 2e-3
    end_to_end_lr: float = 2e-4
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    out: Path

    def __post_init__(self) -> None:
        for name in ("tokens", "eval_tokens", "batch_tokens"):
            if getattr(self, name) < self.context:
                raise UserError(
                    f"`{name}` must be at least the context of {self.context}; got {getattr(self, name)}; fix: raise it"
                )
        if self.context < 2:
            raise UserError(f"`context` must be at least 2 tokens; got {self.context}; fix: raise it")
        for name in ("distill", "n_end_to_end"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must be at least 0; got {getattr(self, name)}; fix: 0 trains nothing")
        for name in ("lr", "end_to_end_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"`{name}` must be positive; got {getattr(self, name)}; fix: leave it out")
        source, out = Path(self.model).resolve(), self.out.resolve()
        if out == source or source in out.parents:
            raise UserError(f"`out` must not be within the model's folder, which stays as it is; got {str(self.out)!r}")

    @property
    def n_end_to_end(self) -> int:
        return self.distill // 4 if self.end_to_end is None else self.end_to_end


def convert(settings: ConvertSettings, progress: Progress = lambda text: None) -> ConvertResult:
    """Convert, or go on where an earlier call broke off; `OUT` is then a folder that transformers loads.

    Raises:
        UserError: the model, a text or an option does not fit, or `OUT` holds another conversion. Nothing of the model's own
            folder is ever written.
    """
    with sole_writer(settings.out):
        job = _Job(settings, progress)
        finished = job.check_out()
        if finished is not None:
            progress("this conversion is finished")
            return finished
        job.collect_inputs()
        for name in job.plans:
            job.fill(name)
        for name in job.plans:
            job.distil(name)
        job.end_to_end()
        return job.finish()


@final
class _Job:
    """One conversion: the model with its dense blocks, and what is kept in the work folder."""

    def __init__(self, settings: ConvertSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.work = settings.out / "work"
        self.tokenizer = _tokenizer(settings.model)
        self.calibration, self.held_out = _texts(settings, self.tokenizer)
        progress(f"loading {settings.model}")
        self.model = _model(settings).eval()
        self.way = find_fill(settings.fill, settings.method)
        self.plans = plan(self.model, settings.method, self.way, settings.layers, settings.options)
        self.dense = {name: self.model.get_submodule(name) for name in self.plans}

    # What is asked for.

    @cached_property
    def facts(self) -> ConvertFacts:
        s, config = self.settings, next(iter(self.plans.values())).config
        given = {key: value for key, value in config.to_json().items() if key in s.options}
        fill_options = dict(vars(self.way))
        return ConvertFacts(
            method=config.name,
            options=given,
            fill=self.way.name,
            fill_options=fill_options,
            distill=s.distill,
            end_to_end=s.n_end_to_end,
            batch_tokens=s.batch_tokens,
            lr=s.lr,
            end_to_end_lr=s.end_to_end_lr,
            seed=s.seed,
            context=s.context,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )

    @cached_property
    def identity(self) -> str:
        """Of everything that numbers follow from: settings, texts, and the model's own parameters."""
        parameters = [(name, *_sums(p.detach())) for name, p in _named(self.model)]
        texts = [digest_of_ids(self.calibration), digest_of_ids(self.held_out)]
        return json_digest([msgspec.to_builtins(self.facts), list(self.plans), texts, parameters, self.settings.device])

    def check_out(self) -> ConvertResult | None:
        """The result where this conversion is finished.

        Raises:
            UserError: the folder holds something else.
        """
        out, mark = self.settings.out, self.work / "identity.json"
        done = out / "convert.json"
        known = read_json(mark) if mark.exists() else read_json(out / "identity.json") if done.exists() else None
        others = [path.name for path in out.iterdir() if path.name not in ("work", ".lock")]
        if known not in (None, self.identity) or (known is None and others):
            raise UserError(
                f"`out` must be new, or hold this very conversion; got {str(out)!r}, which holds "
                f"{'another one' if known else ', '.join(sorted(others)[:3])}; fix: choose another --out"
            )
        if done.exists() and not mark.exists():
            shutil.rmtree(self.work, ignore_errors=True)
            return read_conversion(done)
        write_json(mark, self.identity)
        return None

    # Stages.

    @cached_property
    def inputs(self) -> StoredInputs:
        block = next(iter(self.plans.values())).block
        return StoredInputs(
            folder=self.work / "inputs",
            names=list(self.plans),
            d_model=block.d_model,
            dtype=block.keys.dtype,
            n_tokens=self.calibration.numel(),
        )

    def collect_inputs(self) -> None:
        if self.way.needs_inputs or self.settings.distill:
            self.progress(f"running the dense model on {self.calibration.numel():,} calibration tokens")
            self.inputs.collect(self.model, self.calibration)

    def fill(self, name: str) -> None:
        if self._stored("filled", name).exists():
            return
        self.progress(f"filling {name}")
        one = self.plans[name]
        layer = one.empty()
        inputs_TD = self.inputs.of(name).to(one.block.keys.device) if self.way.needs_inputs else None
        self.way.fill(layer, one.block, inputs_TD, keyed_generator(self.settings.seed, name))
        self._store("filled", name, layer)

    def distil(self, name: str) -> None:
        s = self.settings
        if not s.distill or self._stored("distilled", name).exists():
            return
        self.progress(f"distilling {name}, {s.distill} steps")
        layer = self._layer("filled", name).float()
        distil_block(layer, self.plans[name].block, self.inputs.of(name), self._how(s.distill, s.lr), name)
        self._store("distilled", name, layer)

    def end_to_end(self) -> None:
        steps = self.settings.n_end_to_end
        if not steps or (self.work / "whole-done.json").exists():
            return
        new = {name: self._layer(self._trained, name).float() for name in self.plans}
        training = EndToEnd(self.model, self.dense, new, self.calibration, self._how(steps, self.settings.end_to_end_lr))
        kept = self.work / "whole"
        if (kept / "step.json").exists():
            training.restore(load_file(kept / "state.safetensors"), read_json(kept / "step.json"))
        while training.step < steps:
            training.run(min(steps, training.step + _CHECKPOINT_EVERY), self.progress)
            with write_folder(kept, replace=True) as folder:
                save_file(training.state(), folder / "state.safetensors")
                write_json(folder / "step.json", training.step)
        for name, layer in new.items():
            self._store("whole-blocks", name, layer)
        write_json(self.work / "whole-done.json", True)

    def finish(self) -> ConvertResult:
        """Measure, write the folder, remove the work."""
        last = "whole-blocks" if self.settings.n_end_to_end else self._trained
        trained = last != "filled"
        dense = self._nats("dense", self.dense)
        blocks = self._modules("filled")
        filled = converted = self._nats("filled", blocks)
        errors = {"filled": self._errors(blocks)}
        if trained:
            # The filled ones are let go before the others are read.
            blocks.clear()
            blocks = self._modules(last)
            converted = self._nats("converted", blocks)
        errors["last"] = self._errors(blocks) if trained else errors["filled"]
        params_before = sum(p.numel() for _, p in _named(self.model))
        self.progress("measuring speed")
        measured = speeds(self.model, {"before": self.dense, "after": blocks}, self.held_out[:1])
        put(self.model, blocks)
        result = ConvertResult(
            environment=environment(self.settings.device),
            model=Path(self.settings.model).name,
            family=self.model.config.model_type,
            facts=self.facts,
            calibration=_facts_of(self.settings.calibrate, self.calibration),
            held_out=_facts_of(self.settings.held_out or self.settings.calibrate, self.held_out),
            params_before=params_before,
            params_after=sum(p.numel() for _, p in _named(self.model)),
            blocks=[
                ConvertedBlock(
                    **msgspec.structs.asdict(one.replaced()),
                    filled_error=errors["filled"][name],
                    error=errors["last"][name],
                )
                for name, one in self.plans.items()
            ],
            dense=_loss(dense, None),
            filled=_loss(filled, dense),
            converted=_loss(converted, dense),
            speeds=measured,
        )
        self._deliver(result)
        return result

    def _deliver(self, result: ConvertResult) -> None:
        """Model, tokenizer and card, then the result; the work folder goes last, with the mark that it is not finished."""
        self.progress(f"writing {self.settings.out}")
        made = self.work / "model"
        with write_folder(made, replace=True) as folder:
            converted = ConvertedForCausalLM.wrap(self.model)
            converted.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_text(folder / CARD, converted.card(self.settings.out.resolve().name, has_tokenizer=True, result=result))
        for path in made.iterdir():
            target = self.settings.out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        write_json(self.settings.out / "identity.json", self.identity)
        write_json(self.settings.out / "convert.json", result)
        (self.work / "identity.json").unlink()
        shutil.rmtree(self.work)

    # Parts of them.

    @property
    def _trained(self) -> str:
        return "distilled" if self.settings.distill else "filled"

    def _how(self, steps: int, lr: float) -> Distil:
        return Distil(steps=steps, lr=lr, tokens=self.settings.batch_tokens, seed=self.settings.seed)

    def _stored(self, stage: str, name: str) -> Path:
        return self.work / stage / f"{list(self.plans).index(name):04d}" / "block.safetensors"

    def _store(self, stage: str, name: str, layer: nn.Module) -> None:
        """In the model's own dtype."""
        dtype = self.plans[name].block.keys.dtype
        with write_folder(self._stored(stage, name).parent, replace=True) as folder:
            save_file({key: p.detach().to(dtype).contiguous() for key, p in _named(layer)}, folder / "block.safetensors")

    def _layer(self, stage: str, name: str) -> FeedForward:
        layer = self.plans[name].empty().eval()
        layer.load_state_dict(load_file(self._stored(stage, name)))
        mark_fill(layer, self.way.described())
        return layer

    def _modules(self, stage: str) -> dict[str, nn.Module]:
        """The stage's blocks as they stand in the model."""
        return {name: with_dropout(self._layer(stage, name), one.block) for name, one in self.plans.items()}

    def _nats(self, name: str, blocks: Mapping[str, nn.Module]) -> np.ndarray:
        """Of each held-out window, kept for a call that goes on."""
        kept = self.work / f"nats-{name}.json"
        if not kept.exists():
            self.progress(f"perplexity of the {name} model on {self.held_out.numel():,} held-out tokens")
            put(self.model, blocks)
            try:
                write_json(kept, window_nats(self.model, self.held_out).tolist())
            finally:
                put(self.model, self.dense)
        return np.array(read_json(kept))

    def _errors(self, blocks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Of each block on the dense model's own inputs, from held-out text."""
        found: dict[str, float] = {}

        def measure(one: Planned, inputs_TD: Tensor) -> None:
            found[one.name] = block_error(blocks[one.name], one.block, inputs_TD)

        n_windows = max(1, _ERROR_TOKENS // self.settings.context)
        visit_inputs(self.model, self.plans, self.held_out[:n_windows], measure)
        return found


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def _sums(p: Tensor) -> tuple[float, float]:
    """Two numbers that another parameter hardly has."""
    return float(p.double().sum()), float(p.double().square().sum())


def _loss(nats: np.ndarray, dense: np.ndarray | None) -> Loss:
    paired = None if dense is None else difference({0: nats}, {0: dense})
    return Loss(nats=float(nats.mean()), difference=paired)


def _facts_of(path: Path, ids: Tensor) -> TextFacts:
    return TextFacts(name=path.name, digest=digest_of_ids(ids), tokens=ids.numel())


def _texts(settings: ConvertSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    s = settings
    n_calibration, n_held_out = s.tokens // s.context, s.eval_tokens // s.context
    if s.held_out is None:
        # Read as one, so that a text that is too short is refused with the number of tokens that both need.
        windows = read_windows(s.calibrate, tokenizer, (n_calibration + n_held_out) * s.context, s.context)
        calibration, held_out = windows[:n_calibration], windows[n_calibration:]
    else:
        calibration = read_windows(s.calibrate, tokenizer, s.tokens, s.context)
        held_out = read_windows(s.held_out, tokenizer, s.eval_tokens, s.context)
    if len(held_out) < 2:
        raise UserError(f"`eval_tokens` must be at least two windows of {s.context}; got {s.eval_tokens}; fix: raise it")
    return calibration, held_out


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except ImportError as error:
        raise _lacks_package(model, error) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"`model` must have a tokenizer; got {model!r}, where there is none ({_first_line(error)}); "
            "fix: copy tokenizer.json and tokenizer_config.json into its folder"
        ) from None


def _model(settings: ConvertSettings) -> PreTrainedModel:
    dtype: Any = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        config = AutoConfig.from_pretrained(settings.model)
        quantised = any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
        # To load it would ask for the packages that it was quantised with.
        if not quantised:
            return AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(settings.device)  # pyright: ignore[reportArgumentType]
    except ImportError as error:
        raise _lacks_package(settings.model, error) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"`model` must be a folder, or a name on the hub, of a causal language model; got {settings.model!r} "
            f"({_first_line(error)}); fix: check the path"
        ) from None
    raise UserError(
        f"`model` must have weights of floating-point numbers; got {settings.model!r}, which is quantised; "
        "fix: convert the model that it was made from"
    )


def _lacks_package(model: str, error: ImportError) -> UserError:
    return UserError(
        f"`model` must load with what is installed; got {model!r} ({_first_line(error)}); "
        "fix: install the package that it names"
    )


def _first_line(error: Exception) -> str:
    """Transformers' own words may begin with an empty line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
