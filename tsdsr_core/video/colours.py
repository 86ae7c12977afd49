"""Frames of any pixel format as RGB tensors, and RGB tensors as frames of planar YUV 4:2:0 with 8 or 10 bits.

swscale only unpacks pixels.  The matrix is applied here in floating point, where swscale is off by up to 4 levels of 255, and
the chroma is resampled here, where swscale takes its samples to lie half a pixel further right than H.264 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange
from torch import Tensor

_BT709, _BT601 = 1, 6
_LUMA = {
    _BT709: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), _BT601: (0.299, 0.114), 7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}  # fmt: skip
"""Weights of red and blue in luma, by ITU-T H.273's number of the matrix."""
_LAYOUTS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (1, 2): "440", (4, 1): "411"}
"""What formats are called whose chroma has so many times fewer columns and rows."""
_DOWN = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]], dtype=torch.float32) / 8
"""Halves both sides of the chroma; its samples lie on the left ones of the luma and between its rows, H.264's default."""
_BETWEEN = torch.tensor([-1.0, 9.0, 9.0, -1.0], dtype=torch.float32) / 16
"""The value in the middle of four."""


@dataclass(frozen=True)
class Coding:
    """How numbers stand for colours in a video, by ITU-T H.273."""

    matrix: int
    full: bool
    """Whether values use the full range, not 16 to 235 of 255."""
    bits: int
    """8 or 10 per channel."""
    primaries: int
    transfer: int

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name of the frames that are written."""
        return "yuv420p" if self.bits == 8 else "yuv420p10le"


def coding_of(frame: av.VideoFrame) -> Coding:
    """How a result of ``frame`` is to be coded: as the frame itself, RGB as BT.709.

    A matrix that is not named, or of another kind, is taken as players do: BT.601 up to standard definition, else BT.709.
    """
    rgb = _is_rgb(frame)
    matrix = frame.colorspace
    if rgb or matrix not in _LUMA:
        matrix = _BT709 if rgb or frame.width >= 1280 or frame.height > 576 else _BT601
    bits = 8 if _depth(frame) <= 8 else 10
    return Coding(matrix, not rgb and _is_full(frame), bits, frame.color_primaries, frame.color_trc)


def to_rgb(frame: av.VideoFrame) -> Tensor:
    """``(1, 3, H, W)`` float32 in 0..1, not turned."""
    bits = _depth(frame)
    suffix = "" if bits <= 8 else f"{bits}le"
    if _is_rgb(frame):
        values: Any = frame.reformat(format="rgb24" if bits <= 8 else "rgb48le").to_ndarray()
        return torch.from_numpy(values.astype(np.float32) / np.iinfo(values.dtype).max).permute(2, 0, 1)[None]
    bits, coding = max(bits, 8), coding_of(frame)
    if len(frame.format.components) < 3:  # grey
        luma = _levels(_plane(frame.reformat(format=f"gray{suffix}"), 0), bits, coding.full, 16, 219)
        return luma.expand(3, -1, -1)[None].clamp(0, 1)
    span = ColorRange.JPEG if coding.full else ColorRange.MPEG  # the same on both sides: values stay as they are
    columns, rows = (-(-side // part) for side, part in zip((frame.width, frame.height), _chroma_size(frame), strict=True))
    planes = frame.reformat(
        format=f"yuv{_LAYOUTS.get((columns, rows), '444')}p{suffix}", src_color_range=span, dst_color_range=span
    )  # fmt: skip
    y = _levels(_plane(planes, 0), bits, coding.full, 16, 219)
    cb, cr = (_levels(_enlarged(_plane(planes, index), y), bits, coding.full, 128, 224) for index in (1, 2))
    red, blue = _LUMA[coding.matrix]
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return torch.stack((r, g, b))[None].clamp(0, 1)


def to_frame(rgb: Tensor, coding: Coding) -> av.VideoFrame:
    """``(1, 3, H, W)`` in 0..1, both sides even, as a frame."""
    r, g, b = rgb[0].float().cpu()
    red, blue = _LUMA[coding.matrix]
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = torch.stack(((b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))))[:, None]
    chroma = F.conv2d(F.pad(chroma, (1, 0, 0, 0), mode="replicate"), _DOWN[None, None], stride=2)
    scale = 2 ** (coding.bits - 8)
    most = 2**coding.bits - 1
    luma = y * most if coding.full else (219 * y + 16) * scale
    chroma = chroma * (most if coding.full else 224 * scale) + 128 * scale
    values = torch.cat((luma.flatten(), chroma.flatten())).round().clamp(0, most)
    array: Any = values.numpy().astype(np.uint8 if coding.bits == 8 else np.uint16).reshape(-1, rgb.shape[3])
    frame = av.VideoFrame.from_ndarray(array, format=coding.pixel_format)
    frame.colorspace, frame.color_range = coding.matrix, ColorRange.JPEG if coding.full else ColorRange.MPEG
    frame.color_primaries, frame.color_trc = coding.primaries, coding.transfer
    return frame


def _is_rgb(frame: av.VideoFrame) -> bool:
    return frame.format.is_rgb or frame.format.has_palette


def _depth(frame: av.VideoFrame) -> int:
    return max(component.bits for component in frame.format.components)


def _is_full(frame: av.VideoFrame) -> bool:
    """Whether values use the full range; where nothing says so, JPEG's formats and grey do."""
    name = frame.format.name
    if name.startswith("yuvj"):
        return True
    if frame.color_range == ColorRange.UNSPECIFIED:
        return name.startswith(("gray", "mono"))
    return frame.color_range == ColorRange.JPEG


def _plane(frame: av.VideoFrame, index: int) -> Tensor:
    """``(H, W)`` float32, without what pads the rows."""
    plane = frame.planes[index]
    kind = np.dtype("u1" if _depth(frame) <= 8 else "<u2")
    rows = np.frombuffer(bytes(plane), kind).reshape(plane.height, plane.line_size // kind.itemsize)
    return torch.from_numpy(rows[:, : plane.width].astype(np.float32))


def _chroma_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Columns and rows of the chroma."""
    return frame.format.chroma_width(frame.width), frame.format.chroma_height(frame.height)


def _enlarged(chroma: Tensor, luma: Tensor) -> Tensor:
    """A plane ``(h, w)`` of chroma at the size ``(H, W)`` of the luma."""
    height, width = luma.shape
    chroma = chroma[None, None]
    if chroma.shape[2] < height:
        chroma = F.interpolate(chroma, (2 * chroma.shape[2], chroma.shape[3]), mode="bicubic", align_corners=False)
    while chroma.shape[3] < width:
        between = F.conv2d(F.pad(chroma, (1, 2, 0, 0), mode="replicate"), _BETWEEN[None, None, None])
        chroma = torch.stack((chroma, between), -1).flatten(-2)
    return chroma[0, 0, :height, :width]


def _levels(plane: Tensor, bits: int, full: bool, zero: int, span: int) -> Tensor:
    """Stored numbers as 0..1, or -0.5..0.5; ``zero`` and ``span`` are those of 8 bits in the limited range."""
    scale = 2 ** (bits - 8)
    if full:
        return (plane - (0 if zero == 16 else zero * scale)) / (2**bits - 1)
    return (plane - zero * scale) / (span * scale)
