"""The tables of ``tsdsr bench --gpu`` in Markdown, as docs/performance.md has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .benchmark import STAGE_NAMES


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown; what failed or was left out says so in its place."""
    rows = [
        f"### {report['machine']}", "",
        f"`tsdsr bench --gpu --size {report['size']}`, {_type(report['dtype'])}, median of {report['repeats']}. "
        + "; ".join(
            f"{name}: {weights / 1e9:.2f} GB of weights, loaded in {report['load_seconds'][name]:.1f} s"
            for name, weights in report["weights"].items()
        )
        + f". A matrix product reaches {report['ceiling_flops'] / 1e12:.2f} TFLOP/s.",
    ]  # fmt: skip
    for name, (title, write) in _SECTIONS.items():
        if name in report:
            rows += ["", f"**{title}**", "", *_section(report[name], report, write)]
    return "\n".join(rows)


def _section(found: Any, report: dict[str, Any], write: Callable[[Any, dict[str, Any]], list[str]]) -> list[str]:
    for reason in ("skipped", "error"):
        if isinstance(found, dict) and reason in found:
            return [f"Not measured: {found[reason]}."]
    return write(found, report)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table.

    >>> table(["side", "seconds"], [["512", "0.1"]])
    ['| side | seconds |', '|---|---|', '| 512 | 0.1 |']
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in cells)]


def _exactness(found: list[dict[str, Any]], _: dict[str, Any]) -> list[str]:
    cells = [[row["half"], _type(row["dtype"]), f"{row['untiled']:.1e}", f"{row['tiled']:.1e}"] for row in found]
    return table(["half", "type", "untiled, maximum error", "tiled, maximum error"], cells)


def _difference(found: dict[str, Any], _: dict[str, Any]) -> list[str]:
    maximum, mean = (f"{found[name]:.2f}" for name in ("maximum", "mean"))
    return [f"At {found['side']}x{found['side']}, with the same tiles: {maximum} levels of 255 at most, {mean} in the mean."]


def _times(found: list[dict[str, Any]], report: dict[str, Any]) -> list[str]:
    return _timed(found, report, "side", lambda row: str(row["side"]))


def _held(found: list[dict[str, Any]], report: dict[str, Any]) -> list[str]:
    return _timed(found, report, "card, side", lambda row: f"{row['gigabytes']} GB, {row['side']}")


def _timed(
    found: list[dict[str, Any]], report: dict[str, Any], first: str, label: Callable[[dict[str, Any]], str]
) -> list[str]:
    head = [first, "", "seconds", *STAGE_NAMES, "peak memory", "TFLOP", "of a matrix product's FLOP/s"]
    cells = []
    for row in found:
        if reason := row.get("skipped") or row.get("error"):
            said = "not measured: " if "skipped" in row else "does not fit: "
            cells.append([label(row), row.get("name", "ours"), said + reason] + [""] * (len(head) - 3))
            continue
        counted = row["flops"] > 0
        cells.append([
            label(row), row["name"], _seconds(row["seconds"]), *(_seconds(row["stages"][stage]) for stage in STAGE_NAMES),
            _memory(row["peak_bytes"]), f"{row['flops'] / 1e12:.2f}" if counted else "",
            f"{row['flops_per_second'] / report['ceiling_flops']:.0%}" if counted else "",
        ])  # fmt: skip
    return table(head, cells)


def _attention(found: list[dict[str, Any]], _: dict[str, Any]) -> list[str]:
    cells = []
    for row in found:
        measured = ["does not fit: " + row["error"], ""] if "error" in row else [
            _seconds(row["seconds"]), _memory(row["beyond_bytes"])
        ]  # fmt: skip
        cells.append([str(row["side"]), str(row["tokens"]), row["way"], *measured])
    return table(["side", "tokens", "", "seconds", "memory beyond queries, keys and values"], cells)


def _comfyui(found: list[dict[str, Any]], _: dict[str, Any]) -> list[str]:
    cells = []
    for row in found:
        peak = row.get("peak_gigabytes")
        measured = [_not_measured(row), "", ""] if {"skipped", "error"} & row.keys() else [
            _seconds(row["first_seconds"]), _seconds(row["seconds"]), "-" if peak is None else f"{peak:.1f} GB"
        ]  # fmt: skip
        cells.append([row["mode"], str(row["side"]), *measured])
    return table(["mode", "side", "seconds, first run", "seconds", "peak memory"], cells)


def _not_measured(row: dict[str, Any]) -> str:
    return f"not measured: {row['skipped']}" if "skipped" in row else f"failed: {row['error']}"


def _profiles(found: dict[str, dict[str, Any]], _: dict[str, Any]) -> list[str]:
    rows = []
    for name, profile in found.items():
        total = profile["milliseconds"]
        rows += [
            f"{name}: {total:.1f} ms in kernels, {profile['launches']} launches, {profile['waits']} waits, "
            f"{profile['copies']} copies to the device.", "",
            *table(
                ["kernel", "calls", "ms", "share"],
                [
                    [f"`{kernel['name'][:80]}`", str(kernel["calls"]), f"{kernel['milliseconds']:.2f}",
                     f"{kernel['milliseconds'] / max(total, 1e-9):.0%}"]
                    for kernel in profile["kernels"]
                ],
            ), "",
        ]  # fmt: skip
    return rows[:-1]


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _memory(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _type(name: str) -> str:
    return name.removeprefix("torch.")


_SECTIONS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], list[str]]]] = {
    "rows": ("Against the published procedure", _times),
    "difference": ("Difference between the two procedures", _difference),
    "exactness": ("The autoencoder against fp64 without tiles, relative to the largest value", _exactness),
    "held": ("Ours on smaller cards: the rest of the memory is filled", _held),
    "comfyui": ("In ComfyUI, with the time to load and save images", _comfyui),
    "attention": ("Attention with one head of 512", _attention),
    "profiles": ("Kernels that take most time", _profiles),
}
