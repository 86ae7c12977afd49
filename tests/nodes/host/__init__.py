"""The nodes in a real ComfyUI."""
