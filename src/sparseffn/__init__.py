"""Sparse approximations of the Transformer's two-layer feedforward block (arXiv 2310.10837)."""
