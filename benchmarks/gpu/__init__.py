"""What `benchmarks.gpu_session` measures on a CUDA card."""
