from torch import nn

class TAESD(nn.Module):
    taesd_decoder: nn.Module

    def __init__(self, encoder_path: str | None = None, decoder_path: str | None = None, latent_channels: int = 4) -> None: ...
