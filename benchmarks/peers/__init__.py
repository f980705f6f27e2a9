"""The same networks and samples through this program and through others; see `python -m benchmarks.peers.run`."""
