"""TensorRT and TensorRT for RTX: builds engines of ONNX graphs, and reads which sparse kernels they use."""
