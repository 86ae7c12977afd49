"""A real ComfyUI and its frontend: found, started, asked; prompts, and what stands in where there is none."""
