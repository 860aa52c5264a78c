"""Tests of `sparseffn.hf`."""
