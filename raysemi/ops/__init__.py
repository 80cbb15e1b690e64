"""Tensors in, tensors out: no state, no ranks, no files."""
