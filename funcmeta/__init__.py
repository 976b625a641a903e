"""Functional meta-learning in PyTorch."""
