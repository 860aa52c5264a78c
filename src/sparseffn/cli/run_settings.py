"""What a user sets of runs: commands that plan, train, evaluate, study and convert models. As `settings`, without PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group

from sparseffn.cli.settings import (
    Flag,
    Machine,
    MaybeFloat,
    MaybeInt,
    MaybeText,
    Places,
    Precision,
    Printed,
    Run,
    Spread,
    Tokens,
    Words,
    settings_class,
)

Backbone = Literal["transformer-xl", "llama"]

# Either says how long a comparison runs.
_LENGTH = create_mutex_group(required=False, title="length")


@settings_class
class Trained(Tokens, Spread, Printed):
    """What `train` and `compare` share."""

    corpus: str = "stdlib"
    """stdlib (always there), text, or one of `sparseffn data list`"""
    preset: str = "tiny"
    """tiny, small, wt-s, wt-s-star, wt-b or e8"""
    backbone: Backbone = "transformer-xl"
    """model around the feedforward blocks: the paper's, or a decoder as Llama's, where blocks are gated by SiLU"""
    lr: MaybeFloat = None
    """peak learning rate (default: the preset's)"""
    batch: MaybeInt = None
    """streams read in parallel (default: the preset's)"""
    context: MaybeInt = None
    """tokens of a window (default: the preset's)"""
    warmup: MaybeInt = None
    """steps of linear warm-up, a tenth of all at most (default: the preset's)"""
    clip: MaybeFloat = None
    """largest gradient norm (default: the preset's)"""
    precision: Precision = "float32"
    """float32, or autocast to bfloat16 or float16 (with a gradient scaler)"""


@settings_class
class Compare(Trained):
    """Train parameter-equal models that differ in their feedforward block; one table and one page.

    All methods see the same data in the same order, share every hyperparameter, and start from the same parameters outside
    the feedforward blocks. Interrupt it when you like: the same command goes on. Exits with 1 where a method cannot be
    matched within the tolerance.

    Examples:
      sparseffn compare --methods dense topk pkm sigma-moe --budget 8m --out runs/first
      sparseffn compare --methods dense sigma-moe sigma-moe k=1 expert_size=256 --steps 500 --seeds 3 --out runs/k
      sparseffn compare --corpus text --data-dir my_notes/ --methods dense switch --budget 20m --out runs/notes
      sparseffn compare --backbone llama --methods dense sigma-moe --budget 8m --out runs/llama   # within a decoder
    """

    methods: Words
    """methods, each followed by its options as key=value"""
    seeds: int = 1
    """number of seeds"""
    seed: int = 0
    """first seed"""
    budget: Annotated[MaybeText, _LENGTH] = None
    """time for everything: 90s, 8m, 2h; sets the steps once, equal for all methods"""
    steps: Annotated[MaybeInt, _LENGTH] = None
    """training steps, equal for all methods (default: the preset's)"""
    out: str
    """folder of the comparison"""


@settings_class
class Train(Trained):
    """Train one language model.

    Goes on from the last checkpoint in --out with the same command, bit-identically.

    Examples:
      sparseffn train --method sigma-moe --steps 300 --out runs/sigma
      sparseffn train --method topk k=128 --corpus ptb --data-dir ptb/ --preset small --out runs/topk
      torchrun --nproc-per-node 2 -m sparseffn train --method sigma-moe --strategy fsdp --out runs/two
    """

    method: Words
    """method, then its options as key=value"""
    steps: MaybeInt = None
    """training steps (default: the preset's)"""
    seed: int = 0
    """seed of parameters and dropout"""
    optimizer: Literal["adam", "adamw"] = "adam"
    """optimiser"""
    weight_decay: float = 0.0
    """weight decay"""
    accumulation: int = 1
    """micro-batches of a step"""
    eval_every: MaybeInt = None
    """steps between points of the validation curve (default: 12 points)"""
    checkpoint_every: MaybeInt = None
    """steps between checkpoints (default: those of every other point)"""
    keep: int = 2
    """checkpoints that are kept, the last ones; the best on validation is kept besides"""
    non_finite: Literal["stop", "skip"] = "stop"
    """a step whose loss or gradient is not finite ends the run, or is left out and noted; ten in a row end it all the same"""
    tensorboard: Flag = False
    """also write TensorBoard events; needs sparseffn[track]"""
    out: str
    """run folder"""


@settings_class
class Plan(Printed):
    """What a training run asks of each device, before it is started: memory, and bytes of communication in a step.

    Nothing is trained: a stated model, which docs/devices.md holds against measured runs. --gpus 1 is one device. With
    --memory also the largest batch that fits; exits with 1 where this one does not.

    Examples:
      sparseffn plan --method sigma-moe --preset wt-b --gpus 64 --precision bfloat16 --memory 80GB
      sparseffn plan --method dense --preset wt-b --gpus 8 --strategy fsdp --batch 512 --json
      sparseffn plan --method sigma-moe n_experts=32 --preset wt-b --gpus 16 --expert-parallel 4
    """

    method: Words
    """method, then its options as key=value"""
    preset: str = "tiny"
    """tiny, small, wt-s, wt-s-star, wt-b or e8"""
    backbone: Backbone = "transformer-xl"
    """model around the feedforward blocks"""
    vocab_size: int = 8000
    """vocabulary of the model"""
    gpus: int = 1
    """devices, of one process each"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: parameters and optimiser whole on every device; fsdp: sharded over them"""
    expert_parallel: int = 1
    """devices that a layer's experts are spread over"""
    precision: Precision = "float32"
    """float32, or autocast to bfloat16 or float16"""
    batch: MaybeInt = None
    """streams of a step, over all devices (default: the preset's)"""
    context: MaybeInt = None
    """tokens of a window, and of the memory before it (default: the preset's)"""
    accumulation: int = 1
    """micro-batches of a step"""
    memory: MaybeText = None
    """memory of a device, as 80GB or 24GiB"""


@settings_class
class Eval(Places, Machine, Printed):
    """Evaluate a run's model: every token of a split is predicted once.

    Examples:
      sparseffn eval runs/sigma
      sparseffn eval runs/sigma --split valid --memory 2048
    """

    run: Run
    """run folder"""
    split: Literal["valid", "test"] = "test"
    """split"""
    memory: MaybeInt = None
    """positions that are remembered (default: the run's)"""
    eval_batch: MaybeInt = None
    """streams the split is cut into; 1 is exact (default: the run's)"""
    checkpoint: str = "last"
    """last, best on validation of those that are kept, or a step"""


@settings_class
class Generate(Machine):
    """Print text that a run's model writes. Control characters but line ends and tabs are escaped.

    Examples:
      sparseffn generate runs/sigma --prompt "def main("
      sparseffn generate runs/sigma --prompt "import " --temperature 0.8 --top-k 40 --n-tokens 400
    """

    run: Run
    """run folder"""
    prompt: Annotated[str, arg(help_behavior_hint=r"(default: '\n')")] = "\n"
    """text to go on from"""
    n_tokens: int = 200
    """tokens to write"""
    temperature: float = 0.0
    """0: the most likely token"""
    top_k: MaybeInt = None
    """sample among the K most likely tokens"""
    memory: MaybeInt = None
    """positions that are remembered (default: the run's in evaluation)"""
    seed: int = 0
    """seed of the samples"""


@settings_class
class Export(Printed):
    """Write a run's model as a Hugging Face folder: weights, config, tokenizer and a model card.

    AutoModelForCausalLM loads it after `import sparseffn.hf`; the folder is written whole or not at all. The card has the
    table of the comparison that the run is part of, or the run's own losses.

    Examples:
      sparseffn export runs/sigma --to sigma-hf
      sparseffn export runs/first/runs/sigma-moe/seed-0 --to first-hf
    """

    run: Run
    """run folder"""
    to: str
    """new folder"""
    checkpoint: str = "last"
    """last, best (on validation, of those that are kept) or a step"""
    without_tokenizer: Flag = False
    """leave out the tokenizer, where it is missing or transformers can have no such one"""


@settings_class
class Analyze(Places, Machine, Printed):
    """What a finished run's feedforward blocks do: active channels, use of experts, their tokens, routing over training.

    Writes analysis.json and every figure as PNG and SVG. Per layer: active channels a token; share of the selection
    weight of each expert; experts selected together; the tokens that an expert serves, with their lift; evenness of the
    load. Over training: load, and how many of its experts a token keeps. Memory does not grow with the text.

    Examples:
      sparseffn analyze runs/sigma
      sparseffn analyze runs/first/runs/sigma-moe/seed-0 --split test --max-tokens 100000 --out figures/sigma
    """

    run: Run
    """folder of a finished run"""
    split: Literal["valid", "test", "both"] = "valid"
    """what to read"""
    max_tokens: MaybeInt = None
    """only the first N tokens (default: the whole split)"""
    out: MaybeText = None
    """folder for the results (default: RUN/analysis)"""


@settings_class
class Study(Places, Machine, Printed):
    """Measure why this selector and why this initialisation: predictions beside figures.

    init: output, gradients and load at initialisation over depth, N_E, G and K, then short trainings; competition: sigmoid
    against softmax before and after top-k; balance: entropy loss and expert dropout, two by two. With --budget a call ends
    when its time is spent; the same command goes on.

    Examples:
      sparseffn study init --budget 10m --out runs/study
      sparseffn study competition --seeds 5 --out runs/study   # shares its runs with the others in one folder
    """

    study: Annotated[Positional[Literal["init", "competition", "balance"]], arg(metavar="STUDY")]
    """init, competition or balance"""
    corpus: str = "stdlib"
    """stdlib (always there), text or ptb"""
    seeds: int = 3
    """trainings of each variant"""
    budget: MaybeText = None
    """time for this call: 90s, 8m, 2h (default: until all is done)"""
    out: str = "runs/study"
    """folder of the studies"""


@settings_class
class Convert(Machine, Printed):
    """Give a model of transformers cheaper feedforward blocks, and measure what that costs.

    The model is a folder or a name on the hub; its own files stay as they are. New blocks are filled from the dense ones: topk
    with the same weights, mixtures by splitting the pairs into experts (split) or with a copy in each (upcycle). With --distill
    they are then trained to compute what the dense blocks compute, one at a time and at last all together. Broken off, the same
    command goes on. --out is a folder that AutoModelForCausalLM loads after `import sparseffn.hf`, with convert.json and
    page.html beside it. Needs sparseffn[hf].

    Examples:
      sparseffn convert smollm2/ --method topk k=768 --calibrate notes.txt --out cheaper
      sparseffn convert smollm2/ --method sigma-moe n_experts=64 k=32 --from split --calibrate notes.txt --distill 200 --out moe
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """folder of the model, or its name on the hub"""
    method: Words
    """method, then its options as key=value"""
    from_: Annotated[Words, arg(name="from")] = ()
    """same, split, upcycle or random, then its options as key=value (default: same for topk, split for mixtures)"""
    layers: Words = ()
    """blocks to replace, by number or by module name, where * stands for anything (default: all of known families)"""
    calibrate: str
    """text file that new blocks are fitted and distilled on"""
    held_out: MaybeText = None
    """text file for perplexity and errors (default: what follows the calibration tokens in theirs)"""
    tokens: int = 32768
    """calibration tokens"""
    eval_tokens: int = 16384
    """held-out tokens"""
    context: int = 256
    """tokens of a window"""
    distill: int = 0
    """steps of distillation for each block"""
    end_to_end: MaybeInt = None
    """steps of the whole model afterwards (default: a quarter of --distill)"""
    batch_tokens: int = 512
    """tokens of a step"""
    lr: float = 2e-3
    """peak step size of the blocks' own distillation; routers take a twentieth"""
    end_to_end_lr: float = 2e-4
    """that of the whole model's"""
    seed: int = 0
    """seed of all that is drawn"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """what the model is loaded in; auto is its own, distillation is in float32"""
    out: str
    """folder of the converted model"""
