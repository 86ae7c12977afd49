"""A VAE of which another node replaced parts or methods, in a real ComfyUI: refused by name, and the plain one stays itself."""

import numpy as np
import pytest

from ...comfyui.host import Graph
from .test_files import builtin, fail, succeed, use

REFUSED = {
    "norms": "was replaced",
    "parts of a block": "its decoder.conv_out was replaced",
    "methods": "its _conv_forward was replaced",
    "padding mode": "its padding is circular",
    "method of the VAE": "its decode was replaced",
}


def replaced(graph: Graph, kind: str) -> tuple[str, tuple]:
    """The built-in model's loader, and its VAE after the other node."""
    loader = builtin(graph)
    return loader, (graph.add("TestReplacedVae", vae=(loader, 1), kind=kind), 0)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("node", ["TSDSREncode", "TSDSRDecode", "TSDSRUpscale", "TSDSRSaveCheckpoint"])
def test_a_replaced_vae_is_told_what_to_leave_out(node, kind, host):
    graph = Graph()
    loader, vae = replaced(graph, kind)
    use(graph, node, vae, (loader, 0), (loader, 2))
    error = fail(host, graph)
    assert "another node changed the VAE, which TSD-SR runs part by part" in error
    assert REFUSED[kind] in error
    assert "leave that node out, such as one for seamless tiling" in error


def through(graph: Graph, vae: tuple, name: str, decode: str = "TSDSRDecode") -> str:
    """The photo encoded and decoded; by our nodes, or decoded by the stock one. An older host runs no graph twice."""
    image = graph.add("LoadImage", image="photo.png")
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(builtin(graph), 1))
    inputs = {"samples" if decode == "VAEDecode" else "latent": (latent, 0), "vae": vae}
    return graph.add("SaveImage", images=(graph.add(decode, **inputs), 0), filename_prefix=name)


def run(host, graph: Graph, save: str) -> np.ndarray:
    return succeed(host, graph).pictures(save)[0].astype(int)


def test_the_plain_vae_is_itself_after_the_host_ran_a_patched_copy(host):
    """The copy's parts, which calculate the same, stay in the modules that both share until the host loads another."""
    graph = Graph()
    _, vae = replaced(graph, "norms")
    patched = run(host, graph, through(graph, vae, "patched", "VAEDecode"))
    graph = Graph()
    plain = run(host, graph, through(graph, (builtin(graph), 1), "after a patched copy"))
    assert np.abs(patched[:44, :52] - plain).max() <= 1, "rounding to 8 bit"


def test_a_copy_that_does_the_same_is_taken(host):
    """Seamless tiling that is off, and parts that are compiled for one copy."""
    graph = Graph()
    plain = run(host, graph, through(graph, (builtin(graph), 1), "before copies"))
    for kind in ("methods, off", "compiled"):
        graph = Graph()
        _, vae = replaced(graph, kind)
        assert np.abs(run(host, graph, through(graph, vae, kind)) - plain).max() <= 1, kind
