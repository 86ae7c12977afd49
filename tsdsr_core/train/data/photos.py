"""Folders of photographs: lists them by their headers, and decodes them on demand."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...images.files import Header, read_header, read_picture
from ...images.formats import IMAGE_KINDS
from ...images.jobs import collect, say_left_out

log = logging.getLogger(__name__)


def find_colour_images(inputs: Sequence[Path], smallest: int) -> list[tuple[Path, Header]]:
    """The colour images of files, folders and globs whose sides are at least ``smallest`` pixels.

    Only headers are read.  Files that cannot be read are reported one by one, the number of other skipped files in one line.

    Raises:
        InputError: for an input without images, or if no image is left.
    """
    names = ", ".join(map(str, inputs))
    collected = collect([str(path) for path in inputs])
    others = {kind: count for kind, count in collected.left_out.items() if kind in IMAGE_KINDS}  # not captions
    if others:
        log.warning("%s: %s", names, say_left_out(others))
    with ThreadPoolExecutor() as threads:  # reading headers from a network drive is mostly waiting
        found = list(threads.map(_try_header, collected.paths))
    images: list[tuple[Path, Header]] = []
    grey = small = 0
    for path, header in found:
        if isinstance(header, InputError):
            log.warning("left out: %s", header)
        elif header.grey:
            grey += 1
        elif min(header.height, header.width) < smallest:
            small += 1
        else:
            images.append((path, header))
    if not images:
        raise InputError(f"no colour image of at least {smallest}x{smallest} pixels in {names}: use others or a smaller crop")
    if grey or small:
        log.warning("%s: left out images: %d below %dx%d pixels, %d grey", names, small, smallest, smallest, grey)
    return images


def _try_header(path: Path) -> tuple[Path, Header | InputError]:
    try:
        return path, read_header(path)
    except InputError as error:
        return path, error


def read_pixels(path: Path) -> Tensor:
    """Read an image as uint8 ``(3, H, W)``.

    Raises:
        InputError: as ``read_picture``.
    """
    return (read_picture(path).rgb[0] * 255).round().byte()


class Photos:
    """The photographs of one folder, decoded on demand; the most recent ones are cached."""

    def __init__(self, folder: Path, smallest: int, cache_bytes: int) -> None:
        """Read the headers of ``folder``, a folder, file or glob.

        Args:
            smallest: minimum side in pixels.
            cache_bytes: memory for decoded images, in each process.

        Raises:
            InputError: as ``find_colour_images``.
        """
        self.folder = folder
        self.paths = [path for path, _ in find_colour_images([folder], smallest)]
        self.bad = shared_flags(len(self.paths))
        self._cache_bytes = cache_bytes
        self._recent: OrderedDict[int, Tensor] = OrderedDict()  # limited by bytes and, unlike lru_cache, picklable

    def read(self, position: int) -> Tensor:
        """Photograph number ``position`` as uint8 ``(3, H, W)``; do not write to it.

        Raises:
            InputError: if it cannot be decoded, with its name.
        """
        pixels = self._recent.pop(position, None)
        if pixels is None:
            pixels = read_pixels(self.paths[position])
        self._recent[position] = pixels
        while len(self._recent) > 1 and sum(kept.nbytes for kept in self._recent.values()) > self._cache_bytes:
            self._recent.popitem(last=False)
        return pixels


def shared_flags(count: int) -> Tensor:
    """``count`` booleans, all False, in memory shared with a data loader's workers."""
    return torch.zeros(count, dtype=torch.bool).share_memory_()
