"""A cheaper feedforward block in a Llama: python swap_in_llama.py [MODEL TEXT]

MODEL is a name on the hub or a folder, TEXT a file to compute the perplexity on; without them a small random model is changed.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from sparseffn.hf import replace_ffn, save_converted


def small_model() -> tuple[PreTrainedModel, torch.Tensor]:
    """Random weights, large enough for blocks to matter, and text that it wrote: the dense model's perplexity is the least."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, initializer_range=0.15)).eval()
    return model, model.generate(torch.randint(3, 512, (32, 1)), do_sample=True, top_k=0, max_length=32, eos_token_id=None)


def given_model(name: str, text: str) -> tuple[PreTrainedModel, torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(name)(Path(text).read_text()).input_ids
    rows = tokens[: len(tokens) // 256 * 256][: 256 * 32]
    return AutoModelForCausalLM.from_pretrained(name).eval(), torch.tensor(rows).view(-1, 256)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    return torch.stack(losses).mean().exp().item()


def main(*names: str, out: str = "cheaper") -> None:
    model, tokens = given_model(*names) if names else small_model()
    d_ff = model.config.intermediate_size
    # The first half is to fit what has to be fitted, the other one to measure.
    fitted, held_out = tokens.chunk(2)
    print(f"dense: perplexity {perplexity(model, held_out):.2f}")

    sparse = copy.deepcopy(model)
    print(replace_ffn(sparse, "topk", k=d_ff // 2))
    print(f"the largest half of the pairs, same weights: perplexity {perplexity(sparse, held_out):.2f}")

    mixture = copy.deepcopy(model)
    replace_ffn(mixture, "sigma-moe", n_experts=16, k=12, calibration=fitted)
    print(f"12 of 16 experts, split from the same weights: perplexity {perplexity(mixture, held_out):.2f}")

    save_converted(sparse, out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    print(f"saved to {out} and loaded again: perplexity {perplexity(loaded.eval(), held_out):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
