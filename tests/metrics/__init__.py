"""Metrics against other implementations."""
