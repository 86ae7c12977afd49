"""The nodes, templates and blueprint, in the frontend and without ComfyUI."""
