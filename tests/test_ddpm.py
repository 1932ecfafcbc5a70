"""DiT's diffusion against values computed with its released code, and against its definition."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from erw import ddpm
from erw.config import Flow, Run, Sample
from erw.errors import ConfigError
from erw.models import SiT
from erw.sampling.generation import predictor
from erw.sampling.guidance import classifier_free, conditional
from erw.sampling.solvers import SOLVERS, chain_times
from erw.training.trained import Trained
from helpers.reference import Golden, array, fill, relative, tensors

DDPM = Sample(solver="ddpm")
DIT = dict(input_size=8, patch=2, width=64, depth=4, heads=4, num_classes=1000, out_channels=8)


@pytest.fixture(scope="module")
def dit() -> SiT:
    model = SiT(**DIT)
    fill(model)
    return model.requires_grad_(False)


def test_forward_of_dit(golden: Golden, dit: SiT) -> None:
    data, _ = tensors(golden("dit_forward"))
    assert relative(dit(data["x"], data["t"], data["y"]), data["out"]) < 1e-5


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_leaves_the_variance_to_the_class(golden: Golden, dit: SiT, channels: int) -> None:
    """On 3 channels as released, or on all of the noise."""
    data, meta = tensors(golden("dit_cfg"))
    x, y, scale = data["x"], data["y"], meta["scale"]
    # The golden batch has a step per image, where solvers have one time for all.
    ask = classifier_free(
        lambda x, _, y: dit(x, data["t"].repeat(len(x) // 3), y),
        y,
        1000,
        scale=scale,
        channels=channels,
    )
    got = ask(x, 0.5)
    output, null = dit(x, data["t"], y), dit(x, data["t"])
    guided = null + scale * (output - null)
    assert relative(got, torch.cat([guided[:, :channels], output[:, channels:]], 1)) < 1e-5
    if channels == 3:
        assert relative(got, data["out"][: len(y)]) < 1e-5
        # The released code also returns the half of no class, which shares the guided channels.
        assert relative(got[:, :3], data["out"][len(y) :, :3]) < 1e-5


def test_loss_of_dit(golden: Golden, dit: SiT) -> None:
    data, _ = tensors(golden("dit_loss"))
    chain = ddpm.chain()
    x_s = ddpm.noised(chain, data["x"], data["noise"], data["t"])
    output = dit(x_s, data["t"], data["y"])
    terms = ddpm.hybrid_terms(chain, output, data["x"], data["noise"], data["t"])
    assert relative(terms.vb, data["vb"]) < 1e-5
    assert relative(terms.mse, data["mse"]) < 1e-5
    assert relative(terms.mse + terms.vb, data["loss"]) < 1e-5


def test_the_bound_teaches_the_variance_alone() -> None:
    chain, step = ddpm.chain(), torch.tensor([0, 400, 999])
    x, eps = torch.randn(2, 3, 4, 8, 8)
    output = torch.randn(3, 8, 8, 8, requires_grad=True)
    terms = ddpm.hybrid_terms(chain, output, x, eps, step)
    (of_bound,) = torch.autograd.grad(terms.vb.sum(), output, retain_graph=True)
    (of_error,) = torch.autograd.grad(terms.mse.sum(), output)
    assert of_bound[:, :4].abs().max() == 0 and (of_bound[1:, 4:] != 0).float().mean() > 0.9
    assert of_error[:, 4:].abs().max() == 0 and (of_error[:, :4] != 0).float().mean() > 0.9


def test_the_bound_is_the_divergence_in_bits() -> None:
    chain, step = ddpm.chain(), torch.tensor([1, 30, 999])
    x, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    output = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    terms = ddpm.hybrid_terms(chain, output, x, eps, step)
    x_s = ddpm.noised(chain, x, eps, step)
    model_mean, log_variance, _ = ddpm.reverse(chain, output, x_s, step)
    for i, s in enumerate(step.tolist()):
        beta, before = chain.beta[s], chain.abar_before[s]
        # Bayes: precisions of the two factors add up.
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = ((1 - beta).sqrt() / beta * x_s[i] + before.sqrt() / (1 - before) * x[i]) / precision
        q = Normal(mean, precision.rsqrt())
        p = Normal(model_mean[i], (log_variance[i] / 2).exp())
        bits = kl_divergence(q, p).mean()
        assert float(terms.vb[i]) == pytest.approx(float(bits) / math.log(2), rel=1e-9)


def test_bins_of_step_0_are_a_distribution() -> None:
    levels = torch.arange(256) / 127.5 - 1  # what 8 bits can hold
    for scale in (-8.0, -3.0, 0.0):
        mean, log_scale = torch.tensor(0.2), torch.tensor(scale)
        logp = ddpm._discretised_log_likelihood(levels, mean, log_scale)
        assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_ten_steps_of_the_released_samplers(golden: Golden, dit: SiT, solver: str) -> None:
    """Through the solver's name and its times in [0, 1], as `erw.generate` draws."""
    data, meta = tensors(golden("dit_sample"))
    times = SOLVERS[solver].times(10)
    steps = ddpm.step_at(torch.tensor(times[:-1]))
    assert steps.tolist() == ddpm.respaced(ddpm.chain(), 10).timesteps.flip(0).tolist()
    assert sorted(steps.tolist()) == meta["timestep_map"]
    model = Trained(net=dit, run=Run(flow=Flow(objective="ddpm"), sample=DDPM), vae="none")
    got = SOLVERS[solver](
        conditional(predictor(model), data["y"]),
        data["latents"],
        times,
        noise=lambda i, x: torch.from_numpy(array(f"ddpm{i}", *x.shape)),
    )
    assert relative(got, data[solver]) < 1e-4


def test_steps_and_times_are_each_others() -> None:
    steps = torch.arange(1000)
    assert torch.equal(ddpm.step_at((steps + 1) / 1000), steps)
    assert ddpm.step_at(torch.tensor([0.0, 0.0004, 1.0])).tolist() == [0, 0, 999]


def test_a_respaced_chain_has_the_noise_of_the_full_one() -> None:
    full = ddpm.chain()
    for count in (2, 10, 250, 999, 1000):
        short = ddpm.respaced(full, count)
        assert len(short.beta) == count and short.timesteps[0] == 0 and short.timesteps[-1] == 999
        torch.testing.assert_close(short.abar, full.abar[short.timesteps], rtol=1e-12, atol=0)
    torch.testing.assert_close(short.beta, full.beta, rtol=1e-9, atol=0)
    for count in (1, 1001):
        with pytest.raises(ConfigError, match="a DiT takes 2 to 1000"):
            ddpm.respaced(full, count)


def exact_network(mean: Tensor, deviation: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best noise prediction for data from N(mean, deviation^2), with the largest variance."""
    chain = ddpm.chain()

    def network(x: Tensor, t: Tensor) -> Tensor:
        step = ddpm.step_at(torch.tensor(t))
        c, s = chain.clean[step].to(x), chain.noise[step].to(x)
        eps = s * (x - c * mean) / (c**2 * deviation**2 + s**2)
        return torch.cat([eps, torch.ones_like(x)], dim=1)

    return network


def test_samplers_reach_the_data() -> None:
    """With the exact noise prediction of normal data, samples have the data's mean and spread."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 1, 1, 1)
    for solver in ("ddpm", "ddim"):
        got = SOLVERS[solver](exact_network(0.7, 0.5), x, chain_times(100))
        assert float(got.mean()) == pytest.approx(0.7, abs=0.03)
        assert float(got.std()) == pytest.approx(0.5, abs=0.04)


def test_ddim_with_eta_draws_noise_and_without_none() -> None:
    times, ddim = chain_times(5), SOLVERS["ddim"]
    x, calls = torch.randn(2, 1, 1, 1), []

    def noise(i: int, like: Tensor) -> Tensor:
        calls.append(i)
        return torch.randn_like(like)

    network = exact_network(0.0, 1.0)
    ddim(network, x, times, noise=noise)
    assert calls == []
    ddim(network, x, times, eta=1.0, noise=noise)
    assert calls == [0, 1, 2, 3]
