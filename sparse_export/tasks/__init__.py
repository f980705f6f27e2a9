"""What a network is for: its samples and its score."""
