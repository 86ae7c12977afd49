"""Run with the host's Python in the host's folder: diffusers weights -> checkpoints as ComfyUI's own loader reads them."""

import sys

sys.path.insert(0, ".")
transformer, vae, text, folder = sys.argv[1:]
sys.argv = [*sys.argv[:1], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.diffusers_convert  # noqa: E402
import comfy.model_detection  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

model = comfy.model_detection.convert_diffusers_mmdit(load_file(transformer))
autoencoder = comfy.diffusers_convert.convert_vae_state_dict(load_file(vae))
weights = {f"model.diffusion_model.{key}": weight.contiguous() for key, weight in model.items()}
weights |= {f"first_stage_model.{key}": weight.contiguous() for key, weight in autoencoder.items()}
save_file(weights, f"{folder}/sd3_medium.safetensors")
start = (
    "text_encoders.clip_l.transformer.text_model."  # the host looks for it; transformers 5 leaves text_model out of a new model
)
encoder = {start + key.removeprefix("text_model."): weight for key, weight in load_file(text).items()}
save_file(weights | encoder, f"{folder}/sd3_medium_incl_clips.safetensors")
