"""Benchmarks: `python -m bench.run cross-encoder` compares fastrerank with other CPU engines in one run."""
