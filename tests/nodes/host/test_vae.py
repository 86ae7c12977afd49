"""ComfyUI's own decoders beside this pack's, in one server; ``pytest tests/nodes/host/test_vae.py -s`` shows the figures."""

import threading
import time

import numpy as np
import pytest

from ...comfyui.host import Graph

DECODERS = {
    "VAEDecode": ("VAEDecode", "samples", {}),
    "TSDSRDecode": ("TSDSRDecode", "latent", {}),
    "TSDSRDecode, tiles of 128": ("TSDSRDecode", "latent", {"vae_tile": 128}),
    "VAEDecodeTiled, tiles of 128": (
        "VAEDecodeTiled", "samples", {"tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8},
    ),
}  # fmt: skip


class Peak(threading.Thread):
    """The server's greatest resident memory while it runs."""

    def __init__(self, host):
        super().__init__(daemon=True)
        self.host, self.most, self.ended = host, 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.host.memory())


def measured(host, graph) -> tuple[np.ndarray, float, int]:
    """The picture that the graph saves, its seconds, and by how much the server's memory grew meanwhile."""
    before, peak = host.memory(), Peak(host)
    peak.start()
    start = time.perf_counter()
    result = host.run(graph)
    seconds = time.perf_counter() - start
    peak.ended.set()
    peak.join()
    assert result.status == "success", result.error
    return result.pictures(list(graph.nodes)[-1])[0].astype(int), seconds, peak.most - before


def decoding(node: str, samples: str, options: dict, again: int) -> Graph:
    graph = Graph()
    image = graph.add("LoadImage", image="large.png")
    image = graph.add("ImageScale", image=(image, 0), upscale_method="area", width=192, height=192, crop="center")
    vae = graph.add("VAELoader", vae_name="sd3.safetensors")
    latent = graph.add("VAEEncode", pixels=(image, 0), vae=(vae, 0))
    latent = graph.add("LatentMultiply", samples=(latent, 0), multiplier=1 + 1e-6 * again)  # or the host shows what it kept
    decoded = graph.add(node, vae=(vae, 0), **{samples: (latent, 0)}, **options)
    graph.add("SaveImage", images=(decoded, 0), filename_prefix="decoded")
    return graph


@pytest.fixture(scope="module")
def table(host, sd3):
    host.run(decoding(*DECODERS["VAEDecode"], again=0))  # loads the VAE and encodes
    rows = {name: measured(host, decoding(*decoder, again=1)) for name, decoder in DECODERS.items()}
    whole, base, _ = rows["VAEDecode"]
    for name, (picture, seconds, grown) in rows.items():
        off = np.abs(picture - whole)
        figures = f"{seconds:6.2f} s  {seconds / base:.2f}  max {off.max():3}  mean {off.mean():.3f}  {grown / 1e9:.2f} GB"
        print(f"\n{name:30} {figures}")
    return rows


@pytest.mark.parametrize("name", ["TSDSRDecode", "TSDSRDecode, tiles of 128"])
def test_tiles_give_what_one_piece_gives(name, table):
    assert np.abs(table[name][0] - table["VAEDecode"][0]).max() <= 1, "rounding to 8 bit"


def test_the_hosts_own_tiles_do_not(table):
    off = np.abs(table["VAEDecodeTiled, tiles of 128"][0] - table["VAEDecode"][0])
    assert off.max() > 10, "what the comparison is for"
