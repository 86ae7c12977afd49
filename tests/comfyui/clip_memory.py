"""How much memory a real ComfyUI takes for the frames of a clip, beyond the frames themselves and the result.

    python -m tests.comfyui.clip_memory --frames 10 40 120

Starts a server for each number of frames, runs TSD-SR Upscale with the built-in model on the CPU, and prints the most that
the server's resident memory grew by, without input and result, and the seconds per frame; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .graphs import BUILTIN, UPSCALE
from .host import Graph, Host, find

NODES = ("upscale", "stages")


def frames_graph(count: int, width: int, height: int, factor: float, color: int, nodes: str = "upscale") -> Graph:
    """A graph over ``count`` equal frames, whose result is kept by nobody but the host's cache."""
    graph = Graph()
    image = graph.add("EmptyImage", width=width, height=height, batch_size=count, color=color)
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    model, vae, conditioning = ((loader, index) for index in range(3))
    if nodes == "upscale":
        given = {"model": model, "vae": vae, "conditioning": conditioning, "size": "scale by", "size.factor": factor}
        result = graph.add("TSDSRUpscale", image=(image, 0), **given, **UPSCALE)
    else:
        large = graph.add("ImageScaleBy", image=(image, 0), upscale_method="bicubic", scale_by=factor)
        latent = graph.add("TSDSREncode", image=(large, 0), vae=vae)
        tiles = {"tile": 0, "tile_overlap": 8, "tile_batch": 0}
        step = graph.add("TSDSROneStep", model=model, conditioning=conditioning, latent=(latent, 0), strength=1.0, **tiles)
        decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=vae)
        fix = {"color_fix": "wavelet", "color_fix.wavelet_levels": 4}
        result = graph.add("TSDSRColorFix", image=(decoded, 0), reference=(large, 0), **fix)
    graph.add("PreviewAny", source=(graph.add("GetImageSize", image=(result, 0)), 0))
    return graph


@contextmanager
def peak(host: Host) -> Iterator[list[int]]:
    """The most resident bytes of the server while the block runs, as the list's one entry."""
    found, ended = [host.memory()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            found[0] = max(found[0], host.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def measure(host: Host, count: int, width: int, height: int, factor: float, nodes: str) -> tuple[float, float]:
    """(megabytes beyond input and result, seconds per frame) of one run."""
    warm = host.run(frames_graph(2, width, height, factor, 1, nodes), seconds=600)
    assert warm.status == "success", warm.error
    before, start = host.memory(), time.monotonic()
    with peak(host) as found:
        result = host.run(frames_graph(count, width, height, factor, 2, nodes), seconds=7200)
    assert result.status == "success", result.error
    pixels = count * 3 * 4 * width * height
    return (found[0] - before - pixels * (1 + factor**2)) / 1e6, (time.monotonic() - start) / count


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[10, 40, 120])
    parser.add_argument("--size", default="480x270", help="of a frame")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--nodes", choices=NODES, default="upscale", help="the one node, or encode, step, decode and fix")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    installed = find()
    assert installed, "no ComfyUI: set COMFYUI_PATH"
    rows = []
    for count in options.frames:
        with tempfile.TemporaryDirectory() as folder:
            host = Host(*installed, Path(folder) / "host")
            try:
                beyond, seconds = measure(host, count, width, height, options.factor, options.nodes)
            finally:
                host.close()
        print(f"{count:4} frames: {beyond:6.0f} MB beyond input and result, {seconds:.2f} s per frame", flush=True)
        rows.append({"frames": count, "megabytes": round(beyond), "seconds": round(seconds, 2)})
    print(json.dumps({"nodes": options.nodes, "size": options.size, "factor": options.factor, "rows": rows}))


if __name__ == "__main__":
    main()
