"""The machine: devices, memory, number types, and files written whole or not at all."""
