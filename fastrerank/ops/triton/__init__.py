"""Triton kernels for CUDA devices; each file needs torch and triton and nothing else of the package."""
