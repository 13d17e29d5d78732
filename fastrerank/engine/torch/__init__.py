"""Models of transformers through one packed forward."""
