"""Triton kernels for CUDA devices; the files here need torch, triton and each other, nothing else of the package."""
