"""Checkpoints: found, downloaded, checked, and their tensors read."""
