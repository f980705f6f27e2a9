"""TensorRT and TensorRT for RTX: from an ONNX graph to an engine, and what the builder says of its sparse kernels."""
