"""Memory of a conversion: that of its model and its new blocks, whatever the text."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'sparseffn[hf]'")

from transformers import AutoModelForCausalLM, LlamaConfig

import sparseffn
from hf.tiny import save_byte_tokenizer
from sparseffn.data.tokenizers import BytesTokenizer
from sparseffn.hf import calibration
from sparseffn.hf.fast_tokenizers import fast_tokenizer

SCRIPT = Path(__file__).with_name("conversion_peak.py")
WIDTH = 128


def save_model(folder: Path, n_layers: int) -> float:
    """Shards of half a megabyte; returns megabytes of weights."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, num_hidden_layers=n_layers, **sizes))
    model.save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > n_layers
    save_byte_tokenizer(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{draw.getrandbits(60):x} {draw.getrandbits(60):x}\n" for _ in range(5000)))
    return path


def peak_mb(model: Path, text: Path, n_tokens: int) -> float:
    out = model.parent / f"{model.name}-{n_tokens}"
    command = [sys.executable, str(SCRIPT), str(model), str(text), str(n_tokens), str(out)]
    # Blocks that are freed go back to the system at once, so that the peak is of what is held.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(sparseffn.__file__).parents[1])}
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
class TestPeak:
    def test_it_does_not_grow_with_the_text(self, text: Path, tmp_path: Path) -> None:
        """But for token ids: 98,304 tokens in place of 8,192 add 3 MB, while the inputs of each block grow by 46 MB."""
        save_model(tmp_path / "model", 2)
        few, many = (peak_mb(tmp_path / "model", text, n_tokens) for n_tokens in (8192, 98_304))
        assert many < few + 10, (few, many)

    def test_it_grows_by_no_more_than_the_model(self, text: Path, tmp_path: Path) -> None:
        """Weights of the model are mapped from its shards; of the new blocks all that replace dense ones are held once."""
        sizes = [save_model(tmp_path / f"model-{n_layers}", n_layers) for n_layers in (2, 14)]
        small, large = (peak_mb(tmp_path / f"model-{n_layers}", text, 4096) for n_layers in (2, 14))
        assert sizes[1] > sizes[0] + 12 and large < small + (sizes[1] - sizes[0]) + 4, (sizes, small, large)


def test_a_text_is_read_in_pieces_of_bounded_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without line ends too, and nothing is lost between them."""
    monkeypatch.setattr(calibration, "_LINE", 8)
    path, lengths = tmp_path / "one-line.txt", []
    path.write_text("0123456789" * 800)
    tokenizer = fast_tokenizer(BytesTokenizer())

    def counting(piece: str, **options: bool) -> object:
        lengths.append(len(piece))
        return tokenizer(piece, **options)

    whole = calibration.read_windows(path, counting, 7000, 100)  # pyright: ignore[reportArgumentType]
    assert lengths == [1600] * 5
    assert bytes(whole.flatten().to(torch.uint8)) == b"0123456789" * 700
