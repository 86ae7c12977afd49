"""Captions beside pictures, and SD3's embeddings of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..device import choose_dtype
from ..prompt import PromptEmbeds

T5_TOKENS = 256
"""Length of the T5 part, after CLIP's 77; the published embeddings have 333 tokens."""
_NEEDED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_T5 = ("text_encoder_3", "tokenizer_3")


def read_captions(pictures: Sequence[Path], default: str | None) -> dict[Path, str]:
    """The text of ``NAME.txt`` beside each picture NAME; ``default``, where given, for those without.

    Raises:
        ValueError: where captions are missing, with their number and the first of them, or are not UTF-8 text.
    """
    captions: dict[Path, str] = {}
    missing: list[Path] = []
    for picture in pictures:
        sidecar = picture.with_suffix(".txt")
        try:
            captions[picture] = sidecar.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            missing.append(sidecar)
        except UnicodeDecodeError as error:
            raise ValueError(f"{sidecar} is not UTF-8 text: {error}") from error
    if missing and default is None:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} captions are missing: {', '.join(map(str, missing[:5]))}"
            f"{' ...' if len(missing) > 5 else ''}; write them, or give --caption-default TEXT"
        )
    return {picture: captions.get(picture, default or "") for picture in pictures}


class TextEncoder:
    """The text encoders of an SD3 folder in diffusers' layout; T5 may be absent, and its tokens are then zeros."""

    def __init__(self, base: Path, device: torch.device) -> None:
        """Load them onto ``device``, in fp16 on accelerators and fp32 on the CPU.

        Raises:
            ValueError: where they are missing or damaged.
        """
        missing = [part for part in _NEEDED if not (base / part).is_dir()]
        if missing:
            raise ValueError(
                f"{base} lacks {', '.join(missing)}: captions and prompts need an SD3 folder with its text encoders as --base"
            )
        self.device = device
        self._pipeline = _load_pipeline(base, choose_dtype("auto", device)).to(device)
        if self._pipeline.text_encoder_3 is None:
            self._pipeline.transformer = _width_of_t5(base)

    @torch.inference_mode()
    def encode(self, text: str) -> PromptEmbeds:
        """Tokens ``(1, 77 + 256, D)`` and pooled ``(1, P)`` of ``text`` on the encoders' device."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            text, text, text, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return PromptEmbeds(tokens, pooled)


def _load_pipeline(base: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusion3Pipeline  # here, since it loads transformers, which most runs do without

    unused: list[str] = ["transformer", "vae", "scheduler", "image_encoder", "feature_extractor"]
    unused += [] if (base / _T5[0]).is_dir() else _T5
    # it warns of every caption beyond CLIP's 77 tokens, which T5 reads on
    logging.getLogger(StableDiffusion3Pipeline.__module__).setLevel(logging.ERROR)
    try:
        return StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=dtype, local_files_only=True, **dict.fromkeys(unused))
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the text encoders of {base} cannot be loaded: {error}") from error


def _width_of_t5(base: Path) -> Any:
    """What ``encode_prompt`` asks of the transformer where there is no T5: how wide its zeros are."""
    from diffusers import SD3Transformer2DModel

    try:
        config: Any = SD3Transformer2DModel.load_config(base / "transformer", local_files_only=True)
        return SimpleNamespace(config=SimpleNamespace(joint_attention_dim=config["joint_attention_dim"]))
    except (OSError, KeyError) as error:
        raise ValueError(f"{base} has no text_encoder_3, and its transformer's configuration is missing: {error}") from error
