"""Progress on a terminal, such as "12/200, 3 min left"; nothing where standard error goes elsewhere."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

_FORMAT = "{percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {unit}s{left}"


class _Bar(tqdm):
    @property
    def format_dict(self) -> dict[str, Any]:
        """As tqdm's, with the time left in words."""
        found = dict(super().format_dict)
        done = found["n"] - found["initial"]
        left = ""
        if done and found["total"]:
            each = 1 / found["rate"] if found["rate"] else found["elapsed"] / done
            left = f", {time_left((found['total'] - found['n']) * each)}"
        return {**found, "left": left}


def bar(total: int, unit: str, hidden: bool = False, leave: bool = True) -> tqdm:
    """A bar for ``total`` things; it stays on the terminal after its end where ``leave`` is set."""
    return _Bar(total=total, unit=unit, disable=True if hidden else None, leave=leave, bar_format=_FORMAT)


def time_left(seconds: float) -> str:
    """Seconds as a person would say them: "40 s left", "3 min left", "2 h 5 min left"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min left"
