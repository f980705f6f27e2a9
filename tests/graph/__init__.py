"""Tests of the ONNX export and of what is read off a graph."""
