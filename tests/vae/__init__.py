"""The exact tiled VAE against the untiled one."""
