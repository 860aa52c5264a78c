"""Tests of corpora, tokenisers, cache and streams."""
