"""Search with few calls, and the scan of stored vectors, on a CPU and on a GPU."""
