"""Image quality metrics: fidelity (PSNR, SSIM and more), spectrum, NIQE, and LPIPS and DISTS in ``perceptual``."""
