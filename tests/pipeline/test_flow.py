"""Flow-matching arithmetic against its definition."""

import torch

from tsdsr_core.flow import add_noise, one_step

Z, NOISE = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()


def test_the_ends_of_the_path_are_latent_and_noise():
    assert torch.equal(add_noise(Z, NOISE, 0.0), Z)
    assert torch.equal(add_noise(Z, NOISE, 1.0), NOISE)
    assert torch.allclose(add_noise(Z, NOISE, 0.25), 0.75 * Z + 0.25 * NOISE)


def test_one_step_is_the_whole_way_at_strength_1():
    assert torch.allclose(one_step(Z, Z - NOISE), NOISE, atol=1e-6)
    assert torch.equal(one_step(Z, NOISE, 0.0), Z)
    assert torch.allclose(one_step(Z, NOISE, 0.5), Z - 0.5 * NOISE)
