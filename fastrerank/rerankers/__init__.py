"""Rerankers: one file per method, over the protocol in `base`."""
