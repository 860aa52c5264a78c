"""Hugging Face: importing this registers `experts_implementation="sparseffn"` with transformers.

    import sparseffn.hf
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="sparseffn")
    model.set_experts_implementation("sparseffn")       # or a model that is already there

Nothing of the package imports it by itself. The extra: pip install 'sparseffn[hf]'.
"""

from sparseffn.hf.dense_blocks import DenseBlock
from sparseffn.hf.experts import IMPLEMENTATION, experts_forward, register
from sparseffn.hf.families import Family, families
from sparseffn.hf.fill import Random, Same, Upcycle
from sparseffn.hf.split import Split
from sparseffn.hf.swap import replace_ffn

__all__ = [
    "IMPLEMENTATION",
    "DenseBlock",
    "Family",
    "Random",
    "Same",
    "Split",
    "Upcycle",
    "experts_forward",
    "families",
    "register",
    "replace_ffn",
]

register()
