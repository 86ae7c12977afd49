"""Weight files and state dicts: LoRAs, bundles, prompt embeddings, 8-bit and int8 weights, names of VAE weights."""
