"""Captions of images, and their embeddings by SD3's text encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...checks import some
from ...errors import InputError
from ...system.atomic import reason
from ...system.device import choose_dtype
from ...weights.prompt import PromptEmbeds

T5_TOKENS = 256
"""Number of T5 tokens, which follow CLIP's 77; the published embeddings have 333 tokens."""
_NEEDED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_T5 = ("text_encoder_3", "tokenizer_3")


def read_captions(images: Sequence[Path], default: str | None) -> dict[Path, str]:
    """The caption of each image: the text of ``NAME.txt`` beside image NAME, or ``default`` if there is no such file.

    Raises:
        InputError: if captions are missing and there is no default, or one is not UTF-8 text.
    """
    captions: dict[Path, str] = {}
    missing: list[Path] = []
    for image in images:
        sidecar = image.with_suffix(".txt")
        try:
            captions[image] = sidecar.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            missing.append(sidecar)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{sidecar} cannot be read as a caption: {reason(error)}") from error
    if missing and default is None:
        raise InputError(
            f"{len(missing)} of {len(images)} captions are missing: {some(missing)}; write them, or use --caption-default TEXT"
        )
    return {image: captions.get(image, default or "") for image in images}


class TextEncoder:
    """The text encoders of an SD3 folder in diffusers' layout; without T5, its tokens are zeros."""

    def __init__(self, base: Path, device: torch.device) -> None:
        """Load them onto ``device``, in fp16 on accelerators and fp32 on the CPU.

        Raises:
            InputError: if they are missing or damaged.
        """
        missing = [part for part in _NEEDED if not (base / part).is_dir()]
        if missing:
            raise InputError(
                f"{base} has no {', '.join(missing)}: captions and prompts need an SD3 folder with text encoders as --base"
            )
        self.device = device
        self._pipeline = _load_pipeline(base, choose_dtype("auto", device)).to(device)
        if self._pipeline.text_encoder_3 is None:
            self._pipeline.transformer = _width_of_t5(base)

    @torch.inference_mode()
    def encode(self, text: str) -> PromptEmbeds:
        """Embed ``text``: tokens ``(1, 77 + 256, D)`` and pooled ``(1, P)``, on the encoders' device."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            text, text, text, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return PromptEmbeds(tokens, pooled)


def _load_pipeline(base: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusion3Pipeline  # here, since it imports transformers, which few runs need

    unused: list[str] = ["transformer", "vae", "scheduler", "image_encoder", "feature_extractor"]
    unused += [] if (base / _T5[0]).is_dir() else _T5
    # it warns about every caption longer than CLIP's 77 tokens, although T5 reads all of it
    logging.getLogger(StableDiffusion3Pipeline.__module__).setLevel(logging.ERROR)
    try:
        return StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=dtype, local_files_only=True, **dict.fromkeys(unused))
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the text encoders of {base} cannot be loaded: {error}") from error


def _width_of_t5(base: Path) -> Any:
    """A stand-in for the transformer, from which ``encode_prompt`` takes the width of the zeros where there is no T5."""
    from diffusers import SD3Transformer2DModel

    try:
        config: Any = SD3Transformer2DModel.load_config(base / "transformer", local_files_only=True)
        return SimpleNamespace(config=SimpleNamespace(joint_attention_dim=config["joint_attention_dim"]))
    except (OSError, KeyError) as error:
        raise InputError(f"{base} has no text_encoder_3, and no transformer configuration to replace it: {error}") from error
