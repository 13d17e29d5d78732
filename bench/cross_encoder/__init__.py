"""Cross-encoders against other engines, on a CPU and on a GPU."""
