"""Many frames in a real ComfyUI: memory, progress, cancelling between frames, and the run after that."""

import json
import subprocess
import time

import numpy as np

from ...comfyui import host as host_module
from ...comfyui.clip_memory import peak
from ...comfyui.graphs import builtin_graph
from ...comfyui.host import Graph
from .test_running import through_a_wrapper

WATCH = """
import asyncio, json, struct, sys
import aiohttp

async def watch(port, nodes):
    progress, texts = [], []
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"ws://127.0.0.1:{port}/ws?clientId=watcher") as socket:
            await session.post(f"http://127.0.0.1:{port}/prompt", json={"prompt": nodes, "client_id": "watcher"})
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    if struct.unpack(">I", message.data[:4])[0] == 3:
                        texts.append(message.data[8:].decode(errors="replace"))
                    continue
                said = json.loads(message.data)
                if said["type"] == "progress":
                    progress.append((said["data"]["value"], said["data"]["max"]))
                if said["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    print(json.dumps({"end": said["type"], "progress": progress, "texts": texts}))
                    return

asyncio.run(watch(int(sys.argv[1]), json.loads(sys.argv[2])))
"""


def watched(host, graph: Graph) -> dict:
    """What the frontend is told of a run."""
    _, python = host_module.find()
    command = [str(python), "-c", WATCH, str(host.port), json.dumps(graph.nodes)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300, text=True).stdout)


def clip_graph(first: str, count: int, **changes) -> tuple[Graph, str]:
    """``count`` frames: ``first``, then its inverse again and again."""
    graph = Graph()
    image = graph.add("LoadImage", image=first)
    inverse = graph.add("RepeatImageBatch", image=(graph.add("ImageInvert", image=(image, 0)), 0), amount=count - 1)
    frames = graph.add("ImageBatch", image1=(image, 0), image2=(inverse, 0))
    return builtin_graph((frames, 0), graph, **changes)


def test_progress_counts_frames(host):
    graph, _ = clip_graph("photo.png", 6, strength=0.95)
    told = watched(host, graph)
    assert told["end"] == "execution_success"
    for count in range(1, 7):
        assert sum(f"{count}/6 images" in text for text in told["texts"]) == 1
    largest = max(most for _, most in told["progress"])
    values = [value for value, most in told["progress"] if most == largest]
    assert values == sorted(values)
    assert values[-1] == largest
    assert len(values) > 3


def test_a_cancelled_clip_ends_between_frames_and_leaves_nothing_to_the_next(host):
    graph, _ = clip_graph("photo.png", 12, strength=0.85)
    through_a_wrapper(graph, cells=10**9, log="frames of a clip")
    before = host.log.read_text().count("frames of a clip")
    prompt = host.start(graph)
    while host.log.read_text().count("frames of a clip") == before:  # encoded, but none is decoded yet
        assert host.get("/queue")["queue_running"]
        time.sleep(0.02)
    start = time.monotonic()
    host.post("/interrupt", {})
    assert host.wait(prompt).status == "interrupted"
    assert time.monotonic() - start < 20, "eleven frames to decode take longer"
    graph, save = clip_graph("lighthouse.png", 2, **{"size.factor": 1.0})
    graph, alone = builtin_graph("lighthouse.png", graph, **{"size.factor": 1.0})
    result = host.run(graph)
    assert result.status == "success", result.error
    first, second = result.pictures(save)
    assert np.abs(first.astype(int) - result.pictures(alone)[0]).max() <= 1
    assert np.abs(first.astype(int) - second).mean() > 20


def test_memory_grows_by_the_result_alone(host):
    """Not by all frames once more for each operation; the host's EmptyImage takes the room of one more while it runs."""

    def run(count: int, color: int) -> None:
        graph = Graph()
        image = graph.add("EmptyImage", width=256, height=256, batch_size=count, color=color)
        fix = {"color_fix": "wavelet", "color_fix.wavelet_levels": 5}
        result = graph.add("TSDSRColorFix", image=(image, 0), reference=(image, 0), **fix)
        graph.add("PreviewAny", source=(graph.add("GetImageSize", image=(result, 0)), 0))
        result = host.run(graph)
        assert result.status == "success", result.error

    run(2, 1)
    start = host.memory()
    with peak(host) as found:
        run(200, 2)
    frames = 200 * 256 * 256 * 3 * 4
    assert 2 * frames < found[0] - start < 4 * frames
