"""Latency and throughput of a bundle."""
