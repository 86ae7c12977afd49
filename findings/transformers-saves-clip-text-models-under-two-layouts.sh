#!/usr/bin/env bash
# transformers 5.23 writes a new CLIPTextModel (CLIP-L, the text encoder of Stable Diffusion 1) without the "text_model." that its
# weights have in published files. The same class, loaded from such a file and saved again, keeps it, and so does a new
# CLIPTextModelWithProjection (SDXL, SD3). Programs that look for "text_model." (ComfyUI tells CLIP-L in a checkpoint of SD3 by
# text_model.final_layer_norm.weight) then find no text encoder in the first file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cat > "$folder/ask.py" <<'PYTHON'
import sys

from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

folder = sys.argv[1]
config = CLIPTextConfig(
    vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, projection_dim=8,
    bos_token_id=7, eos_token_id=8, pad_token_id=8,
)
KEY = "text_model.final_layer_norm.weight"


def saved(model):
    model.save_pretrained(folder)
    return load_file(f"{folder}/model.safetensors")


plain = saved(CLIPTextModel(config))
old = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in plain.items()}
save_file(old, f"{folder}/model.safetensors", metadata={"format": "pt"})
again = saved(CLIPTextModel.from_pretrained(folder))
assert "final_layer_norm.weight" in plain
assert all((again[name] == tensor).all() for name, tensor in old.items())
found = {
    "CLIPTextModel": KEY in plain,
    "CLIPTextModelWithProjection": KEY in saved(CLIPTextModelWithProjection(config)),
    "an old file, loaded as CLIPTextModel and saved again": KEY in again,
}
for name, there in found.items():
    print(f"{name}: {KEY} is {'there' if there else 'missing'}")
sys.exit(list(found.values()) != [False, True, True])
PYTHON
"$folder/venv/bin/python" "$folder/ask.py" "$folder/model" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
