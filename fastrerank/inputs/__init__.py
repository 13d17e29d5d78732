"""Text to tokens: one packed batch per request."""

from fastrerank.inputs.tokenizer import TokenBatch, Tokenizer, check_texts

__all__ = ["TokenBatch", "Tokenizer", "check_texts"]
