"""What the host's own nodes may do to a LATENT between TSD-SR Encode and TSD-SR Decode, and where the image is then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .graphs import TILES
from .host import Graph

HOST = "0.33.0"
"""The version whose nodes the table covers."""
SIZES = {"a": (44, 52), "b": (44, 52), "c": (46, 50), "d": (48, 56), "s": (44, 47)}
"""Images; the built-in model pads to multiples of 8: all to 48x56, "s" to 48x48."""
FILES = {"a": "photo.png", **{name: f"latent_{name}.png" for name in "bcds"}}
CUT = 0, 0, 44, 52
WHOLE = None
OTHER_MODELS = {
    "HunyuanVideo15LatentUpscaleWithModel", "LTXVAddGuide", "LTXVLatentUpsampler", "SeedVR2TemporalChunk",
    "SeedVR2TemporalMerge", "Trellis2TextureStage", "Trellis2UpsampleStage", "WanSoundImageToVideoExtend",
}  # fmt: skip
"""They take latents and weights of video and 3D models alone, and fail on an image's."""

Link = tuple[str, int]


class Bench:
    """A graph with a model, in which cases find images, latents and sampling."""

    def __init__(self, checkpoint: str) -> None:
        self.graph = Graph()
        self.loader = self.graph.add("TSDSRLoadCheckpoint", checkpoint=checkpoint, vae_precision="auto")
        self.made: dict[Any, Link] = {}

    def add(self, node: str, **inputs: Any) -> Link:
        return self.graph.add(node, **inputs), 0

    def image(self, name: str) -> Link:
        """An image, or the batch "ab"."""
        if len(name) == 2:
            return self.add("ImageBatch", image1=self.image(name[0]), image2=self.image(name[1]))
        return self.add("LoadImage", image=FILES[name])

    def latent(self, name: str) -> Link:
        if name not in self.made:
            self.made[name] = self.add("TSDSREncode", image=self.image(name), vae=(self.loader, 1))
        return self.made[name]

    def step(self, latent: Link) -> Link:
        if latent not in self.made:
            model = {"model": (self.loader, 0), "conditioning": (self.loader, 2)}
            self.made[latent] = self.add("TSDSROneStep", latent=latent, strength=1.0, **model, **TILES)
        return self.made[latent]

    def mask(self) -> Link:
        """The left half of image "a", at 0.7."""
        left = self.add("SolidMask", value=0.7, width=26, height=44)
        black = self.add("SolidMask", value=0.0, width=52, height=44)
        return self.add("MaskComposite", destination=black, source=left, x=0, y=0, operation="add")

    def sampled(self, latent: Link, node: str = "SamplerCustomAdvanced") -> Link:
        """By the host's own sampler node and our sampler."""
        model, prompt = (self.loader, 0), (self.loader, 2)
        sampling = {
            "sampler": self.add("TSDSRSampler", strength=1.0, **TILES), "latent_image": latent,
            "sigmas": self.add("BasicScheduler", model=model, scheduler="simple", steps=1, denoise=1.0),
        }  # fmt: skip
        if node == "SamplerCustom":
            prompts = {"positive": prompt, "negative": prompt}
            return self.add(node, model=model, add_noise=False, noise_seed=0, cfg=1.0, **prompts, **sampling)
        guider = self.add("BasicGuider", model=model, conditioning=prompt)
        return self.add(node, noise=self.add("DisableNoise"), guider=guider, **sampling)

    def sampled_otherwise(self, latent: Link, node: str, **inputs: Any) -> Link:
        """By one of the host's own samplers."""
        prompts = {"positive": (self.loader, 2), "negative": (self.loader, 2)}
        sampling = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "latent_image": latent}
        return self.add(node, model=(self.loader, 0), **prompts, **sampling, **inputs)

    def prompts(self) -> dict[str, Link]:
        return {"positive": (self.loader, 2), "negative": (self.loader, 2)}


class Case(NamedTuple):
    """A latent, and what TSD-SR Decode should give of it."""

    make: Callable[[Bench], Link]
    area: tuple[int, int, int, int] | None
    """(top, left, height, width) of the padded image."""
    shows: tuple[str, Callable[[np.ndarray], np.ndarray]] | None = None
    """Where that is no mixture and turned: the images that must be seen, and how they are turned."""


def on(name: str, node: str, key: str = "samples", **inputs: Any) -> Callable[[Bench], Link]:
    """``node`` behind TSD-SR Encode of image ``name``."""
    return lambda bench: bench.add(node, **{key: bench.latent(name)}, **inputs)


def pair(node: str, first: str, second: str, keys: tuple[str, str] = ("samples1", "samples2"), **inputs: Any):
    """``node`` on two latents; "+" is "a" after the step."""

    def make(bench: Bench) -> Link:
        links = [bench.step(bench.latent("a")) if name == "+" else bench.latent(name) for name in (first, second)]
        return bench.add(node, **dict(zip(keys, links, strict=True)), **inputs)

    return make


FLIP = {"x": "x-axis: vertically", "y": "y-axis: horizontally"}
COMPOSITE = "samples_to", "samples_from"
MASKED = "destination", "source"
CORNER = {"width": 64, "height": 64, "x": 0, "y": 0}


def piece_of_b(bench: Bench) -> Link:
    """8x8 of the 12x14 cells."""
    return on("b", "LatentCrop", **CORNER)(bench)


def composite(x: int, y: int, feather: int = 0) -> Callable[[Bench], Link]:
    return lambda bench: bench.add(
        "LatentComposite", samples_to=bench.latent("a"), samples_from=piece_of_b(bench), x=x, y=y, feather=feather
    )


def masked(source: str, **inputs: Any) -> Callable[[Bench], Link]:
    def make(bench: Bench) -> Link:
        return pair("LatentCompositeMasked", "a", source, MASKED, mask=bench.mask(), resize_source=False, **inputs)(bench)

    return make


def zoomed(bench: Bench) -> Link:
    """All but the last row and column of cells, enlarged to what "a" had."""
    part = on("a", "LatentCrop", width=104, height=88, x=0, y=0)(bench)
    return bench.add("LatentUpscale", samples=part, upscale_method="bilinear", width=112, height=96, crop="disabled")


def rolled(bench: Bench) -> Link:
    """The last column of cells moved to the front."""
    front = on("a", "LatentCut", dim="x", index=-1, amount=1)(bench)
    rest = on("a", "LatentCut", dim="x", index=0, amount=13)(bench)
    return bench.add("LatentConcat", samples1=front, samples2=rest, dim="x")


def separated(bench: Bench) -> Link:
    joint = pair("LTXVConcatAVLatent", "a", "b", ("video_latent", "audio_latent"))(bench)
    return bench.add("LTXVSeparateAVLatent", av_latent=joint)


def operated(operation: str, **inputs: Any) -> Callable[[Bench], Link]:
    return lambda bench: on("a", "LatentApplyOperation", operation=bench.add(operation, **inputs))(bench)


def guided(node: str, output: int, **inputs: Any) -> Callable[[Bench], Link]:
    return lambda bench: (on("a", node, "latent", **bench.prompts(), **inputs)(bench)[0], output)


def flipped_and_more(bench: Bench) -> Link:
    """A vertical flip, the step by our node, half of it, the step by the host's node, a quarter-turn."""
    stepped = bench.step(on("a", "LatentFlip", flip_method=FLIP["x"])(bench))
    half = bench.add("LatentMultiply", samples=stepped, multiplier=0.9)
    return bench.add("LatentRotate", samples=bench.sampled(half), rotation="90 degrees")


def masked_step(way: str, output: int = 0) -> Callable[[Bench], Link]:
    def make(bench: Bench) -> Link:
        latent = on("a", "SetLatentNoiseMask", mask=bench.mask())(bench)
        return ((bench.step(latent) if way == "node" else bench.sampled(latent))[0], output)

    return make


def batch_of_both(bench: Bench) -> Link:
    """Two images, encoded on their own, through the step."""
    return bench.step(pair("LatentBatch", "a", "b")(bench))


CASES = {
    "untouched": Case(lambda bench: bench.latent("a"), CUT),
    "square": Case(lambda bench: bench.latent("s"), (0, 0, 44, 47)),
    "a batch": Case(lambda bench: bench.latent("ab"), CUT),
    "TSDSROneStep": Case(lambda bench: bench.step(bench.latent("a")), CUT),
    "TSDSROneStep twice": Case(lambda bench: bench.step(bench.step(bench.latent("a"))), CUT),
    "TSDSROneStep, batch": Case(lambda bench: bench.step(bench.latent("ab")), CUT),
    "SamplerCustom": Case(lambda bench: bench.sampled(bench.latent("a"), "SamplerCustom"), CUT),
    "SamplerCustomAdvanced": Case(lambda bench: bench.sampled(bench.latent("a")), CUT),
    "SamplerCustomAdvanced, denoised": Case(lambda bench: (bench.sampled(bench.latent("a"))[0], 1), CUT),
    "SamplerCustomAdvanced, batch": Case(lambda bench: bench.sampled(bench.latent("ab")), CUT),
    "KSampler": Case(lambda bench: bench.sampled_otherwise(bench.latent("a"), "KSampler", seed=0, denoise=1.0), WHOLE),
    "KSamplerAdvanced": Case(
        lambda bench: bench.sampled_otherwise(
            bench.latent("a"), "KSamplerAdvanced", add_noise="enable", noise_seed=0, start_at_step=0, end_at_step=1,
            return_with_leftover_noise="disable",
        ), WHOLE,
    ),
    "AddNoise": Case(
        lambda bench: on(
            "a", "AddNoise", "latent_image", model=(bench.loader, 0), noise=bench.add("RandomNoise", noise_seed=0),
            sigmas=bench.add("BasicScheduler", model=(bench.loader, 0), scheduler="simple", steps=1, denoise=1.0),
        )(bench), WHOLE,
    ),
    "LatentFlip x": Case(on("a", "LatentFlip", flip_method=FLIP["x"]), (4, 0, 44, 52), ("a", np.flipud)),
    "LatentFlip y": Case(on("a", "LatentFlip", flip_method=FLIP["y"]), (0, 4, 44, 52), ("a", np.fliplr)),
    "LatentFlip, batch": Case(on("ab", "LatentFlip", flip_method=FLIP["x"]), (4, 0, 44, 52), ("ab", np.flipud)),
    "LatentFlip, square": Case(on("s", "LatentFlip", flip_method=FLIP["y"]), (0, 1, 44, 47), ("s", np.fliplr)),
    "LatentFlip and more": Case(flipped_and_more, (0, 0, 52, 44)),
    "LatentRotate 0": Case(on("a", "LatentRotate", rotation="none"), CUT),
    "LatentRotate 90": Case(
        on("a", "LatentRotate", rotation="90 degrees"), (0, 4, 52, 44), ("a", lambda image: np.rot90(image, -1))
    ),
    "LatentRotate 180": Case(
        on("a", "LatentRotate", rotation="180 degrees"), (4, 4, 44, 52), ("a", lambda image: np.rot90(image, 2))
    ),
    "LatentRotate 270": Case(on("a", "LatentRotate", rotation="270 degrees"), (4, 0, 52, 44), ("a", np.rot90)),
    "LatentRotate, square": Case(
        on("s", "LatentRotate", rotation="90 degrees"), (0, 4, 47, 44), ("s", lambda image: np.rot90(image, -1))
    ),
    "LatentCrop of nothing": Case(on("a", "LatentCrop", width=112, height=96, x=0, y=0), CUT),
    "LatentCrop": Case(on("a", "LatentCrop", width=64, height=64, x=32, y=16), WHOLE),
    "LatentUpscale to the same": Case(
        on("a", "LatentUpscale", upscale_method="bilinear", width=112, height=96, crop="disabled"), CUT
    ),
    "LatentUpscale": Case(on("a", "LatentUpscale", upscale_method="bicubic", width=224, height=192, crop="center"), WHOLE),
    "LatentUpscale of a crop": Case(zoomed, WHOLE),
    "LatentUpscaleBy": Case(on("a", "LatentUpscaleBy", upscale_method="nearest-exact", scale_by=1.5), WHOLE),
    "LatentCut": Case(on("a", "LatentCut", dim="y", index=2, amount=10), WHOLE),
    "LatentCutToBatch": Case(on("a", "LatentCutToBatch", dim="y", slice_size=6), WHOLE),
    "LatentCutToBatch of frames": Case(on("a", "LatentCutToBatch", dim="t", slice_size=1), CUT),
    "LatentConcat": Case(pair("LatentConcat", "a", "b", dim="-x"), WHOLE),
    "LatentConcat of cuts": Case(rolled, WHOLE),
    "LatentComposite": Case(composite(0, 0), CUT),
    "LatentComposite over padding": Case(composite(48, 32), WHOLE),
    "LatentComposite, feathered": Case(composite(16, 16, 16), CUT),
    "LatentComposite of all": Case(pair("LatentComposite", "a", "c", COMPOSITE, x=0, y=0, feather=0), (0, 0, 46, 50)),
    "LatentComposite of all, without padding": Case(
        pair("LatentComposite", "a", "d", COMPOSITE, x=0, y=0, feather=0), WHOLE,
    ),
    "LatentCompositeMasked": Case(masked("+", x=0, y=0), CUT),
    "LatentCompositeMasked of others": Case(masked("b", x=0, y=0), WHOLE),
    "LatentCompositeMasked, moved": Case(masked("a", x=8, y=8), WHOLE),
    "LatentBlend": Case(pair("LatentBlend", "a", "+", blend_factor=0.3), CUT),
    "LatentBlend of others": Case(pair("LatentBlend", "a", "d", blend_factor=0.5), WHOLE),
    "LatentAdd": Case(pair("LatentAdd", "+", "a"), CUT),
    "LatentAdd of others": Case(pair("LatentAdd", "a", "c"), WHOLE),
    "LatentSubtract": Case(pair("LatentSubtract", "a", "+"), CUT),
    "LatentInterpolate": Case(pair("LatentInterpolate", "a", "+", ratio=0.5), CUT),
    "LatentMultiply": Case(on("a", "LatentMultiply", multiplier=-0.5), CUT),
    "LatentMultiply by nothing": Case(on("a", "LatentMultiply", multiplier=0.0), WHOLE),
    "LatentApplyOperation": Case(operated("LatentOperationTonemapReinhard", multiplier=1.0), CUT),
    "LatentApplyOperation, sharpened": Case(
        operated("LatentOperationSharpen", sharpen_radius=3, sigma=1.0, alpha=0.5), WHOLE
    ),
    "LatentBatch": Case(pair("LatentBatch", "a", "b"), CUT),
    "LatentBatch of two sizes": Case(pair("LatentBatch", "a", "c"), (0, 0, 46, 52)),
    "LatentBatch with one without padding": Case(pair("LatentBatch", "a", "d"), WHOLE),
    "LatentBatch onto one without padding": Case(pair("LatentBatch", "d", "a"), WHOLE),
    "LatentBatch with one resized": Case(pair("LatentBatch", "a", "s"), WHOLE),
    "LatentBatch, restored": Case(batch_of_both, CUT),
    "BatchLatentsNode": Case(pair("BatchLatentsNode", "a", "b", ("latents.latent0", "latents.latent1")), CUT),
    "LatentFromBatch": Case(on("ab", "LatentFromBatch", batch_index=1, length=1), CUT),
    "RepeatLatentBatch": Case(on("ab", "RepeatLatentBatch", amount=2), CUT),
    "RebatchLatents": Case(on("ab", "RebatchLatents", "latents", batch_size=1), WHOLE),
    "LatentBatchSeedBehavior": Case(on("ab", "LatentBatchSeedBehavior", seed_behavior="fixed"), CUT),
    "SetLatentNoiseMask, one step": Case(masked_step("node"), CUT),
    "SetLatentNoiseMask, sampler": Case(masked_step("sampler"), CUT),
    "SetLatentNoiseMask, sampler, denoised": Case(masked_step("sampler", 1), CUT),
    "SaveLatent": Case(on("a", "SaveLatent", filename_prefix="latents/kept"), CUT),
    "ResolutionBucket": Case(
        lambda bench: on("a", "ResolutionBucket", "latents", conditioning=(bench.loader, 2))(bench), WHOLE
    ),
    "ReplaceVideoLatentFrames": Case(pair("ReplaceVideoLatentFrames", "a", "c", MASKED, index=0), (0, 0, 46, 50)),
    "TrimVideoLatent": Case(on("a", "TrimVideoLatent", trim_amount=2), WHOLE),
    "TrimVideoLatent by nothing": Case(on("a", "TrimVideoLatent", trim_amount=0), CUT),
    "LTXVSeparateAVLatent": Case(separated, CUT),
    "HunyuanVideo15SuperResolution": Case(guided("HunyuanVideo15SuperResolution", 2, noise_augmentation=0.7), CUT),
    "ComfySwitchNode": Case(pair("ComfySwitchNode", "a", "d", ("on_true", "on_false"), switch=True), CUT),
    "CreateList": Case(on("a", "CreateList", "inputs.input0"), CUT),
}  # fmt: skip
FAILING = {
    "LatentConcat of channels": (pair("LatentConcat", "a", "b", dim="t"), "of shape (1, 32, 12, 14)) of torch.float32"),
    "HunyuanRefinerLatent": (guided("HunyuanRefinerLatent", 2, noise_augmentation=0.1), "of shape (1, 32, 16, 12, 14)) of"),
    "LTXVConcatAVLatent": (
        pair("LTXVConcatAVLatent", "a", "b", ("video_latent", "audio_latent")), "(batch, 16, height, width)"
    ),
    "video": (
        lambda bench: bench.add("EmptyHunyuanLatentVideo", width=64, height=48, length=5, batch_size=1),
        "of shape (1, 16, 2, 6, 8)) of torch.float32: expected",
    ),
    "LTXVImgToVideoInplace": (
        lambda bench: on(
            "a", "LTXVImgToVideoInplace", "latent", vae=(bench.loader, 1), image=bench.image("a"), strength=1.0, bypass=False
        )(bench), "",
    ),
    "LTXVCropGuides": (guided("LTXVCropGuides", 2), ""),
    "NormalizeVideoLatentStart": (
        on("a", "NormalizeVideoLatentStart", "latent", start_frame_count=4, reference_frame_count=5), ""
    ),
}  # fmt: skip
"""What is not the latent of an image: the message of TSD-SR Decode, or "" where the host's node itself fails."""
