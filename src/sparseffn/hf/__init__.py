"""Hugging Face: importing this registers `experts_implementation="sparseffn"` with transformers.

    import sparseffn.hf
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="sparseffn")
    model.set_experts_implementation("sparseffn")       # or a model that is already there

Nothing of the package imports it by itself. The extra: pip install 'sparseffn[hf]'.
"""

from sparseffn.hf.experts import IMPLEMENTATION, experts_forward, register
from sparseffn.hf.families import Family, families

__all__ = ["IMPLEMENTATION", "Family", "experts_forward", "families", "register"]

register()
