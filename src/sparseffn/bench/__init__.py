"""Timings: interleaved in one run, medians, ratios."""
