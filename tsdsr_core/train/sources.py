"""Folders of photographs: what is in them, from the files' headers, and their pixels on demand."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..image_io import Header, read_header, read_picture
from ..jobs import collect

log = logging.getLogger(__name__)


def colour_pictures(inputs: Sequence[Path], smallest: int) -> list[tuple[Path, Header]]:
    """The colour pictures of files, folders and globs whose sides are at least ``smallest`` pixels.

    Only headers are read.  A file without a picture's header is reported, and how many others are left out, in one line.

    Raises:
        ValueError: for an input that gives no picture, or where none is left.
    """
    names = ", ".join(map(str, inputs))
    with ThreadPoolExecutor() as threads:  # on a network drive, a header costs waiting rather than work
        found = list(threads.map(_try_header, collect([str(path) for path in inputs]).paths))
    pictures: list[tuple[Path, Header]] = []
    grey = small = 0
    for path, header in found:
        if isinstance(header, ValueError):
            log.warning("left out: %s", header)
        elif header.grey:
            grey += 1
        elif min(header.height, header.width) < smallest:
            small += 1
        else:
            pictures.append((path, header))
    if not pictures:
        raise ValueError(f"no colour image of at least {smallest}x{smallest} pixels in {names}: give others or a smaller crop")
    if grey or small:
        log.warning("left out of %s: %d pictures below %dx%d pixels, %d grey ones", names, small, smallest, smallest, grey)
    return pictures


def _try_header(path: Path) -> tuple[Path, Header | ValueError]:
    try:
        return path, read_header(path)
    except ValueError as error:
        return path, error


def read_pixels(path: Path) -> Tensor:
    """A picture as uint8 ``(3, H, W)``.

    Raises:
        ValueError: as ``read_picture``.
    """
    return (read_picture(path).rgb[0] * 255).round().byte()


class Photos:
    """The photographs of one folder, decoded on demand; the latest are kept."""

    def __init__(self, folder: Path, smallest: int, cache_bytes: int) -> None:
        """Read the headers of ``folder``, a folder, file or glob.

        Args:
            smallest: least side in pixels.
            cache_bytes: how much decoded pictures may take, in each process.

        Raises:
            ValueError: as ``colour_pictures``.
        """
        self.folder = folder
        self.paths = [path for path, _ in colour_pictures([folder], smallest)]
        self.bad = shared_flags(len(self.paths))
        self._cache_bytes = cache_bytes
        self._recent: OrderedDict[int, Tensor] = OrderedDict()  # by bytes, and, unlike an lru_cache, fit for pickle

    def read(self, position: int) -> Tensor:
        """Photograph number ``position`` as uint8 ``(3, H, W)``; not to be written to.

        Raises:
            ValueError: where it cannot be decoded, naming it.
        """
        pixels = self._recent.pop(position, None)
        if pixels is None:
            pixels = read_pixels(self.paths[position])
        self._recent[position] = pixels
        while len(self._recent) > 1 and sum(kept.nbytes for kept in self._recent.values()) > self._cache_bytes:
            self._recent.popitem(last=False)
        return pixels


def shared_flags(count: int) -> Tensor:
    """``count`` booleans, all false, that a data loader's workers see and set together."""
    return torch.zeros(count, dtype=torch.bool).share_memory_()
