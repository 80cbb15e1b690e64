"""Pools, the order of samples, views, the stream."""
