"""Measurements; each is a script, run as `python -m benchmarks.NAME` from the checkout."""
