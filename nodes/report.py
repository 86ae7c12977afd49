"""What TSD-SR Upscale shows on the node after a run: sizes, tiles, seconds, memory, and what the automatic settings came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from ..tsdsr_core.image_size import Size, SizePlan
from .host.sampling import TilesUsed


@dataclass
class Report:
    """Filled while a node runs."""

    tiles: TilesUsed = field(default_factory=TilesUsed)
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, over all images."""
    _reached: float = field(default=0.0, init=False)

    def timed(self, name: str, stage: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``stage``, with its time counted."""

        def run(values: Tensor) -> Tensor:
            start = time.perf_counter()
            result = stage(values)
            result[(-1,) * result.ndim].item()  # waits for an accelerator
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    def progress(self, stage: str, done: int, total: int) -> None:
        """The pipeline's progress: what lies between an image's decoding and its colour fix is the time of the latter."""
        now = time.perf_counter()
        if stage == "colour":
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._reached
        self._reached = now

    def text(
        self, images: int, size: Size, plan: SizePlan, peak: int | None, automatic: Collection[str], levels: int | None
    ) -> str:
        """The report in few and short lines: the classic view shows two of them, Nodes 2.0 all.

        Args:
            images: how many there were, of one ``size``.
            automatic: names of the settings that were left to the node.
            peak: bytes of memory, of the device or, on the CPU, of the process; None if they are not known.
            levels: of the wavelet colour fix; None for another.
        """
        count = f"{images} images, " if images > 1 else ""
        processed = "" if plan.work == plan.target else f", processed at {_shown(plan.work)}"
        each = self.tiles.count // images
        tiles = f"{each} tiles of {self.tiles.width}x{self.tiles.height}, batch {self.tiles.batch}" if each > 1 else "one tile"
        stages = ", ".join(f"{name} {seconds:.{int(seconds < 9.95)}f}" for name, seconds in self.seconds.items())
        memory = "" if peak is None else f"; peak {peak / 1e9:.1f} GB"
        lines = [f"{count}{_shown(size)} → {_shown(plan.target)}{processed}, {tiles}", f"{stages} s{memory}"]
        shown_above = ("tile", "tile_batch") if each > 1 else ()
        chosen = [name for name in shown_above if name in automatic]
        if levels and "wavelet_levels" in automatic:
            chosen.append(f"wavelet_levels {levels}")
        if chosen:
            lines.append(f"automatic: {', '.join(chosen)}")
        return ";\n".join(lines)  # Nodes 2.0 shows the line breaks as spaces


def _shown(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
