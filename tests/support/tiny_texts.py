"""Tiny random text encoders and tokenizers in SD3's layout, which fit the models of ``tiny``."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .tiny import TRANSFORMER

CLIP_WIDTHS = (8, 12)
LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation]


def clip_tokenizer() -> CLIPTokenizer:
    """One token for a letter."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """One token for a letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in ["▁", *LETTERS])]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def clip(width: int) -> CLIPTextModelWithProjection:
    """A text encoder whose tokens and pooled embedding are ``width`` wide."""
    size = 2 * len(LETTERS) + 2
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def t5() -> T5EncoderModel:
    """A text encoder as wide as the transformer's context."""
    width = TRANSFORMER["joint_attention_dim"]
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def make_texted(folder: Path, sd3: Path) -> Path:
    """The whole SD3 folder: the transformer and VAE of ``sd3`` with random text encoders."""
    torch.manual_seed(5)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(sd3 / "transformer"),
        vae=AutoencoderKL.from_pretrained(sd3 / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(CLIP_WIDTHS[0]),
        text_encoder_2=clip(CLIP_WIDTHS[1]),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder
