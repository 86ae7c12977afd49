"""The nodes on a CUDA device without data: run by a real host's Python, in the host's folder; prints one line for each check.

Usage: python fake_cuda.py PACK
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

pack_folder = Path(sys.argv[1])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, "")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):  # of newer hosts
    import comfy.memory_management


class Setter:
    """As pytest's ``monkeypatch``; the process ends soon."""

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        setattr(owner, name, value)


def load(name: str, path: Path) -> Any:
    """A package or module under a name of its own."""
    places = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pretend(device: torch.device) -> None:
    """Let the host believe in a GPU: what it asks the device is answered in its place."""
    management.cpu_state = management.CPUState.GPU
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.get_torch_device = lambda: device
    management.get_free_memory = lambda dev=None, torch_free_too=False: (8e9, 8e9) if torch_free_too else 8e9
    management.get_total_memory = lambda dev=None, torch_total_too=False: (8e9, 8e9) if torch_total_too else 8e9
    management.should_use_fp16 = lambda *_, **__: True
    management.should_use_bf16 = lambda *_, **__: False
    management.soft_empty_cache = lambda force=False: None
    management.synchronize = lambda: None
    properties = SimpleNamespace(major=8, minor=0, name="none", total_memory=8 * 10**9, gcnArchName="", multi_processor_count=1)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_name = lambda device=None: properties.name
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: device.index
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.reset_peak_memory_stats = lambda device=None: None
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda device=None: 0


OPERATORS = ("aten::upsample_bicubic2d", "aten::replication_pad2d")
"""What enlarges pictures, and what only the wavelet fix does."""
STEP = {"strength": 1.0, "tile": 0, "tile_overlap": 8, "tile_batch": 0}


def builtin(nodes: Any) -> tuple[Any, Any, Any]:
    """MODEL, VAE and CONDITIONING of the built-in model."""
    with torch.inference_mode():  # a file's tensors are read with their data
        return nodes.load.LoadCheckpoint.execute(checkpoint="built-in model (no download)", vae_precision="auto").args


def check(nodes: Any, mode: Any, place: torch.device) -> None:
    """Run all nodes of the pipeline, with pictures and latents between them at ``place``."""
    management.intermediate_device = lambda: place
    model, vae, prompt = builtin(nodes)
    print("loads on", model.load_device, vae.patcher.load_device)
    with torch.no_grad(), mode:  # inference mode forgets the values of small tables
        image = torch.rand(1, 40, 56, 3)
        latent = nodes.vae.Encode.execute(image=image, vae=vae).args[0]
        print("encoded on", latent["samples"].device)
        latent = nodes.sample.OneStep.execute(model=model, conditioning=prompt, latent=latent, **STEP).args[0]
        print("stepped on", latent["samples"].device)
        print("decoded on", nodes.vae.Decode.execute(latent=latent, vae=vae).args[0].device)
        for fix in ({"color_fix": "wavelet", "wavelet_levels": 0}, {"color_fix": "lab"}):
            chosen = {**STEP, "size": {"size": "scale by", "factor": 2.0}, "color_fix": fix, "tile": 16}
            chosen["tile_overlap"] = 4
            result = nodes.upscale.Upscale.execute(image=image, model=model, vae=vae, conditioning=prompt, **chosen).args[0]
            print("upscaled on", result.device, tuple(result.shape))
            print("fixed on", nodes.colour.ColorFix.execute(image=result, reference=image, color_fix=fix).args[0].device)


def pictures(nodes: Any, mode: Any) -> None:
    """Where pictures between the CPU's results are worked on: where they fit, and where they do not, or not any more."""
    model, vae, prompt = builtin(nodes)
    given = {"model": model, "vae": vae, "conditioning": prompt, **STEP, "size": {"size": "scale by", "factor": 2.0}}
    fix = {"color_fix": "wavelet", "wavelet_levels": 5}
    match = nodes.colour.match_colour

    def scarce(content: Any, *given: Any) -> Any:
        if content.device.type == "cuda":
            raise torch.OutOfMemoryError("out of memory")
        return match(content, *given)

    def show(name: str, node: Any, **given: Any) -> None:
        mode.ran.clear()
        result = node.execute(image=image, color_fix=fix, **given).args[0]
        print("pictures", name, *(sorted(mode.ran.get(each, ())) for each in OPERATORS), result.device)

    with torch.no_grad(), mode:
        image = torch.rand(1, 16, 24, 4)
        show("upscaled", nodes.upscale.Upscale, **given)
        show("fixed", nodes.colour.ColorFix, reference=image[:, :8])
        nodes.colour.match_colour = scarce
        show("out of memory", nodes.colour.ColorFix, reference=image[:, :8])
        nodes.colour.match_colour = match
        management.get_free_memory = lambda dev=None, torch_free_too=False: (1e5, 1e5) if torch_free_too else 1e5
        show("fixed where there is no room", nodes.colour.ColorFix, reference=image[:, :8])
        pretend(mode.device)


def choices(host: Any, device: torch.device) -> None:
    """What is asked of the host: its attention, its test of errors, and what it keeps in memory."""
    for enabled in (True, False):
        management.pytorch_attention_enabled_vae = lambda _enabled=enabled: _enabled
        for kind, cuda in ((device, "13.0"), (device, None), (torch.device("xpu"), None), (torch.device("cpu"), None)):
            torch.version.cuda = cuda
            print("attention", enabled, kind.type, cuda, host.vae._kernels(kind).attention)
    for error in (management.OOM_EXCEPTION("no"), RuntimeError("HIP out of memory"), RuntimeError("other"), ValueError("no")):
        management.is_oom = lambda e: "other" in str(e)
        newer = host.running.ran_out(error)
        del management.is_oom
        print("out of memory", newer, host.running.ran_out(error))
    kept = [3e9, 2e9]
    management.get_free_memory = lambda dev=None, torch_free_too=False: 8e9 - sum(kept)
    comfy.memory_management = getattr(comfy, "memory_management", SimpleNamespace())  # as newer hosts have it
    comfy.memory_management.extra_ram_release = lambda target, free_active=False: kept.pop() if target > 3e9 else 0
    management.free_pins = lambda size, **_: kept.pop() if size > 0 else 0
    print("free", [host.running.free_ram(int(wanted)) for wanted in (2e9, 4e9, 8e9)])


def main() -> None:
    """All of it, and once with a tensor astray."""
    load("pack", pack_folder / "__init__.py")
    fake = load("fake_device", pack_folder / "tests" / "support" / "fake_device.py")
    mode = fake.install(Setter(), "cuda")
    pretend(mode.device)
    nodes = sys.modules["pack.nodes"]
    nodes.host.files.register_folder()
    nodes.host.sampling.check_sigmas = lambda sigmas: None  # on the device, where their values are not known
    nodes.checks.check_image = lambda name, image: None  # likewise
    for place in (torch.device("cpu"), mode.device):
        check(nodes, mode, place)
    management.intermediate_device = lambda: torch.device("cpu")
    pictures(nodes, mode)
    shift = nodes.host.sampling._shift
    nodes.host.sampling._shift = lambda base: torch.full((1, 1, 1, 1), shift(base))
    try:
        check(nodes, mode, torch.device("cpu"))
    except RuntimeError as error:
        print("astray:", error)
    choices(nodes.host, mode.device)


main()
