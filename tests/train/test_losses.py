"""The distillation losses against hand calculations and a distribution whose scores are known in closed form."""

import pytest
import torch

from tsdsr_core.flow import schedule
from tsdsr_core.train.objectives import trajectory as dasm
from tsdsr_core.train.objectives.losses import (
    cut,
    distribution_gradient,
    flow_matching,
    guided,
    logit_normal,
    put_back,
    surrogate,
    target_score_distillation,
    with_the_score_of,
)

LEVELS = schedule()
ONE = dasm.plan(1, 50, 0.3, 20, 980)
FOUR = dasm.plan(4, 50, 0.3, 20, 980)


def linear(factor: float):
    return lambda z, sigma: factor * z


def test_the_schedule_is_that_of_sd3():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.allclose(LEVELS, theirs.sigmas[: len(LEVELS)], atol=1e-6)
    assert torch.allclose(1000 * LEVELS, theirs.timesteps, atol=1e-3)


def test_tsd_by_hand():
    psi_hat, phi_hat, psi = (torch.full((2, 1, 1, 1), value) for value in (3.0, 1.0, 2.0))
    sigma = torch.tensor([0.5, 1.0])
    found = target_score_distillation(psi_hat, phi_hat, psi, sigma, 0.7)
    assert found.flatten().tolist() == pytest.approx([0.25 * (0.7 * 2 + 0.3 * 1), 0.7 * 2 + 0.3 * 1])
    assert target_score_distillation(psi_hat, phi_hat, psi, sigma, 1.0).flatten().tolist() == [0.5, 2.0], "lambda 1 is VSD"


def test_the_surrogate_has_the_gradient_it_is_given():
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    gradient = torch.randn(2, 3, 4, 4)
    surrogate(z, gradient).backward()
    assert torch.allclose(z.grad, gradient / z.numel(), atol=1e-7)


PLACES = torch.cartesian_prod(torch.arange(2), torch.arange(2))


def test_what_is_cut_goes_back_to_its_place():
    z, other = torch.randn(4, 3, 6, 8), torch.randn(4, 3, 4, 6)
    back = put_back(cut(z, PLACES, 2), PLACES, 2)
    assert back.shape == z.shape
    for index, (top, left) in enumerate(PLACES.tolist()):
        inner = (index, slice(None), slice(top, top + 4), slice(left, left + 6))
        assert torch.equal(back[inner], z[inner])
        back[inner] = 0
    assert not back.any()
    adjoint = (put_back(other, PLACES, 2) * z).sum()
    assert torch.allclose(adjoint, (cut(z, PLACES, 2) * other).sum(), rtol=1e-4, atol=1e-4)


def test_a_grid_of_patches_leaves_no_trace_where_they_are_shifted():
    """Networks that are wrong in the first column of each patch of two."""
    pattern = torch.tensor([1.0, 0.0]).repeat(4)

    def wrong(z, sigma):
        return pattern[: z.shape[3]].expand_as(z)

    def right(z, sigma):
        return torch.zeros_like(z)

    z = torch.zeros(4, 1, 8, 8)
    given = torch.full((4,), 400), LEVELS, ONE, wrong, right, 1.0
    fixed = distribution_gradient(z, z, z, *given).mean(0)[0, 4]
    assert fixed[3:5].diff().abs() > 0.5 * fixed.max()
    inner = (cut(latent, PLACES, 2) for latent in (z, z, z))
    mean = put_back(distribution_gradient(*inner, *given), PLACES, 2).mean(0)[0, 4]
    assert mean[3] == mean[4] == pytest.approx(float(fixed.mean()))


def test_a_trajectory_by_hand():
    """Two levels with linear networks, in plain numbers."""
    a, b, z_hat, z, e = 0.3, -0.2, 1.5, 0.4, 0.7
    trajectory = dasm.plan(2, 100, 0.3, 0, 999)
    start = 500
    s0, s1 = (3 * s / (1 + 2 * s) for s in (0.5, 0.4))
    hat, real = (1 - s0) * z_hat + s0 * e, (1 - s0) * z + s0 * e
    expected = s0**2 * (0.7 * (a - b) * hat + 0.3 * a * (hat - real))
    hat, real = hat + (s1 - s0) * b * hat, real + (s1 - s0) * a * real
    expected += 0.3 * s1**2 * (0.7 * (a - b) * hat + 0.3 * a * (hat - real))

    def tensor(value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), value)

    found = distribution_gradient(
        tensor(z_hat),
        tensor(z),
        tensor(e),
        torch.tensor([start]),
        LEVELS,
        trajectory,
        linear(a),
        linear(b),
        0.7,
        as_scores=False,
    )
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_one_level_is_plain_tsd_and_equal_networks_leave_the_target_score():
    z_hat, z, noise = torch.randn(3, 2, 4, 4, 4).unbind()
    starts = torch.tensor([100, 700])
    sigma = LEVELS[starts]
    network = linear(0.4)
    found = distribution_gradient(z_hat, z, noise, starts, LEVELS, ONE, network, network, 0.7, as_scores=False)
    s = sigma[:, None, None, None]
    assert torch.allclose(found, s**2 * 0.3 * 0.4 * (1 - s) * (z_hat - z), atol=1e-6), "VSD vanishes"


def test_each_sample_has_its_own_level():
    def network(factor: float):
        return lambda z, sigma: factor * z * sigma[:, None, None, None].cos()

    z_hat, z, noise = torch.randn(3, 4, 2, 4, 4).unbind()
    starts = torch.tensor([20, 300, 500, 830])
    given = LEVELS, FOUR, network(0.4), network(-0.1), 0.7
    together = distribution_gradient(z_hat, z, noise, starts, *given)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.allclose(together[one], distribution_gradient(z_hat[one], z[one], noise[one], starts[one], *given))


def test_no_gradient_flows_through_the_trajectory():
    z_hat = torch.randn(1, 2, 4, 4, requires_grad=True)
    gradient = distribution_gradient(
        z_hat, torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), torch.tensor([300]), LEVELS, FOUR, linear(1), linear(2), 0.7
    )
    assert not gradient.requires_grad


@pytest.mark.parametrize(("steps", "stride", "first", "last"), [(4, 50, 20, 169), (0, 50, 20, 980), (2, 0, 0, 9), (1, 1, 5, 4)])
def test_a_trajectory_that_does_not_fit_is_refused(steps, stride, first, last):
    with pytest.raises(ValueError, match="does not fit between"):
        dasm.plan(steps, stride, 0.3, first, last)


def test_a_trajectory_stays_between_its_bounds():
    assert FOUR.offsets == (0, 50, 100, 150)
    assert FOUR.weights == (1.0, 0.3, 0.3, 0.3)
    assert (FOUR.start(lambda n: 0), FOUR.start(lambda n: n - 1) + FOUR.offsets[-1]) == (20, 980)


def test_guidance_by_hand():
    denoiser = guided(lambda z, sigma, told: z * (3.0 if told else 1.0), 7.5)
    assert denoiser(torch.ones(1), torch.ones(1)).item() == pytest.approx(1 + 7.5 * 2)
    asked = []
    guided(lambda z, sigma, told: asked.append(told) or z, 1.0)(torch.ones(1), torch.ones(1))
    assert asked == [True], "a guidance of 1 asks once"


def test_flow_matching_is_zero_for_the_true_velocity_alone():
    z, noise, sigma = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3), torch.tensor([0.2, 0.9])
    assert flow_matching(lambda z_t, s: noise - z, z, noise, sigma) == 0
    assert flow_matching(lambda z_t, s: noise - z + 2, z, noise, sigma).item() == pytest.approx(4, rel=1e-5)


def test_levels_are_logit_normal():
    levels = logit_normal(torch.tensor([-1.0, 0.0, 2.0]))
    assert torch.allclose(levels, 1 / (1 + torch.exp(-torch.tensor([-1.0, 0.0, 2.0]))))


# A student that moves points toward a Gaussian whose scores are known.

TARGET, SPREAD, START, LR = 2.0, 0.3, -1.0, 0.5


def gaussian(mean: float, spread: float):
    """The exact velocity of ``N(mean, spread^2)``: ``E[e - z_0 | z_t]``."""

    def velocity(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma[:, None, None, None]
        gain = (1 - s) * spread**2 / ((1 - s) ** 2 * spread**2 + s**2)
        clean = mean + gain * (z - (1 - s) * mean)
        return (z - clean) / s

    return velocity


def distance_after(vsd_share: float, phi, trajectory, steps: int = 400, as_scores: bool = False) -> float:
    """Distance of the student's mean from the target after training; ``phi(mean, spread)`` is asked in each step."""
    draw = torch.Generator().manual_seed(0)
    shape = (256, 1, 1, 1)
    z = TARGET + SPREAD * torch.randn(shape, generator=draw)
    mean = torch.tensor(START, requires_grad=True)
    optimiser = torch.optim.SGD([mean], lr=LR)
    for _ in range(steps):
        z_hat = mean + (z - TARGET)  # keeps the spread: what is to be learned is where
        noise = torch.randn(shape, generator=draw)
        starts = torch.randint(trajectory.starts[0], trajectory.starts[1] + 1, shape[:1], generator=draw)
        gradient = distribution_gradient(
            z_hat, z, noise, starts, LEVELS, trajectory, gaussian(TARGET, SPREAD), phi(mean.item(), SPREAD), vsd_share,
            as_scores,
        )  # fmt: skip
        optimiser.zero_grad()
        surrogate(z_hat, gradient).backward()
        optimiser.step()
    return abs(mean.item() - TARGET)


def test_velocities_of_one_score():
    """The score of a Gaussian at level s is ``-(z_t - (1 - s) mean) / ((1 - s)^2 spread^2 + s^2)``."""
    sigma = torch.tensor([0.1, 0.5, 0.9])
    z_t, other = torch.randn(2, 3, 1, 1, 1).unbind()
    s = sigma[:, None, None, None]
    found = with_the_score_of(gaussian(TARGET, SPREAD)(z_t, sigma), z_t, other, sigma)
    expected = -(z_t - (1 - s) * TARGET) / ((1 - s) ** 2 * SPREAD**2 + s**2)
    assert torch.allclose(-(other + (1 - s) * found) / s, expected, rtol=1e-4)


def test_little_noise_drives_away_by_velocities_and_not_by_scores():
    """A teacher of widely spread latents, which sees them well through little noise; phi says the same, so TSM is alone."""
    trajectory, wide = dasm.plan(4, 20, 0.3, 850, 980), gaussian(TARGET, 3.0)
    z = TARGET + 3 * torch.randn(64, 1, 1, 1)
    z_hat, noise, starts = z + 0.5, torch.randn(64, 1, 1, 1), torch.randint(850, 920, (64,))
    by_velocities, by_scores = (
        distribution_gradient(z_hat, z, noise, starts, LEVELS, trajectory, wide, wide, 0.7, as_scores).mean()
        for as_scores in (False, True)
    )
    assert by_velocities < -0.005, "a step against it leads further up"
    assert 0 < by_scores < -0.2 * by_velocities, "the teacher finds both places likely and hardly cares"


def untrained(mean: float, spread: float):
    """A LoRA model that says what the teacher says, as at the start of a run."""
    return gaussian(TARGET, SPREAD)


def stale(mean: float, spread: float):
    """A LoRA model that still knows the student's first outputs only."""
    return gaussian(START, SPREAD)


@pytest.mark.parametrize("trajectory", [ONE, FOUR], ids=["one level", "four levels"])
def test_with_a_lora_model_that_follows_vsd_and_tsd_reach_the_target(trajectory):
    for share in (1.0, 0.7):
        assert distance_after(share, gaussian, trajectory) < 0.01


@pytest.mark.parametrize("trajectory", [ONE, FOUR], ids=["one level", "four levels"])
def test_tsd_moves_where_vsd_has_nothing_to_say(trajectory):
    assert distance_after(1.0, untrained, trajectory) == abs(START - TARGET), "VSD: no gradient at all"
    assert distance_after(0.7, untrained, trajectory) < 0.02
    assert distance_after(0.7, untrained, trajectory, as_scores=True) < 0.02


@pytest.mark.parametrize("trajectory", [ONE, FOUR], ids=["one level", "four levels"])
def test_tsd_is_held_where_vsd_runs_away(trajectory):
    """A stale LoRA model pushes the student on beyond the target; the target score pulls it back (measured: 36 against 391)."""
    away, held = (distance_after(share, stale, trajectory) for share in (1.0, 0.7))
    assert away > 200
    assert held < 60
    assert distance_after(0.7, stale, trajectory, steps=800) < 1.1 * held, "it does not run on"
    assert distance_after(1.0, stale, trajectory, steps=800) > 1.8 * away, "VSD does"
