"""`methods`, `match`, `doctor`: commands that train nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from typing import Any

import torch

from sparseffn.accounting import count_block
from sparseffn.bench.machine import cpp_compiler, version_of
from sparseffn.cli.output import print_json, print_rows
from sparseffn.cli.runs import one_method
from sparseffn.cli.settings import Doctor, Matched, Methods
from sparseffn.comparison import MethodChoice
from sparseffn.errors import UserError
from sparseffn.ffn import BlockShape, FFNConfig, describe, field_infos, list_methods, method_class, parse_options
from sparseffn.ffn.options import FieldInfo
from sparseffn.matching import Match
from sparseffn.matching import match as match_config
from sparseffn.models.presets import get_preset
from sparseffn.ops import explain_backend, list_backends
from sparseffn.ops.backends import Backend
from sparseffn.ops.cpu import build
from sparseffn.storage import default_cache_dir, environment

# The paper's experts, where no preset says otherwise.
_EXPERT_SIZE, _K = 128, 4

# The module that tells whether an extra is installed.
EXTRAS = {
    "plot": "matplotlib",
    "data": "sentencepiece",
    "stream": "datasets",
    "track": "tensorboard",
    "hf": "transformers",
}


def methods(settings: Methods) -> int:
    if settings.method:
        return _one_method(settings.method, settings)
    rows = [_method_row(method_class(name)) for name in list_methods()]
    if settings.json:
        print_json(rows)
    elif settings.markdown:
        print("| method | what it computes | selects | matched by | source |\n| --- | --- | --- | --- | --- |")
        for r in rows:
            print(f"| `{r['method']}` | {r['summary']} | {r['unit']} | {', '.join(r['size_fields'])} | {r['paper']} |")
    else:
        columns = ("method", "what it computes", "selects", "matched by", "source")
        shown = [(r["method"], r["summary"], r["unit"], ", ".join(r["size_fields"]), r["paper"]) for r in rows]
        print_rows(columns, shown, n_words=5)
    return 0


def _method_row(config_class: type[FFNConfig]) -> dict[str, Any]:
    return {
        "method": config_class.name,
        "summary": describe(config_class).rstrip("."),
        "unit": config_class.unit,
        "size_fields": list(config_class.size_fields),
        "paper": config_class.paper,
    }


def _one_method(name: str, settings: Methods) -> int:
    config_class = method_class(name)
    rows = [_option_row(info) for info in field_infos(config_class).values()]
    if settings.json:
        print_json({**_method_row(config_class), "options": rows})
        return 0
    print(f"{config_class.name}: {describe(config_class)} ({config_class.paper})\n")
    table = [(r["option"], r["values"], "required" if r["required"] else str(r["default"]), r["meaning"]) for r in rows]
    print_rows(("option", "values", "default", "meaning"), table, n_words=4)
    return 0


def _option_row(info: FieldInfo) -> dict[str, Any]:
    values = " | ".join(info.choices) if info.choices else f"{info.kind.__name__}, {info.option.range_text()}"
    if info.kind is bool:
        values = "true | false"
    required = info.default is dataclasses.MISSING
    return {
        "option": info.name,
        "values": values + (" or none" if info.optional else ""),
        "default": None if required else info.default,
        "required": required,
        "meaning": info.option.doc,
    }


def match(settings: Matched) -> int:
    found = _match(settings)
    config = found.config
    counts = count_block(config)
    data = {
        "config": config.to_json(),
        "block_params": found.block_params,
        "block_target": found.target_params,
        "block_residual": found.block_residual,
        "block_residual_percent": found.block_residual_percent,
        "active_params": counts.active_params,
        "forward_flops": counts.forward_flops,
        "active_fraction": counts.active_fraction,
        "model_params": found.model_params if found.other_params else None,
        "model_residual_percent": found.residual_percent if found.other_params else None,
        "equal": found.equal,
    }
    # 1 where the sizes are not within the tolerance.
    code = 0 if found.equal else 1
    if settings.json:
        print_json(data)
        return code
    rows = [("block", found.block_params, found.target_params, found.block_residual, found.block_residual_percent)]
    if found.other_params:
        rows.append(("whole model", found.model_params, found.model_target, found.residual, found.residual_percent))
    print(config.name, " ".join(f"{key}={value}" for key, value in config.to_json().items() if key != "method"), end="\n\n")
    print_rows(
        ("parameters", "matched", "target", "residual", "percent"),
        [(name, f"{have:,}", f"{want:,}", f"{off:+,}", f"{percent:+.3f}%") for name, have, want, off, percent in rows],
    )
    print(
        f"\nactive parameters {counts.active_params:,}; forward {counts.forward_flops:,} FLOPs a token "
        f"({counts.active_fraction:.1%} of the channels active)"
    )
    if not found.equal:
        print(f"not within {found.tolerance:.1%}: a comparison would refuse to call this parameter-equal")
    return code


def _match(settings: Matched) -> Match:
    method, like = one_method(settings.method, "--method"), one_method(settings.like, "--like")
    shape = _shape(settings)
    target = _configured(like, shape).num_params()
    config = _configured(method, shape)
    if not settings.preset:
        return match_config(config, target)
    model = dataclasses.replace(get_preset(settings.preset), shape=shape).model(config, settings.vocab_size)
    return match_config(config, target, n_blocks=shape.n_layers, other_params=model.other_params())


def _shape(settings: Matched) -> BlockShape:
    """The sizes asked for: a preset's, with those of the command line in their place, or the latter alone."""
    sizes = {"--d-model": settings.d_model, "--d-ff": settings.d_ff}
    given = {flag: value for flag, value in sizes.items() if value is not None}
    for flag, value in given.items():
        if value < 1:
            raise UserError(f"`{flag}` must be at least 1; got {value}; fix: pass a positive number")
    if settings.preset:
        changes = {flag[2:].replace("-", "_"): value for flag, value in given.items()}
        return dataclasses.replace(get_preset(settings.preset).shape, **changes)
    if settings.d_model is None or settings.d_ff is None:
        got = " ".join(f"{flag} {value}" for flag, value in given.items())
        raise UserError(
            f"`--d-model` and `--d-ff`, or `--preset`, must be given; got {f'{got} alone' if got else 'neither'}; "
            "fix: --d-model 412 --d-ff 2053"
        )
    n_experts = max(_K, round(settings.d_ff / _EXPERT_SIZE))
    return BlockShape(d_model=settings.d_model, d_ff=settings.d_ff, n_experts=n_experts, expert_size=_EXPERT_SIZE, k=_K)


def _configured(choice: MethodChoice, shape: BlockShape) -> FFNConfig:
    config_class = method_class(choice.method)
    return config_class.from_shape(shape).replace(**parse_options(choice.method, config_class, choice.options))


def doctor(settings: Doctor) -> int:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    facts: dict[str, Any] = {
        **environment(),
        **{f"backend on {device.type}": _first_backend(device) for device in devices},
        **{f"backend {b.name}": "; ".join(_how_it_runs(b, device) for device in devices) for b in list_backends()},
        "C++ compiler": cpp_compiler(),
        "compiled kernels": build.instruction_sets() or f"none: {build.unavailable()}",
        "triton": version_of("triton") or "not installed",
        "methods": ", ".join(list_methods()),
        **{f"extra {extra}": _extra(extra, module) for extra, module in EXTRAS.items()},
        **_cache(),
    }
    if settings.json:
        print_json(facts)
    else:
        print_rows(("", ""), [(key, str(value)) for key, value in facts.items()], n_words=2)
    return 0


def _cache() -> dict[str, str]:
    """The cache folder and the room on its disk, or why there is none."""
    try:
        cache = default_cache_dir()
    except UserError as error:
        return {"cache": f"none: {error}"}
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {"cache": str(cache), "free disk": f"{shutil.disk_usage(disk).free / 2**30:.1f} GiB"}


def _extra(extra: str, module: str) -> str:
    return "installed" if importlib.util.find_spec(module) else f"no: pip install 'sparseffn[{extra}]'"


def _first_backend(device: torch.device) -> str:
    """What operations use there, or why what is asked for cannot be used: a report must not end at a wrong wish."""
    try:
        return "{} ({})".format(*explain_backend(device))
    except UserError as error:
        return f"none: {error}"


def _how_it_runs(backend: Backend, device: torch.device) -> str:
    """On one device in float32: whether it runs, and whether anybody gets it without asking."""
    reason = backend.unavailable(device, torch.float32)
    if reason is not None:
        return f"not on {device.type}: {reason}"
    return f"runs on {device.type}" + ("" if backend.automatic else ", if asked for by name")
