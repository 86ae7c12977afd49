"""The training data set: pairs of low and high quality from photographs, prepared folders and synthetic images."""

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

from ...errors import InputError
from ...pipeline import bicubic
from . import synthetic
from .degradations import degrade
from .guided import Guided, is_guided
from .photos import Photos
from .prepared import SURROUNDINGS, Prepared, is_prepared
from .randomness import generator_for, random_index, weighted_index

log = logging.getLogger(__name__)
Read = TypeVar("Read")
Folder = Path | tuple[Path, float]
"""A folder, or a folder and its weight."""
CACHE_BYTES = 2**28
"""Default memory for decoded photographs of a folder, in each process."""
_MAX_SHRINK = 3
_MIN_DETAIL = 1e-3


@dataclass(frozen=True)
class Mixture:
    """How samples are drawn."""

    crop: int
    """Side of a high-quality crop in pixels, a multiple of ``scale``."""
    scale: int
    presets: tuple[tuple[str, float], ...]
    """Degradation presets and their relative weights; empty to train on good images only, where ``low`` is ``high``."""
    synthetic_share: float
    """Share of synthetic images, 0..1."""
    candidates: int = 1
    """Number of crops, each of another photograph, to choose a training crop from; see ``detail``."""
    contrast: float = 1.0
    """Maximum contrast gain; see ``recoloured``."""
    permute_channels: bool = False
    """Whether the colour channels are shuffled."""
    smaller_scales: float = 0.0
    """Share of samples, 0..1, whose scale is a smaller divisor of ``scale``."""

    @property
    def margin(self) -> int:
        """Pixels around a crop that are degraded with it, so that its border is like its inside."""
        return SURROUNDINGS * self.scale


class Pairs(Dataset[dict[str, Tensor]]):
    """Endless map-style dataset of training pairs.

    Sample ``index``, any whole number from 0, is a function of (seed, index) only, whichever process or worker draws it, so
    that resuming and distributing need no state.  A damaged file is reported once, also across workers, and replaced by
    another one of its folder.
    """

    def __init__(
        self, folders: Sequence[Folder], mixture: Mixture, seed: int, captions: bool = False, latents: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:  # fmt: skip
        """List the files of the folders; no image is decoded yet.

        Args:
            folders: folders or globs of photographs, or folders made by ``tsdsr train prepare``.  Weights, given to all or
                none, are relative shares of the samples; without them, all images are drawn equally often.
            captions: whether samples have caption embeddings; all folders must be prepared with captions, and there must be
                no synthetic images.
            latents: whether samples have cached latents, if all folders are prepared and there are no synthetic images.
            cache_bytes: memory for decoded photographs of a folder, in each process.

        Raises:
            InputError: for a folder without usable images, invalid weights, missing captions, or prepared folders that do
                not fit the mixture or each other.
        """
        paths, given = _split_weights(folders)
        self.mixture = mixture
        self.seed = seed
        smallest = mixture.crop + 2 * mixture.margin
        self.sources = [_open(path, smallest, cache_bytes) for path in paths]
        self.weights = given or [float(len(source.paths)) for source in self.sources]
        self.has_guides = any(isinstance(source, Guided) for source in self.sources)
        prepared = [source for source in self.sources if isinstance(source, Prepared)]
        only_prepared = len(prepared) == len(self.sources) and not mixture.synthetic_share
        self.has_captions = captions
        self.has_latents = latents and only_prepared
        for source in self.sources:
            if isinstance(source, Prepared):
                _check_fit(source, mixture)
            elif isinstance(source, Guided) and (source.crop < mixture.crop or source.scale != mixture.scale):
                raise InputError(
                    f"{source.folder} has crops of {source.crop} pixels at scale {source.scale}, the training {mixture.crop} "
                    f"at scale {mixture.scale}: make it again with at least that crop and that scale"
                )
        if captions:
            _check_captions(self.sources, mixture)
        _check_shapes(prepared, self._model_tensors)
        self.synthetic = synthetic_images(mixture) if mixture.synthetic_share else []

    @property
    def _model_tensors(self) -> list[str]:
        return ["latent"] * self.has_latents + ["tokens", "pooled"] * self.has_captions

    def check_model(self, autoencoder: str, prompt: Mapping[str, Sequence[int]]) -> None:
        """Raise ``InputError`` if cached latents or captions belong to another base model.

        Args:
            autoencoder: fingerprint of the run's autoencoder (``roles.fingerprint``).
            prompt: shapes of ``tokens`` and ``pooled`` of one sample.
        """
        for source in self.sources:
            if not isinstance(source, Prepared):
                continue
            if self.has_latents and source.settings.autoencoder != autoencoder:
                raise InputError(
                    f"{source.folder} has latents of another autoencoder ({source.settings.base}) than that of --base: "
                    "prepare it again with this --base"
                )
            found = {name: source.shapes[name] for name in prompt if self.has_captions}
            if any(list(prompt[name]) != shape for name, shape in found.items()):
                raise InputError(f"{source.folder} has captions of shapes {found}, the prompt has {dict(prompt)}: "
                                 "prepare captions and prompt with the same --base")  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number ``index``, float32 on the CPU.

        Returns:
            - ``low``: ``(3, crop, crop)`` in 0..1, the low quality enlarged bicubically;
            - ``high``: ``(3, crop, crop)`` in 0..1;
            - if any folder has guides, ``guide``: ``(3, crop, crop)`` in 0..1, equal to ``high`` for samples without one;
            - with ``has_latents``, ``latent``: ``(C, h, w)``, the unscaled posterior mode of ``high``;
            - with ``has_captions``, ``tokens`` ``(T, D)`` and ``pooled`` ``(P,)``.

            Samples with latents or captions are not flipped or rotated: the latent belongs to the pixels as they are, and a
            caption may mention left, right or up.

        Raises:
            InputError: if every file of the chosen folder is damaged.
        """
        generator = generator_for(self.seed, index, "pairs")
        source = self._source(generator)
        if isinstance(source, Prepared):
            return self._from_prepared(source, generator)
        if isinstance(source, Guided):
            return self._from_guided(source, generator)
        high = self._wide(source, generator)
        pair = torch.stack((_degraded(high, self.mixture, generator), high))
        low, high = _cut_margin(pair, self.mixture)
        return {"low": low, "high": high, **({"guide": high} if self.has_guides else {})}

    def photograph(self, generator: Generator) -> Tensor:
        """A random good image ``(3, side, side)`` in 0..1 with its margin, so that side = crop + 2 margins.

        Raises:
            InputError: if the chosen folder is prepared, since its images have no margin.
        """
        source = self._source(generator)
        if isinstance(source, Prepared | Guided):
            raise InputError(f"{source.folder} is a prepared folder: expected a folder of photographs")
        return self._wide(source, generator)

    def _source(self, generator: Generator) -> Photos | Prepared | Guided | None:
        """A random folder to draw a sample from; None for a synthetic image."""
        if float(torch.rand((), generator=generator)) < self.mixture.synthetic_share:
            return None
        return self.sources[weighted_index(self.weights, generator)]

    def _wide(self, source: Photos | None, generator: Generator) -> Tensor:
        if source is None:
            view = self._view(self.synthetic[random_index(len(self.synthetic), generator)], generator)
        else:
            count = self.mixture.candidates
            views = [self._view(_readable(source, source.read, generator), generator) for _ in range(count)]
            view = views[weighted_index([detail(view) for view in views], generator)] if count > 1 else views[0]
        return recoloured(turned(view, generator), self.mixture, generator)

    def _from_guided(self, source: Guided, generator: Generator) -> dict[str, Tensor]:
        images = _readable(source, lambda position: source.read(position, self.mixture.crop, generator), generator)
        images = turned(images, generator)
        if self.mixture.permute_channels:
            images = images[:, torch.randperm(3, generator=generator)]
        return dict(zip(("low", "high", "guide"), images, strict=True))

    def _view(self, image: Tensor, generator: Generator) -> Tensor:
        return random_view(image, self.mixture.crop + 2 * self.mixture.margin, generator)

    def _from_prepared(self, source: Prepared, generator: Generator) -> dict[str, Tensor]:
        mixture = self.mixture
        names = ["high", *self._model_tensors]
        cached = f"low_{random_index(source.settings.variants, generator)}" if source.settings.variants else None
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
        guide = {"guide": pair[1]} if self.has_guides else {}
        return {"low": pair[0], "high": pair[1], **guide, **{name: tensors[name].float() for name in self._model_tensors}}


def _open(path: Path, smallest: int, cache_bytes: int) -> Photos | Prepared | Guided:
    if is_guided(path):
        return Guided(path)
    return Prepared(path) if is_prepared(path) else Photos(path, smallest, cache_bytes)


def _split_weights(folders: Sequence[Folder]) -> tuple[list[Path], list[float]]:
    """The folders, and their weights; an empty list if no folder has one."""
    if not folders:
        raise InputError("no folder of training images: give at least one")
    weights = [folder[1] for folder in folders if isinstance(folder, tuple)]
    if len(weights) not in (0, len(folders)):
        raise InputError(f"{len(weights)} of {len(folders)} folders have a weight: give all of them one, or none")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise InputError(f"folder weights {weights}: expected numbers above 0")
    return [folder[0] if isinstance(folder, tuple) else folder for folder in folders], weights


def _check_fit(source: Prepared, mixture: Mixture) -> None:
    settings = source.settings
    if settings.crop != mixture.crop:
        raise InputError(f"{source.folder} is prepared with crop {settings.crop}, not {mixture.crop}: set data.crop to match")
    if settings.variants and settings.scale != mixture.scale:
        raise InputError(
            f"{source.folder} has degradations of scale {settings.scale}, not {mixture.scale}: set data.scale to match"
        )


def _check_captions(sources: Sequence[Photos | Prepared | Guided], mixture: Mixture) -> None:
    without = [str(s.folder) for s in sources if not (isinstance(s, Prepared) and s.settings.captions)]
    if without:
        raise InputError(f"no captions in {', '.join(without)}: add them with tsdsr train prepare --captions")
    if mixture.synthetic_share:
        raise InputError(f"synthetic_share = {mixture.synthetic_share}: synthetic images have no captions; set it to 0")


def _check_shapes(prepared: Sequence[Prepared], names: Sequence[str]) -> None:
    for name in names:
        shapes = {str(source.folder): source.shapes[name] for source in prepared}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise InputError(f"{name} has different shapes, {shapes}: prepare all folders with the same base model")


def _readable(source: Photos | Prepared | Guided, read: Callable[[int], Read], generator: Generator) -> Read:
    """Call ``read`` on a random file of ``source``; a damaged file is reported once and another one is drawn.

    The result does not depend on which files were found damaged before.
    """
    while not source.bad.all():
        position = random_index(len(source.paths), generator)
        if source.bad[position]:
            continue
        try:
            return read(position)
        except InputError as error:
            source.bad[position] = True
            log.warning("left out: %s", error)
    raise InputError(f"{source.folder}: none of its {len(source.paths)} files can be read")


def _reflected(image: Tensor, margin: int) -> Tensor:
    """``image`` padded by reflection, or by its border pixels if it is too small for that."""
    return F.pad(image[None], (margin,) * 4, mode="reflect" if margin < min(image.shape[1:]) else "replicate")[0]


def synthetic_images(mixture: Mixture) -> list[Tensor]:
    """The 32 synthetic images of every run, uint8 ``(3, side, side)``, large enough for a crop with its margin."""
    own = torch.Generator().manual_seed(0)  # not the run's, or a resumed run would draw other numbers
    side = max(256, mixture.crop + 2 * mixture.margin)
    return [synthetic.draw_image(side, own) for _ in range(32)]


def turned(image: Tensor, generator: Generator) -> Tensor:
    """``(..., H, W)`` flipped at random, and rotated by a random multiple of 90 degrees."""
    if random_index(2, generator):
        image = image.flip(-1)
    return torch.rot90(image, random_index(4, generator), (-2, -1))


def recoloured(image: Tensor, mixture: Mixture, generator: Generator) -> Tensor:
    """Augment the contrast and colours of ``(3, H, W)`` in 0..1, to get more variety from few photographs.

    Half of the images get a contrast gain from 1 to ``mixture.contrast``, uniform on a logarithmic scale, around the mean of
    each channel; with ``permute_channels``, the channels are shuffled.
    """
    if mixture.contrast > 1 and random_index(2, generator):
        factor = mixture.contrast ** float(torch.rand((), generator=generator))
        mean = image.mean((1, 2), keepdim=True)
        image = (mean + factor * (image - mean)).clamp(0, 1)
    return image[torch.randperm(3, generator=generator)] if mixture.permute_channels else image


def random_view(image: Tensor, side: int, generator: Generator) -> Tensor:
    """A random crop ``(3, side, side)`` in 0..1 of a uint8 image, which is first reduced by 1, 2 or 3 if it is large enough."""
    shrink = 1 + random_index(min(_MAX_SHRINK, min(image.shape[1:]) // side), generator)  # finer detail from the same photo
    source_side = shrink * side
    top = random_index(image.shape[1] - source_side + 1, generator)
    left = random_index(image.shape[2] - source_side + 1, generator)
    crop = image[:, top : top + source_side, left : left + source_side].float() / 255
    return crop if shrink == 1 else F.avg_pool2d(crop, shrink)


def detail(image: Tensor) -> float:
    """Amount of detail in ``(3, H, W)``: the RMS difference between neighbouring pixels.

    Crops are drawn in proportion to it, since sky and fog teach little.
    """
    steps = [image.diff(dim=axis).square().mean() for axis in (1, 2)]
    return float((torch.stack(steps).mean() + _MIN_DETAIL**2).sqrt())


def _degraded(high: Tensor, mixture: Mixture, generator: Generator) -> Tensor:
    """``high`` degraded by a random preset, if there are any, and enlarged to the same shape again."""
    if not mixture.presets:
        return high
    names, weights = zip(*mixture.presets, strict=True)
    scale = mixture.scale
    if mixture.smaller_scales and float(torch.rand((), generator=generator)) < mixture.smaller_scales:
        divisors = [divisor for divisor in range(1, scale) if scale % divisor == 0]
        scale = divisors[random_index(len(divisors), generator)]
    low = degrade(high, scale, names[weighted_index(weights, generator)], generator)
    return bicubic(low[None], (high.shape[1], high.shape[2]))[0]


def _cut_margin(image: Tensor, mixture: Mixture) -> Tensor:
    inner = slice(mixture.margin, mixture.margin + mixture.crop)
    return image[..., inner, inner]
