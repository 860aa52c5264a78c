"""What a trained model does with its feedforward blocks, and whether two models differ."""

from sparseffn.analysis.run import analyze_run
from sparseffn.analysis.usage import LayerUsage, UsageCounter
from sparseffn.stats import PairedDifference, SeedNoise, paired_difference, seed_noise

__all__ = ["LayerUsage", "PairedDifference", "SeedNoise", "UsageCounter", "analyze_run", "paired_difference", "seed_noise"]
