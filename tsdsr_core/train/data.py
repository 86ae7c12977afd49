"""Training images: folders of photographs, prepared folders and synthetic pictures -> pairs of low and high quality."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset

from ..restore import bicubic
from . import synthetic
from .degradations import degrade
from .prepared import SURROUNDINGS, Prepared, is_prepared
from .randomness import generator_for
from .sources import Photos

log = logging.getLogger(__name__)
Read = TypeVar("Read")
Folder = Path | tuple[Path, float]
"""A folder, or a folder and its weight."""
CACHE_BYTES = 2**28
_MOST_SHRINK = 3
_LEAST_DETAIL = 1e-3


@dataclass(frozen=True)
class Mixture:
    """What a batch is drawn from."""

    crop: int
    """Side of a high-quality crop in pixels, a multiple of ``scale``."""
    scale: int
    presets: tuple[tuple[str, float], ...]
    """Degradation presets and their weights; none for trainings on good pictures alone, where ``low`` is ``high``."""
    synthetic_share: float
    """Share of synthetic pictures, 0..1."""
    candidates: int = 1
    """Crops of photographs among which one is drawn, each of a photograph of its own; see ``detail``."""
    contrast: float = 1.0
    """Most that the contrast of a picture is multiplied by; see ``recoloured``."""
    permute_channels: bool = False

    @property
    def margin(self) -> int:
        """Pixels around a crop that its degradation sees."""
        return SURROUNDINGS * self.scale


class Pairs(Dataset[dict[str, Tensor]]):
    """Endless map-style dataset of training pairs.

    Sample ``index``, any whole number from 0, is a function of (seed, index) alone, whatever process or worker draws it,
    so that resuming and sharing out among processes need no state.  A file that proves damaged is reported once, also
    across workers, and another one of its folder is drawn in its place.
    """

    def __init__(
        self, folders: Sequence[Folder], mixture: Mixture, seed: int, captions: bool = False, latents: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:  # fmt: skip
        """List the folders; no picture is decoded yet.

        Args:
            folders: of photographs (also globs) or made by ``prepare``.  Weights, given to all or none, are the folders'
                shares of the samples; without them, each picture is drawn as often as any other.
            captions: give each sample its caption's embeddings; all folders must be prepared with captions, and there
                are no synthetic pictures.
            latents: give cached latents, where all folders are prepared and there are no synthetic pictures.
            cache_bytes: how much decoded photographs of a folder may take, in each process.

        Raises:
            ValueError: for a folder without usable pictures, wrong weights, captions that are missing, or prepared
                folders that do not fit the mixture or each other.
        """
        paths, given = _split_weights(folders)
        self.mixture = mixture
        self.seed = seed
        smallest = mixture.crop + 2 * mixture.margin
        self.sources = [Prepared(p) if is_prepared(p) else Photos(p, smallest, cache_bytes) for p in paths]
        self.weights = given or [float(len(source.paths)) for source in self.sources]
        prepared = [source for source in self.sources if isinstance(source, Prepared)]
        only_prepared = len(prepared) == len(self.sources) and not mixture.synthetic_share
        self.has_captions = captions
        self.has_latents = latents and only_prepared
        for source in prepared:
            _check_fit(source, mixture)
        if captions:
            _check_captions(self.sources, mixture)
        _check_shapes(prepared, self._model_tensors)
        self.synthetic = synthetic_pictures(mixture) if mixture.synthetic_share else []

    @property
    def _model_tensors(self) -> list[str]:
        return ["latent"] * self.has_latents + ["tokens", "pooled"] * self.has_captions

    def check_model(self, autoencoder: str, prompt: Mapping[str, Sequence[int]]) -> None:
        """Raise ``ValueError`` where cached latents or captions are of another base model than that of a run.

        Args:
            autoencoder: its fingerprint (``networks.fingerprint``).
            prompt: shapes of ``tokens`` and ``pooled`` of one sample.
        """
        for source in self.sources:
            if not isinstance(source, Prepared):
                continue
            if self.has_latents and source.settings.autoencoder != autoencoder:
                raise ValueError(
                    f"{source.folder} has latents of another autoencoder ({source.settings.base}) than that of --base: "
                    "prepare it again with this base"
                )
            found = {name: source.shapes[name] for name in prompt if self.has_captions}
            if any(list(prompt[name]) != shape for name, shape in found.items()):
                raise ValueError(f"{source.folder} has captions of shapes {found}, the prompt has {dict(prompt)}: "
                                 "prepare captions and prompt with the same base")  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number ``index``, float32 on the CPU.

        Returns:
            - ``low``: ``(3, crop, crop)`` in 0..1, the low quality enlarged bicubically;
            - ``high``: ``(3, crop, crop)`` in 0..1;
            - with ``has_latents``, ``latent``: ``(C, h, w)``, the unscaled posterior mode of ``high``;
            - with ``has_captions``, ``tokens`` ``(T, D)`` and ``pooled`` ``(P,)``.

            Samples with latents or captions are not flipped or turned: a latent belongs to its pixels as they are, and
            a caption to what is left, right and upright.

        Raises:
            ValueError: when every file of the folder drawn from has proved damaged.
        """
        generator = generator_for(self.seed, index, "pairs")
        if float(torch.rand((), generator=generator)) < self.mixture.synthetic_share:
            return self._pair(self._view(self.synthetic[_int(len(self.synthetic), generator)], generator), generator)
        source = self.sources[_weighted(self.weights, generator)]
        if isinstance(source, Prepared):
            return self._from_prepared(source, generator)
        count = self.mixture.candidates
        views = [self._view(_readable(source, source.read, generator), generator) for _ in range(count)]
        chosen = views[_weighted([detail(view) for view in views], generator)] if count > 1 else views[0]
        return self._pair(chosen, generator)

    def _view(self, picture: Tensor, generator: Generator) -> Tensor:
        return random_view(picture, self.mixture.crop + 2 * self.mixture.margin, generator)

    def _pair(self, view: Tensor, generator: Generator) -> dict[str, Tensor]:
        high = recoloured(turned(view, generator), self.mixture, generator)
        low = _degraded(high, self.mixture, generator)
        return {"low": _cut_margin(low, self.mixture), "high": _cut_margin(high, self.mixture)}

    def _from_prepared(self, source: Prepared, generator: Generator) -> dict[str, Tensor]:
        mixture = self.mixture
        names = ["high", *self._model_tensors]
        cached = f"low_{_int(source.settings.variants, generator)}" if source.settings.variants else None
        wanted = names if cached is None else [*names, cached]
        tensors = _readable(source, lambda position: source.read(position, wanted), generator)
        high = tensors["high"].float() / 255
        side = mixture.crop + 2 * mixture.margin
        if cached is None:
            low = _degraded(_reflected(high, mixture.margin), mixture, generator)
        else:
            low = bicubic(tensors[cached].float()[None] / 255, (side, side))[0]
        pair = torch.stack((_cut_margin(low, mixture), high))
        if not self._model_tensors:
            pair = turned(pair, generator)
        return {"low": pair[0], "high": pair[1], **{name: tensors[name].float() for name in self._model_tensors}}


def _split_weights(folders: Sequence[Folder]) -> tuple[list[Path], list[float]]:
    """The folders, and their weights, or none where no folder has one."""
    if not folders:
        raise ValueError("no folder of training images: give at least one")
    weights = [folder[1] for folder in folders if isinstance(folder, tuple)]
    if len(weights) not in (0, len(folders)):
        raise ValueError(f"{len(weights)} of {len(folders)} folders have weights: give one to all of them or to none")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"folder weights {weights}: expected numbers above 0")
    return [folder[0] if isinstance(folder, tuple) else folder for folder in folders], weights


def _check_fit(source: Prepared, mixture: Mixture) -> None:
    settings = source.settings
    if settings.crop != mixture.crop:
        raise ValueError(f"{source.folder} is prepared with crop {settings.crop}, not {mixture.crop}: train with that crop")
    if settings.variants and settings.scale != mixture.scale:
        raise ValueError(
            f"{source.folder} has degradations of scale {settings.scale}, not {mixture.scale}: train with that scale"
        )


def _check_captions(sources: Sequence[Photos | Prepared], mixture: Mixture) -> None:
    without = [str(s.folder) for s in sources if not (isinstance(s, Prepared) and s.settings.captions)]
    if without:
        raise ValueError(f"no captions for {', '.join(without)}: make them with tsdsr train prepare --captions")
    if mixture.synthetic_share:
        raise ValueError(f"synthetic_share = {mixture.synthetic_share}: synthetic pictures have no captions; set it to 0")


def _check_shapes(prepared: Sequence[Prepared], names: Sequence[str]) -> None:
    for name in names:
        shapes = {str(source.folder): source.shapes[name] for source in prepared}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise ValueError(f"{name} of different shapes, {shapes}: prepare all folders with the same base model")


def _readable(source: Photos | Prepared, read: Callable[[int], Read], generator: Generator) -> Read:
    """What ``read`` gives of a random file of ``source``; a damaged one is reported once and another drawn.

    What is drawn does not hang on which files are known to be damaged already.
    """
    while not source.bad.all():
        position = _int(len(source.paths), generator)
        if source.bad[position]:
            continue
        try:
            return read(position)
        except ValueError as error:
            source.bad[position] = True
            log.warning("left out: %s", error)
    raise ValueError(f"{source.folder}: none of its {len(source.paths)} files can be read")


def _reflected(image: Tensor, margin: int) -> Tensor:
    """``image`` with mirrored surroundings, or its border's colours where it is too small for that."""
    return F.pad(image[None], (margin,) * 4, mode="reflect" if margin < min(image.shape[1:]) else "replicate")[0]


def synthetic_pictures(mixture: Mixture) -> list[Tensor]:
    """The 32 synthetic pictures of every run, uint8 ``(3, side, side)``, large enough for a crop with its margin."""
    own = torch.Generator().manual_seed(0)  # apart from the run's, or a resumed run would draw other numbers
    side = max(256, mixture.crop + 2 * mixture.margin)
    return [synthetic.picture(side, own) for _ in range(32)]


def turned(image: Tensor, generator: Generator) -> Tensor:
    """``(..., H, W)`` flipped or not, and turned by a multiple of 90 degrees."""
    if _int(2, generator):
        image = image.flip(-1)
    return torch.rot90(image, _int(4, generator), (-2, -1))


def recoloured(picture: Tensor, mixture: Mixture, generator: Generator) -> Tensor:
    """``(3, H, W)`` in 0..1 with stronger contrast and other colours, so that few photographs stand for more.

    Half of the pictures have the distance of each channel from its mean multiplied by up to ``mixture.contrast``, every factor
    as likely on a logarithmic scale; with ``permute_channels``, channels come in any order.
    """
    if mixture.contrast > 1 and _int(2, generator):
        factor = mixture.contrast ** float(torch.rand((), generator=generator))
        mean = picture.mean((1, 2), keepdim=True)
        picture = (mean + factor * (picture - mean)).clamp(0, 1)
    return picture[torch.randperm(3, generator=generator)] if mixture.permute_channels else picture


def random_view(picture: Tensor, side: int, generator: Generator) -> Tensor:
    """A random square ``(3, side, side)`` in 0..1 of a uint8 picture at its size or, where it is large, a half or a third."""
    shrink = 1 + _int(min(_MOST_SHRINK, min(picture.shape[1:]) // side), generator)  # finer detail from the same photo
    source_side = shrink * side
    top = _int(picture.shape[1] - source_side + 1, generator)
    left = _int(picture.shape[2] - source_side + 1, generator)
    crop = picture[:, top : top + source_side, left : left + source_side].float() / 255
    return crop if shrink == 1 else F.avg_pool2d(crop, shrink)


def detail(image: Tensor) -> float:
    """Root mean square step between neighbours of ``(3, H, W)``: what a crop is drawn by, for sky and fog teach little."""
    steps = [image.diff(dim=axis).square().mean() for axis in (1, 2)]
    return float((torch.stack(steps).mean() + _LEAST_DETAIL**2).sqrt())


def _degraded(high: Tensor, mixture: Mixture, generator: Generator) -> Tensor:
    """``high`` made worse by a preset drawn by weight, if there is one, and enlarged again; the same shape."""
    if not mixture.presets:
        return high
    names, weights = zip(*mixture.presets, strict=True)
    low = degrade(high, mixture.scale, names[_weighted(weights, generator)], generator)
    return bicubic(low[None], (high.shape[1], high.shape[2]))[0]


def _cut_margin(image: Tensor, mixture: Mixture) -> Tensor:
    inner = slice(mixture.margin, mixture.margin + mixture.crop)
    return image[:, inner, inner]


def _weighted(weights: Sequence[float], generator: Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float32), 1, generator=generator))


def _int(stop: int, generator: Generator) -> int:
    return int(torch.randint(stop, (1,), generator=generator))
