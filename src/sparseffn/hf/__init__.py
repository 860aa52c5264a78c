"""Hugging Face: importing this registers our experts and our models with transformers.

    import sparseffn.hf
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="sparseffn")
    model.set_experts_implementation("sparseffn")       # or a model that is already there
    model = AutoModelForCausalLM.from_pretrained("runs/sigma-hf")       # a folder that `sparseffn export` wrote

Nothing of the package imports it by itself. The extra: pip install 'sparseffn[hf]'.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ModuleNotFoundError as error:
    # Not what transformers itself lacks.
    if error.name != "transformers":
        raise
    words = "`sparseffn.hf` must have transformers; got none; fix: pip install 'sparseffn[hf]', or '.[hf]' in a source tree"
    raise ModuleNotFoundError(words, name="transformers") from None

from sparseffn.hf.converted import ConvertedConfig, ConvertedForCausalLM, register_converted, save_converted
from sparseffn.hf.dense_blocks import DenseBlock
from sparseffn.hf.experts import IMPLEMENTATION, experts_forward, register
from sparseffn.hf.export import Exported, export_run
from sparseffn.hf.families import Family, families
from sparseffn.hf.fast_tokenizers import fast_tokenizer
from sparseffn.hf.fill import Random, Same, Upcycle
from sparseffn.hf.outputs import SparseCausalLMOutput
from sparseffn.hf.sparse_config import SparseFFNConfig
from sparseffn.hf.sparse_model import SparseFFNForCausalLM
from sparseffn.hf.split import Split
from sparseffn.hf.swap import replace_ffn
from sparseffn.hf.xl_config import TransformerXLHubConfig
from sparseffn.hf.xl_memory import XLMemory
from sparseffn.hf.xl_model import TransformerXLForCausalLM

__all__ = [
    "IMPLEMENTATION",
    "ConvertedConfig",
    "ConvertedForCausalLM",
    "DenseBlock",
    "Exported",
    "Family",
    "Random",
    "Same",
    "SparseCausalLMOutput",
    "SparseFFNConfig",
    "SparseFFNForCausalLM",
    "Split",
    "TransformerXLForCausalLM",
    "TransformerXLHubConfig",
    "Upcycle",
    "XLMemory",
    "experts_forward",
    "export_run",
    "families",
    "fast_tokenizer",
    "register",
    "replace_ffn",
    "save_converted",
]

register()
# Importing this module again, as a notebook may, must not fail.
AutoConfig.register(SparseFFNConfig.model_type, SparseFFNConfig, exist_ok=True)
AutoModelForCausalLM.register(SparseFFNConfig, SparseFFNForCausalLM, exist_ok=True)
AutoConfig.register(TransformerXLHubConfig.model_type, TransformerXLHubConfig, exist_ok=True)
AutoModelForCausalLM.register(TransformerXLHubConfig, TransformerXLForCausalLM, exist_ok=True)
register_converted()
