"""Adapters for other frameworks, one module each; importing one needs its framework, and nothing else does."""
