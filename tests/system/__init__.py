"""Devices, memory, and files written whole."""
