"""A bundle measured: its score, its answers, its speed, and the verdict."""
