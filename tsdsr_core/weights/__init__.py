"""Weight files and state dicts: LoRAs, bundles, prompt embeddings, 8-bit weights and names of VAE weights; no model library."""
