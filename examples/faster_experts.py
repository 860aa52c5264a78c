"""Faster experts in a mixture of Hugging Face, random weights in the shapes of OLMoE's layers: python faster_experts.py

With a model from the hub it is one argument: AutoModelForCausalLM.from_pretrained(NAME, experts_implementation="sparseffn").
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import sparseffn.hf  # registers the implementation


def tokens_per_second(model: torch.nn.Module, prompt: torch.Tensor, n_new: int) -> float:
    model.generate(prompt, max_new_tokens=2, do_sample=False)  # the first call compiles and allocates
    started = time.perf_counter()
    model.generate(prompt, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False)
    return n_new / (time.perf_counter() - started)


@torch.no_grad()
def main(n_layers: int = 2, hidden_size: int = 2048, n_new: int = 16) -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=n_layers,
        hidden_size=hidden_size,
        intermediate_size=hidden_size // 2,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=1024,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(1, config.vocab_size, (1, 8))
    print(f"OLMoE's shapes, {n_layers} layers, {model.num_parameters():,} parameters, {sparseffn.hf.IMPLEMENTATION}")
    logits = {}
    for name in ("grouped_mm", "sparseffn"):
        model.set_experts_implementation(name)
        logits[name] = model(prompt).logits
        print(f"{name}: {tokens_per_second(model, prompt, n_new):.1f} tokens per second")
    largest = (logits["grouped_mm"] - logits["sparseffn"]).abs().max()
    print(f"largest difference of the logits: {largest:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
