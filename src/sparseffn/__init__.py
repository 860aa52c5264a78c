"""Sparse approximations of the Transformer's two-layer feedforward block (arXiv 2310.10837)."""

__version__ = "0.2.0"
