"""Weight files: LoRA, bundles, prompts, 8 bits."""
