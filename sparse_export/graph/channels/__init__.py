"""Which channels of a network belong together."""
