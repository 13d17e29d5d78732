"""Batches across requests: admission, the queue, workers, and the reranker for asynchronous callers."""
