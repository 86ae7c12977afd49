"""Training losses: Target Score Distillation with its trajectory (DASM), perceptual distances and the grid penalty."""
