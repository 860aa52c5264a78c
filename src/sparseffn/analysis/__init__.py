"""What a trained model does with its feedforward blocks."""

from sparseffn.analysis.run import analyze_run
from sparseffn.analysis.usage import LayerUsage, UsageCounter

__all__ = ["LayerUsage", "UsageCounter", "analyze_run"]
