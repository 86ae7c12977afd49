import pickle

import pytest
import torch
from safetensors.torch import save_file

from tsdsr_core.weights.prompt import PromptEmbeds, load_prompt


def save_pair(folder, tokens, pooled):
    torch.save(tokens, folder / "prompt_embeds.pt")
    torch.save(pooled, folder / "pool_embeds.pt")


@pytest.mark.parametrize("batched", [True, False])
def test_the_published_pair_is_read_with_and_without_a_batch_axis(batched, tmp_path):
    tokens, pooled = torch.randn(1, 5, 8), torch.randn(1, 6)
    save_pair(tmp_path, tokens if batched else tokens[0], pooled if batched else pooled[0])
    prompt = load_prompt(tmp_path)
    assert torch.equal(prompt.tokens, tokens)
    assert torch.equal(prompt.pooled, pooled)


def test_safetensors_are_read(tmp_path):
    tokens, pooled = torch.randn(1, 5, 8), torch.randn(1, 6)
    save_file({"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}, tmp_path / "p.safetensors")
    assert torch.equal(load_prompt(tmp_path / "p.safetensors").tokens, tokens)


class Malicious:
    ran = False

    def __reduce__(self):
        return setattr, (Malicious, "ran", True)


def test_code_in_a_pt_file_is_not_run(tmp_path):
    save_pair(tmp_path, Malicious(), torch.randn(1, 6))
    with pytest.raises(ValueError, match=r"prompt_embeds\.pt is damaged, or holds something other than tensors"):
        load_prompt(tmp_path)
    assert not Malicious.ran


@pytest.mark.parametrize("content", [b"", b"not a file of torch", pickle.dumps([1]), None])
def test_damaged_and_missing_files_are_named(content, tmp_path):
    save_pair(tmp_path, torch.randn(1, 5, 8), torch.randn(1, 6))
    path = tmp_path / "pool_embeds.pt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pool_embeds\.pt"):
        load_prompt(tmp_path)


def test_a_truncated_pt_file_is_named(tmp_path):
    save_pair(tmp_path, torch.randn(1, 5, 8), torch.randn(1, 6))
    path = tmp_path / "prompt_embeds.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"prompt_embeds\.pt"):
        load_prompt(tmp_path)


def test_other_safetensors_and_missing_paths_are_named(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors has the keys weight: expected prompt_embeds"):
        load_prompt(tmp_path / "w.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"bad\.safetensors is damaged"):
        load_prompt(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not exist: expected a file, or a folder"):
        load_prompt(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("tokens", "pooled", "message"),
    [
        (torch.zeros(2, 5, 8), torch.zeros(1, 6), "expected"),
        (torch.zeros(1, 5, 8), torch.zeros(1, 6, 1), "expected"),
        (torch.full((1, 5, 8), torch.nan), torch.zeros(1, 6), "NaN"),
    ],
)
def test_impossible_embeddings_are_refused(tokens, pooled, message):
    with pytest.raises(ValueError, match=message):
        PromptEmbeds(tokens, pooled)


def test_pruning_keeps_the_tokens_that_differ_most_in_their_order():
    tokens = torch.tensor([[[0.0, 0], [0.1, 0], [3, 0], [0, 5], [3, 0.1], [0, 0.2]]])
    prompt = PromptEmbeds(tokens, torch.randn(1, 6))
    assert torch.equal(prompt.pruned(1).tokens, tokens[:, :1])
    assert torch.equal(prompt.pruned(3).tokens, tokens[:, [0, 3, 4]]), "4 is 3.0017 from the first, 2 only 3"
    assert torch.equal(prompt.pruned(4).tokens, tokens[:, [0, 3, 4, 5]])
    assert torch.equal(prompt.pruned(3).pooled, prompt.pooled)


@pytest.mark.parametrize("count", [6, 7, 4096])
def test_pruning_to_as_many_as_there_are_keeps_all(count):
    prompt = PromptEmbeds(torch.ones(1, 6, 4), torch.randn(1, 6))
    assert torch.equal(prompt.pruned(count).tokens, prompt.tokens)


def test_pruning_to_nothing_is_refused():
    with pytest.raises(ValueError, match="0 prompt tokens: expected at least 1"):
        PromptEmbeds(torch.ones(1, 6, 4), torch.randn(1, 6)).pruned(0)
