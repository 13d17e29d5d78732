"""LLM rerankers by first-token logits, on a CPU and on a GPU."""
