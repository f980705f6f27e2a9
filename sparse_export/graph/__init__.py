"""From a torch network to an ONNX graph, and what can be read off such a graph."""
