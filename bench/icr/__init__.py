"""Attention read-outs (ICR, CoRe), on a CPU and on a GPU."""
