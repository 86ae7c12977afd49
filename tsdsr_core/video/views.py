"""Frames that hold the views of two eyes, or of all directions: what of that the result says."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction

import av

_LAYOUTS = {
    (1, 0): "left_right", (1, 1): "right_left", (2, 0): "top_bottom", (2, 1): "bottom_top",
    (4, 0): "checkerboard_lr", (4, 1): "checkerboard_rl", (6, 0): "row_interleaved_lr", (6, 1): "row_interleaved_rl",
    (7, 0): "col_interleaved_lr", (7, 1): "col_interleaved_rl",
}  # fmt: skip
"""Matroska's names of how two views are packed, by FFmpeg's number and whether the left one comes second."""
_PACKINGS = {"left_right": 3, "top_bottom": 4}
"""Numbers of H.264's frame packing (ITU-T H.264, D.2.26), which does not need the container."""


@dataclass(frozen=True)
class Views:
    """What a frame shows."""

    stereo: str | None = None
    """Matroska's name of how two views are packed; None for one view."""
    panorama: bool = False
    """Whether it is a picture of all directions around the camera."""


def views_of(frame: av.VideoFrame) -> Views:
    """What is said of a frame, by its container or in its stream."""
    stereo, data = None, frame.side_data.get("STEREO3D")
    if data is not None:
        packed, flags = struct.unpack_from("=iI", bytes(data))
        stereo = _LAYOUTS.get((packed, flags & 1), "another layout") if packed else None
    return Views(stereo, frame.side_data.get("SPHERICAL") is not None)


@dataclass(frozen=True)
class Marks:
    """How a result says what its frames show."""

    metadata: dict[str, str]
    """Of the stream."""
    packing: int | None
    """H.264's number of the packing, for the encoder."""
    warnings: list[str]


def marks_for(views: Views, container: str, h264: bool, turned: bool, aspect: Fraction) -> Marks:
    """What can be said in ``container``, and warnings for the rest.

    MKV's mark also halves the size at which a player shows the frame.  FFmpeg then writes no shape of the pixels, so it is used
    for square ones alone.  PyAV gives no access to the marks of MP4 and MOV.
    """
    metadata, packing, warnings = {}, None, []
    if views.stereo:
        packing = _PACKINGS.get(views.stereo) if h264 and not turned else None
        if container == "matroska" and views.stereo in _LAYOUTS.values() and aspect == 1 and not turned:
            metadata = {"stereo_mode": views.stereo}
        elif packing:
            warnings.append(
                "the mark of its two views is kept in the H.264 stream alone: players that do not read it there show both views"
            )
        else:
            warnings.append("left out the mark of its two views: players show both")
    if views.panorama:
        warnings.append("left out the mark of a 360-degree video: players show it flat until a tool for metadata sets it again")
    return Marks(metadata, packing, warnings)
