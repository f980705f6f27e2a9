"""One module a pass over a graph."""
