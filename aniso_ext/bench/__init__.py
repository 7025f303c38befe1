"""Benchmarks: cases that the tests share, stock PyTorch, floors from measured ceilings, and what they took."""
