"""Tests: first the mathematics against closed forms, then the loop, then faults. On a CPU."""

import contextlib
import copy
import csv
import itertools
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import fast
import qsm
import runfiles
from buffer import Batch, ReplayBuffer
from envs import step
from networks import Critic, ScoreNet, mish
from qsm import Args, act, draw_noise, make_learner, make_schedule, sample_actions, update

OBS, ACT, B = 3, 2, 5  # sizes of observation, action and batch where nothing else is said
both_targets = pytest.mark.parametrize("score_target", ["released", "posterior"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(batch_size: int = B, seed: int = 0) -> Batch:
    g = generator(seed)
    obs, next_obs = torch.randn(2, batch_size, OBS, generator=g)
    rewards = torch.randn(batch_size, generator=g)
    actions = torch.rand(batch_size, ACT, generator=g) * 2 - 1
    return Batch(obs, actions, rewards, next_obs, (torch.rand(batch_size, generator=g) < 0.3) + 0.0)


def doubles(tensors):
    """A NamedTuple of tensors with its floats in float64."""
    return type(tensors)(*(x.double() if x.is_floating_point() else x for x in tensors))


class Fixed(torch.nn.Module):
    """A network that is the function `f`; its one parameter, 0, is there for an optimizer."""

    def __init__(self, f):
        super().__init__()
        self.f, self.zero = f, torch.nn.Parameter(torch.zeros(()))

    def forward(self, *inputs):
        return self.f(*inputs) + self.zero


class FixedScore(Fixed):
    """A score network that predicts `f(a_t, t)`, for t (B, 1) or, in the sampler, one integer."""

    def forward(self, obs, noisy_actions, t):
        return self.f(noisy_actions, t[:, None]) + self.zero

    def time_features(self):
        return torch.arange(100.0)[:, None]

    def obs_features(self, obs):
        return torch.zeros(len(obs), 1)

    def denoise(self, features, actions):
        return self.f(actions, int(features[0, 0]))


def linear_q(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Q_i(s, a) = k_i s[:ACT] a with k = 1, 3; the mean of the gradients is 2 s[:ACT]."""
    return torch.tensor([[1.0], [3.0]]) * (actions * obs[:, :ACT]).sum(-1)


def learner_of(score_net, critic, lr: float = 0.0) -> qsm.Learner:
    """A learner around networks that are given; with a learning rate of 0 they stay."""
    nets, averages = ((score_net, lr), (critic, 0.0)), copy.deepcopy((critic, score_net))
    adams = [torch.optim.Adam(x.parameters(), torch.tensor(lr), fused=True) for x, lr in nets]
    q_scale = torch.zeros(2, dtype=next(score_net.parameters()).dtype)
    return qsm.Learner(score_net, critic, *averages, *adams, q_scale, torch.zeros(()))


# ---------------------------------------------------------------------------------------- networks


def test_score_net_equals_the_concatenated_network():
    net = ScoreNet(OBS, ACT, (32, 24), 7).double()
    torch.nn.init.normal_(net.first.bias)
    batch, t = doubles(random_batch()), torch.tensor([0, 6, 3, 3, 1])
    angles = 2 * math.pi * t[:, None].double() * net.frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], -1)
    embedding = net.time_mlp[1](F.mish(net.time_mlp[0](embedding)))
    x = F.mish(net.first(torch.cat([batch.actions, batch.obs, embedding], 1)))
    expected = net.out(F.mish(net.hidden[0](x)))
    torch.testing.assert_close(net(batch.obs, batch.actions, t), expected)


def test_mish_is_mish():
    """And its derivative, against float64, over all of float32's range."""
    x = torch.cat([torch.linspace(-100, 100, 20_001), torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    (ours, derive), (exact, backward) = map(torch.func.vjp, (mish, F.mish), (x, x.double()))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-12)
    (grad,), (exact,) = derive(torch.ones_like(x)), backward(torch.ones_like(exact))
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_critic_equals_two_separate_networks():
    critic, batch = Critic(OBS, ACT, (16, 8)), random_batch()
    for bias in critic.biases:
        torch.nn.init.normal_(bias)
    for i, q in enumerate(critic(batch.obs, batch.actions)):
        x = torch.cat([batch.obs, batch.actions], 1)
        for j, (weight, bias) in enumerate(zip(critic.weights, critic.biases)):
            x = (x.relu() if j else x) @ weight[i] + bias[i]
        torch.testing.assert_close(q, x[:, 0])


def test_initialisation_is_xavier_uniform():
    torch.manual_seed(0)
    net, critic = ScoreNet(300, 20, (256, 256)), Critic(300, 20, (256, 256))
    for weight, fan_in in (net.first.weight, 300 + 20 + 128), (critic.weights[0], 300 + 20):
        bound = (6 / (fan_in + 256)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not any(b.any() for b in [net.first.bias, net.out.bias, *critic.biases])


# ------------------------------------------------------------------------------- schedule, sampler


@pytest.mark.parametrize("T", [1, 5, 20])
def test_schedules_match_their_definitions(T):
    sigma = (1 - make_schedule("log-snr", T).alphas_cumprod.double()).sqrt()
    ends = [0.1, 0.995] if T > 1 else [0.995, 0.995]
    assert sigma[[0, -1]].tolist() == pytest.approx(ends, rel=1e-4)
    gaps = ((1 - sigma**2) / sigma**2).log().diff()  # of the log of the signal-to-noise ratio
    torch.testing.assert_close(gaps, gaps.mean().expand(T - 1), rtol=1e-3, atol=0)
    vp = make_schedule("vp", T).alphas_cumprod
    assert vp[-1].item() == pytest.approx(math.exp(-5.05), 1e-4)  # -b_min - (b_max - b_min) / 2
    if T == 5:  # as in the released code
        sigma = [0.443, 0.752, 0.917, 0.980, 0.997]
        assert (1 - vp).sqrt().tolist() == pytest.approx(sigma, abs=5e-4)


def test_released_sampler_with_a_linear_score_has_the_closed_form_mean_and_variance():
    """With eps = g_t (a - m) each step is linear: mean and variance follow a two-line recursion."""
    schedule, g, m = make_schedule("vp", 5), [0.9, 0.7, 1.1, 0.5, 0.8], 0.3
    n, scale = 200_000, 0.02  # noise this small never meets the clamp: the recursion is exact
    noise = scale * torch.randn(6, n, 1, generator=generator())
    score, args = FixedScore(lambda a, t: g[t] * (a - m)), Args(score_target="released")
    samples = sample_actions(score, torch.zeros(n, OBS), noise, schedule, args).double()
    mean, var = 0.0, scale**2
    for t in reversed(range(5)):
        beta, alpha, abar = (x[t].item() for x in schedule[:3])
        k = beta / math.sqrt(1 - abar) * g[t]
        mean = ((1 - k) * mean + k * m) / math.sqrt(alpha)
        var = (1 - k) ** 2 * var / alpha + (beta * scale**2 if t > 0 else 0)
    assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
    assert samples.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / n))


@both_targets
def test_samples_stay_in_bounds_and_use_all_the_noise(score_target):
    T, obs, args = 5, random_batch().obs, Args(score_target=score_target)
    net, schedule = ScoreNet(OBS, ACT, (16,), T), make_schedule("vp", T)
    noise = torch.randn(T + 1, B, ACT, generator=generator())
    actions = sample_actions(net, obs, noise, schedule, args)
    assert actions.shape == (B, ACT) and actions.abs().max() <= 1
    contraction, tame = FixedScore(lambda a, t: 0.5 * a), 0.05 * noise  # away from the bounds
    actions = sample_actions(contraction, obs, tame, schedule, args)
    for k in range(T):
        changed = tame + 0.01 * torch.eye(T + 1)[k, :, None, None]
        assert not torch.equal(sample_actions(contraction, obs, changed, schedule, args), actions)


# ---------------------------------------------------------------------------- update, line by line


def exact_posterior_mean(drift, u, s) -> torch.Tensor:
    """Mean of exp(drift a - (a - u)^2 / 2 s^2) on [-1, 1], trapezoid rule with 20,001 points."""
    a = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    logits = drift[:, None] * a - (a - u[:, None]) ** 2 / (2 * s[:, None] ** 2)
    logits[:, [0, -1]] -= math.log(2)
    return logits.softmax(1) @ a


def test_posterior_mean_against_quadrature():
    """Float32 against float64, s from 1e-2 to 1e3, drifts to +-1e3; measured: 5e-5."""
    sizes = 10.0 ** torch.arange(-2, 4)
    drift = torch.cat([-sizes, torch.zeros(1), sizes])
    for s in 10.0 ** torch.arange(-2, 3.5, 0.5):
        schedule = make_schedule(*(("vp", 1200) if s < 0.1 else ("log-snr", 10)))  # s > 0.009, 0.1
        for u in (-3.0, -1.0, -0.3, 0.0, 0.77, 1.5):
            abar = (1 / (1 + s**2)).expand(13, 1)
            mean = qsm.posterior_mean(drift[:, None], u * abar.sqrt(), abar, schedule)[:, 0]
            rest = torch.full((13,), u, dtype=torch.float64), s.double().expand(13)
            assert (mean - exact_posterior_mean(drift.double(), *rest)).abs().max() < 1e-3, (s, u)
    extremes = torch.tensor([[1e30], [-1e30], [0.0]])
    mean = qsm.posterior_mean(extremes, torch.zeros(3, 1), abar[:3], schedule)
    assert mean[:, 0].tolist() == pytest.approx([1, -1, 0], abs=1e-3)


def check_gradients(net: torch.nn.Module, loss: torch.Tensor) -> None:
    """What `update` left in .grad is the gradient of this loss and of nothing else."""
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@both_targets
def test_losses_and_gradients_by_hand(score_target):
    """Lines 4 to 6 in float64 with real networks, written anew; the two critics differ."""
    args = Args(score_target=score_target, alpha=2.0, gamma=0.9, normalize_q_grad=False, tau=0.0)
    args.diffusion_steps, args.batch_size = 10, 64
    torch.manual_seed(0)
    net, critic = ScoreNet(OBS, ACT, (8, 8), 10).double(), Critic(OBS, ACT, (8, 8)).double()
    target_critic = Critic(OBS, ACT, (8, 8)).double().requires_grad_(False)
    schedule, batch = doubles(make_schedule("log-snr", 10)), doubles(random_batch(64))
    noise, learner = doubles(draw_noise(args, ACT, generator())), learner_of(net, critic)
    learner = learner._replace(critic_target=target_critic)
    metrics = update(learner, batch, noise, schedule, args)

    next_actions = sample_actions(net, batch.next_obs, noise.next_actions, schedule, args)
    next_actions = (next_actions + 0.1 * noise.next_actions[10]).clamp(-1, 1)
    q1, q2 = target_critic(batch.next_obs, next_actions)
    y = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * q1.minimum(q2))
    q1, q2 = critic(batch.obs, batch.actions)
    critic_loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
    assert metrics["losses/critic_loss"].item() == pytest.approx(critic_loss.item())
    check_gradients(critic, critic_loss)

    abar = schedule.alphas_cumprod[noise.t, None]
    noisy_actions = abar.sqrt() * batch.actions + (1 - abar).sqrt() * noise.actions
    prediction = net(batch.obs, noisy_actions, noise.t)
    x = prediction.detach().clamp(-1, 1)

    def drift(point):  # alpha = 2, but without the running scale
        point = point.clone().requires_grad_()
        return 2 * torch.autograd.grad(critic(batch.obs, point).sum() / 2, point)[0]

    if score_target == "posterior":
        s = ((1 - abar) / abar).sqrt().expand(-1, ACT)

        def mean(drift):
            inputs = (x.flatten() for x in (drift, noisy_actions / abar.sqrt(), s))
            return exact_posterior_mean(*inputs).view(64, ACT)

        one, other = drift(x), drift(mean(torch.zeros_like(x)))
        smaller = torch.where(one.abs() < other.abs(), one, other)
        assert 0 < (one * other < 0).sum() < 64
        target = mean(torch.where(one * other < 0, 0, smaller))
    else:
        target = -drift(noisy_actions)
    actor_loss = ((prediction - target) ** 2).mean()
    assert metrics["losses/actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-6)
    check_gradients(net, actor_loss)


def test_posterior_asks_for_the_gradient_inside_the_box_only():
    """Whatever the network predicts; the noised actions are outside."""
    schedule, batch, asked = make_schedule("log-snr", 10), random_batch(64), []
    noise = draw_noise(Args(batch_size=64), ACT, generator())

    def q(obs, actions):
        asked.append(actions.abs().max().item())
        return actions.square().sum(-1).expand(2, -1)

    for target, said in ("posterior", -5.0), ("posterior", 0.3), ("released", 0.3):
        net = FixedScore(lambda a, t, said=said: torch.full_like(a, said))
        update(learner_of(net, Fixed(q)), batch, noise, schedule, Args(score_target=target))
        assert asked[-1] <= 1 if target == "posterior" else asked[-1] > 1


def test_gradient_scale_is_the_running_mean_and_makes_the_target_scale_free():
    args, schedule, losses = Args(batch_size=64), make_schedule("log-snr", 10), []
    for reward_scale in (1.0, 10.0):
        q = Fixed(lambda obs, actions, k=reward_scale: k * linear_q(obs, actions))
        learner, values = learner_of(FixedScore(lambda a, t: torch.zeros_like(a)), q), []
        for seed in range(4):
            noise = draw_noise(args, ACT, generator(seed))
            metrics = update(learner, random_batch(64, seed), noise, schedule, args)
            values.append(metrics["diffusion/q_grad_abs"].item())
        exact = 2 * reward_scale * random_batch(64, 3).obs[:, :ACT].abs().mean()
        assert values[-1] == pytest.approx(exact.item(), rel=1e-5)
        expected = np.average(values, weights=[0.999**k for k in (3, 2, 1, 0)])
        assert (learner.q_scale[0] / learner.q_scale[1]).item() == pytest.approx(expected, rel=1e-4)
        losses.append(metrics["losses/actor_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_update_moves_critics_targets_and_score_as_stated():
    args = Args(hidden_dims=(16, 16), tau=0.1, policy_tau=0.2, batch_size=32)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    for seed in range(3):
        old = [[p.clone() for p in net.parameters()] for net in learner[:4]]
        noise = draw_noise(args, ACT, generator(seed))
        metrics = update(learner, random_batch(32), noise, schedule, args)
        new = [list(net.parameters()) for net in learner[:4]]
        for i, online, tau in (2, 1, args.tau), (3, 0, args.policy_tau):
            for x, before, y in zip(new[i], old[i], new[online], strict=True):
                torch.testing.assert_close(x, tau * y.detach() + (1 - tau) * before)
                assert not x.requires_grad  # or every update hangs its graph on the last one's
        assert not any(map(torch.equal, new[0] + new[1], old[0] + old[1]))
        assert all(not x.requires_grad and math.isfinite(x) for x in metrics.values())


def everything_in(learner) -> list[torch.Tensor]:
    """Copies of weights, optimizer states, gradient scale; not the count of skipped steps."""
    return [x.detach().clone() for x in fast.tensors_in(learner)[:-1]]


def equal(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@both_targets
def test_update_with_a_non_finite_loss_changes_nothing(score_target):
    """A NaN reward spoils the critic's loss and nothing else; a NaN observation spoils both."""
    args = Args(score_target=score_target, hidden_dims=(8, 8), diffusion_steps=3, batch_size=B)
    args.tau = args.policy_tau = 0.0
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 3)
    batch, noise, row = random_batch(), draw_noise(args, ACT, generator()), torch.tensor([2])
    update(learner, batch, noise, schedule, args)
    critics = [*learner.critic.parameters(), *learner.critic_target.parameters()]
    critics_before, before = [p.clone() for p in critics], everything_in(learner)
    rewards = batch.rewards.index_fill(0, row, math.nan)
    update(learner, batch._replace(rewards=rewards), noise, schedule, args)
    assert learner.skipped == 1
    assert equal(critics, critics_before)
    assert not torch.equal(everything_in(learner)[0], before[0])
    before = everything_in(learner)
    for value in (math.nan, math.inf):
        obs = batch.obs.index_fill(0, row, value)
        update(learner, batch._replace(obs=obs), noise, schedule, args)
        assert equal(everything_in(learner), before)
    assert learner.skipped == 5


def test_wrong_shapes_raise():
    batch, args = random_batch(), Args(hidden_dims=(8,), batch_size=B)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    for name in ("rewards", "terminations"):
        bad = batch._replace(**{name: getattr(batch, name)[:, None]})
        with pytest.raises(RuntimeError, match="size of tensor"):
            update(learner, bad, draw_noise(args, ACT, generator()), schedule, args)
        with pytest.raises(ValueError, match=name):
            ReplayBuffer(10, OBS, ACT).add(bad)


def test_actor_lr_schedule():
    args = Args(total_timesteps=1000, utd=0.5, actor_lr=1.0)  # 500 updates, decay over 1000
    assert qsm.actor_lr_at(250, args) == pytest.approx(0.5 + 0.125**0.5)
    assert qsm.actor_lr_at(1000, args) == qsm.actor_lr_at(2000, args) == pytest.approx(0, abs=1e-12)
    assert qsm.actor_lr_at(0, args) == qsm.actor_lr_at(9, replace(args, actor_lr_decay=0)) == 1.0


# ------------------------------------------------------------- samples against Boltzmann densities

Q_FUNCTIONS = {  # Q(a) on [-1, 1] and dQ/da
    "quadratic": (lambda a: -((a - 0.3) ** 2), lambda a: -2 * (a - 0.3)),
    "bimodal": (lambda a: -4 * (a**2 - 0.25) ** 2, lambda a: -16 * a * (a**2 - 0.25)),
    "linear": (lambda a: a, torch.ones_like),
    "flat": (torch.zeros_like, torch.zeros_like),
}
GRID = torch.linspace(-6, 6, 301)[:, None]  # of a_t


def oracle_samples(q_grad, args: Args, start: float = 0.0, n: int = 20_000) -> torch.Tensor:
    """Samples (n,) of the policy whose network is exactly at its target, dQ/da in closed form.

    The posterior target depends on what the network predicts. Training moves a prediction to it in
    small steps, and so does the oracle: 400 steps of 0.03, on GRID, beginning with `start`.
    """
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    tables = torch.full((args.diffusion_steps, len(GRID), 1), start)

    def predict(a, t):
        if args.score_target == "released":
            return -args.alpha * q_grad(a)
        return torch.from_numpy(np.interp(a, GRID[:, 0], tables[t, :, 0])).float()

    for t, x in enumerate(tables if args.score_target == "posterior" else ()):
        abar = schedule.alphas_cumprod[t].view(1, 1)
        flat = qsm.posterior_mean(0.0, GRID, abar, schedule)
        for _ in range(400):
            here, there = q_grad(x), q_grad(flat)
            slope = torch.where(here.abs() < there.abs(), here, there) * (here * there > 0)
            target = qsm.posterior_mean(args.alpha * slope, GRID, abar, schedule)
            x += 0.03 * (target - x)
    noise = torch.randn(args.diffusion_steps, n, 1, generator=generator())
    return sample_actions(FixedScore(predict), torch.zeros(n, OBS), noise, schedule, args)[:, 0]


def w1_to_boltzmann(samples: torch.Tensor, q, alpha: float) -> float:
    """Wasserstein-1 distance to the density ~ exp(alpha Q) on [-1, 1], by quantiles."""
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cdf = (alpha * q(grid)).softmax(0).cumsum(0)
    levels = (torch.arange(len(samples), dtype=torch.float64) + 0.5) / len(samples)
    quantiles = grid[torch.searchsorted(cdf, levels).clamp(max=len(grid) - 1)]
    return (samples.double().sort().values - quantiles).abs().mean().item()


def mean_w1(score_target: str, **flags) -> float:
    """Mean distance to exp(alpha Q) over the four Q and alpha in {1, 10, 50, 200}."""
    distances = []
    for (q, q_grad), alpha in itertools.product(Q_FUNCTIONS.values(), (1.0, 10.0, 50.0, 200.0)):
        args = Args(score_target=score_target, alpha=alpha, **flags)
        distances.append(w1_to_boltzmann(oracle_samples(q_grad, args), q, alpha))
    return sum(distances) / len(distances)


@pytest.mark.parametrize(("T", "all_q", "flat_q"), [(10, 0.030, 0.03), (5, 0.045, 0.04)])
def test_posterior_target_samples_the_boltzmann_density(T, all_q, flat_q):
    """Measured: 0.019, 0.035; flat 0.008, 0.016. No samples are on the bounds."""
    args, (q, q_grad) = Args(diffusion_steps=T), Q_FUNCTIONS["flat"]
    assert mean_w1("posterior", diffusion_steps=T) < all_q
    flat = oracle_samples(q_grad, args)
    assert w1_to_boltzmann(flat, q, 10.0) < flat_q
    assert (flat.abs() == 1).double().mean() < 0.02
    linear = oracle_samples(Q_FUNCTIONS["linear"][1], args)
    assert (linear.abs() == 1).double().mean() < 0.01


def test_oracle_that_starts_on_one_hill_finds_the_other():
    """Measured: 0.68 of the samples on the first; 1.00 with dQ/da at the prediction alone."""
    samples = oracle_samples(Q_FUNCTIONS["bimodal"][1], Args(alpha=50.0), start=0.5)
    assert 0.25 < (samples > 0).float().mean() < 0.75


def test_released_target_does_not_sample_the_boltzmann_density():
    """A fact about the released form: distance 0.45, a flat Q sends 67 % to the bounds."""
    assert mean_w1("released") > 0.40
    flat = oracle_samples(torch.zeros_like, Args(score_target="released"))
    assert (flat.abs() == 1).double().mean() > 0.60


FOUR = [(i, j) for i in (-0.5, 0.5) for j in (-0.5, 0.5)]
STATES = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in (0.0, 0.4, 0.9)])


def hills(obs: torch.Tensor, actions: torch.Tensor, centers: list, shift: float) -> torch.Tensor:
    """Q of which exp(Q) is a sum of bumps of width 0.2 at centers + shift * obs, (2, B)."""
    bumps = [-(actions - shift * obs - torch.tensor(c)).square().sum(-1) for c in centers]
    return (torch.stack(bumps) / (2 * 0.2**2)).logsumexp(0).expand(2, -1)


def learn_hills(centers: list, shift: float):
    """Train the real network; returns 8000 samples at each of STATES, and alpha of Q."""
    torch.manual_seed(0)
    g, T, n, steps, schedule = generator(), 10, 8000, 2000, make_schedule("log-snr", 10)
    args = Args(hidden_dims=(128, 128), actor_lr=3e-3, total_timesteps=steps, actor_lr_decay=1)
    critic = Fixed(lambda obs, actions: hills(obs, actions, centers, shift))
    learner = learner_of(ScoreNet(2, 2, args.hidden_dims, T), critic)
    for k in range(steps):
        obs = F.normalize(torch.randn(256, 2, generator=g))  # on the circle, as STATES
        actions = 2 * torch.rand(256, 2, generator=g) - 1
        batch = Batch(obs, actions, torch.zeros(256), obs, torch.ones(256))
        learner.actor_optimizer.param_groups[0]["lr"].fill_(qsm.actor_lr_at(k, args))
        update(learner, batch, draw_noise(args, 2, g), schedule, args)
    noise, net = torch.randn(T + 1, n, 2, generator=generator(1)), learner.score_net
    samples = [sample_actions(net, state.expand(n, 2), noise, schedule, args) for state in STATES]
    return samples, args.alpha * (learner.q_scale[1] / learner.q_scale[0]).item()


def sliced_w1(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over 16 directions of the Wasserstein-1 distance between projections of two samples."""
    angles = torch.arange(16) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def distance_to_exact(samples: list, alpha: float, centers: list, shift: float) -> float:
    """The largest sliced distance to exp(alpha Q) over STATES."""
    axis = torch.linspace(-1, 1, 201)
    grid, distances = torch.cartesian_prod(axis, axis), []
    for state, actions in zip(STATES, samples):
        q = hills(state.expand(len(grid), 2), grid, centers, shift)[0]
        chosen = (alpha * q).softmax(0).multinomial(len(actions), True, generator=generator(2))
        distances.append(sliced_w1(actions, grid[chosen]))
    return max(distances)


@pytest.mark.parametrize(
    ("centers", "shift", "bound"), [(FOUR[:1], 0.25, 0.02), (FOUR, 0.0, 0.06)], ids=["one", "four"]
)
def test_learned_policy_is_the_boltzmann_density_of_hills(centers, shift, bound):
    """One that the state moves, four that are still. Measured: 0.009, 0.013; shares 0.25, 0.26."""
    samples, alpha = learn_hills(centers, shift)
    assert distance_to_exact(samples, alpha, centers, shift) < bound
    for actions, center in itertools.product(samples, FOUR if centers == FOUR else ()):
        assert 0.20 < (actions * torch.tensor(center) > 0).all(1).float().mean() < 0.30


# ------------------------------------------------------------------------------------------- speed


def test_subnormals_are_flushed():
    """Else dead units slow every update: their Adam means stay below 1e-38 for ever."""
    fast.tune(torch.device("cpu"))
    assert not torch.full((1_000_000,), 1e-39).mul(0.5).view(torch.int32).any()


FAST = [("cpu", True, lambda graph, *_: graph), ("cpu", True, lambda *_: 1 / 0)]
FAST += [pytest.param("cpu", True, None, marks=needs_compiler)]
FAST += [pytest.param("cuda", compile_, None, marks=needs_cuda) for compile_ in (False, True)]


@pytest.mark.parametrize(("device", "compile_", "stand_in"), FAST)
def test_fast_updates_and_actions_agree_with_eager(device, compile_, stand_in, monkeypatch, capsys):
    """Compiled; captured on CUDA; as traced; where the compiler fails. NaN is in one batch."""
    args = Args(hidden_dims=(16, 16), diffusion_steps=3, batch_size=16, compile=compile_)
    schedule, results = make_schedule("log-snr", 3, device), []
    if stand_in:
        monkeypatch.setattr(torch._inductor, "compile", stand_in)
    for make in (fast.accelerate, lambda function, args, device: function):
        torch.manual_seed(0)
        learner = make_learner(args, OBS, ACT, device)
        update_once, act_once = (make(f, args, torch.device(device)) for f in (update, act))
        for seed in range(4):
            batch = Batch(*(x.to(device) for x in random_batch(16, seed)))
            batch.rewards[0] = math.nan if seed == 2 else 30.0  # for large squared gradients
            noise = draw_noise(args, ACT, torch.Generator(device).manual_seed(seed))
            metrics = update_once(learner, batch, noise, schedule, args)
        assert learner.skipped == 1
        actions = act_once(learner, batch.obs, noise.next_actions, schedule, args)
        results.append([*everything_in(learner), actions, *metrics.values()])
    printed = capsys.readouterr().out
    assert ("not compiled" in printed) == (stand_in is FAST[1][2]) and "not captured" not in printed
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_updates_on_two_threads_give_the_same_bits_every_time(compiled, capsys):
    """At sizes that are worth threads. A scatter of gradients fails here."""
    args, schedule = Args(hidden_dims=(256, 256), diffusion_steps=5), make_schedule("vp", 5)
    learner, noise = make_learner(args, OBS, ACT, "cpu"), draw_noise(args, ACT, generator())
    inputs = learner, random_batch(256), noise, schedule, args
    update(*inputs)
    update_once = fast.compiled(update, *inputs) if compiled else update
    tensors, results = fast.tensors_in(learner), []
    before = [x.detach().clone() for x in tensors]
    torch.set_num_threads(2)
    for _ in range(20):
        with torch.no_grad():
            torch._foreach_copy_(tensors, before)
        update_once(*inputs)
        results.append(everything_in(learner))
    assert "not compiled" not in capsys.readouterr().out
    assert all(equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("wrong", [False, True])
def test_a_graph_is_used_only_if_its_first_replay_is_the_update(wrong, monkeypatch, capsys):
    """A stand-in for CUDA: a replay runs the update anew, or a wrong one without line 7."""
    args, schedule = Args(hidden_dims=(16, 16), batch_size=B), make_schedule("log-snr", 10)
    learner, noise = make_learner(args, OBS, ACT, "cpu"), draw_noise(args, ACT, generator())
    inputs, tensors = (learner, random_batch(), noise, schedule), fast.tensors_in(learner)
    before, undo = [x.detach().clone() for x in tensors], contextlib.ExitStack()
    undo.callback(lambda: [x.data.copy_(y) for x, y in zip(tensors, before)])
    replayed = replace(args, tau=0.0) if wrong else args
    graph = SimpleNamespace(replay=lambda: update(*inputs, replayed))
    cuda = dict.fromkeys(("Stream", "current_stream", "stream", "synchronize"), MagicMock())
    cuda |= dict(CUDAGraph=lambda: graph, graph=lambda _: undo)  # a captured call does not run
    monkeypatch.setattr(torch, "cuda", MagicMock(wraps=torch.cuda, **cuda))
    function = fast.captured(update, *inputs, args)
    assert equal(tensors, before)
    assert (function is update) == wrong == ("not captured" in capsys.readouterr().out)


def test_update_and_acting_never_read_a_value():
    """On a GPU that would be a synchronisation. Fake tensors have no values: reading one raises."""
    args = Args(hidden_dims=(16, 16), batch_size=B)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    data = random_batch(), draw_noise(args, ACT, generator()), schedule
    with FakeTensorMode() as mode:
        fakes = {id(x): mode.from_tensor(x) for x in fast.tensors_in(learner)}
        learner, data = copy.deepcopy(learner, fakes), tree_map(mode.from_tensor, data)
        update(learner, *data, args)
        act(learner, data[0].obs, data[1].next_actions, data[2], args)
        with pytest.raises(RuntimeError):
            data[0].rewards.sum().item()


# ----------------------------------------------------------------------- environments and the loop


class Counter(gym.Env):
    """Observation (episode, step): even episodes terminate after 3 steps, odd truncate after 5.

    The first episode depends on the seed. Tests may set `fault`, which is called in each step.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    reward = 0.0

    def __init__(self, low=-0.4, high=0.4, shape=(1,), dtype=np.float64, factor=1.0):
        self.env, self.factor = SimpleNamespace(), factor  # env: a name that wrappers have too
        self.action_space = gym.spaces.Box(low, high, shape, dtype)  # float64 as in dm_control
        self.obs = np.zeros(2)  # one array for all steps: who keeps an observation must copy it

    def fault(self): ...

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1 if seed is None else 101 * seed, 0
        return np.multiply([self.episode, 0.0], self.factor, out=self.obs), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        self.fault()
        odd, reward = self.episode % 2 == 1, self.t + float(action[0]) + self.reward
        obs = np.multiply([self.episode, self.t], self.factor, out=self.obs)
        return obs, reward, not odd and self.t == 3, odd and self.t == 5, {}


gym.register("Counter-v0", Counter, disable_env_checker=True)
gym.register("Square-v1", Counter, kwargs=dict(shape=(2, 2)))
gym.register("Whole-v1", Counter, kwargs=dict(low=-9, high=9, dtype=np.int64))
gym.register("Stuck-v1", Counter, kwargs=dict(low=0.4))
gym.register("Nan-v0", Counter, kwargs=dict(factor=math.nan))


def quick(run_dir: Path, **changes) -> Args:
    """Arguments of a run that takes a moment: 60 steps, updates from step 20 on."""
    quick = dict(env_id="Counter-v0", hidden_dims=(8,), batch_size=16, buffer_size=1000)
    quick |= dict(learning_starts=20, total_timesteps=60, eval_every=0, log_every=20)
    return Args(**quick | dict(device="cpu", compile=False, run_dir=run_dir) | changes)


@pytest.fixture(autouse=True)
def usual_process():
    """What a test has changed is put back."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.set_num_threads(1)  # where a core is busy, threads wait for one another: 10 times slower
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def finished(tmp_path):
    """The folder of a run that has ended."""
    return qsm.main(quick(tmp_path / "runs"))


def run_of(path: Path) -> Path:
    (run,) = path.iterdir()
    return run


def fails(capsys, args, message: str, main=qsm.main, code: int = 1) -> str:
    """It ends in one line with `message`: a SystemExit's text (then exit code 1), or on stdout."""
    with pytest.raises(SystemExit) as end:
        main(args)
    out, err = capsys.readouterr()
    assert not re.sub(r"[^\r\n]*(step/s|s/step)[^\r\n]*|\s", "", err)  # but progress bars
    line = end.value.code if code == 1 else out.splitlines()[-1]
    assert end.value.code in (line, code) and "\n" not in line and re.search(message, line)
    return out


def weights(run: Path) -> list[torch.Tensor]:
    saved = torch.load(run / "model.pt", weights_only=True)
    return [*saved["score_net"].values(), *saved["critic"].values(), saved["q_scale"]]


def checkpoint(run: Path) -> dict:
    saved = runfiles.load_checkpoint(Args(resume=run))[1]
    stored = {name: saved["buffer"][name] for name in Batch._fields}
    return saved | {"step": saved["loop"][0], "buffer": stored}


def check_transitions(run: Path, size: int) -> None:
    """Every saved transition of Counter-v0 is one that an episode can hold, and is there once."""
    stored = {name: torch.from_numpy(x) for name, x in checkpoint(run)["buffer"].items()}
    obs, actions, rewards, next_obs, terminations = Batch(**stored)
    assert len(obs) == len(obs.unique(dim=0)) == size
    assert torch.equal(next_obs[:, 0], obs[:, 0])  # the same episode
    assert torch.equal(next_obs[:, 1], obs[:, 1] + 1)  # one step later
    torch.testing.assert_close(rewards, next_obs[:, 1] + 0.4 * actions[:, 0])  # rescaled
    assert torch.equal(terminations, ((obs[:, 0] % 2 == 0) & (next_obs[:, 1] == 3)).float())
    assert ((obs[:, 0] % 2 == 1) & (next_obs[:, 1] == 5)).any()  # truncated
    assert 0.5 < actions.abs().max() <= 1


def test_buffer_is_a_ring_of_the_newest_and_samples_uniformly():
    buffer = ReplayBuffer(7, OBS, ACT)
    for start in range(0, 20, 4):  # 4 does not divide 7: additions wrap around
        batch = random_batch(4, seed=start)
        buffer.add(batch._replace(rewards=torch.arange(start, start + 4.0)))
    assert sorted(buffer.storage.rewards.tolist()) == list(range(13, 20))
    sample = buffer.sample(7000, generator())
    assert torch.equal(sample.obs[sample.rewards == 18][0], batch.obs[2])
    counts = sample.rewards.long().bincount()[13:]
    assert counts.min() > 850  # 1000 each, standard deviation 29


@pytest.mark.parametrize(("n", "utd"), [(1, 1.0), (4, 0.25), (3, 0.1), (2, 2.5), (1, 0.29)])
def test_update_to_data_ratio_and_stored_transitions_are_exact(n, utd, monkeypatch, tmp_path):
    counts = []
    monkeypatch.setattr(qsm, "update", lambda *args: counts.append(1) or {"q": torch.zeros(())})
    run = qsm.main(quick(tmp_path, learning_starts=19, total_timesteps=120, num_envs=n, utd=utd))
    assert len(counts) == math.floor(round((120 - n - 19) * utd, 6))  # one step behind
    check_transitions(run, 120)


def test_same_seed_same_run_and_evaluation_disturbs_nothing(monkeypatch, tmp_path, capsys):
    """Not if it fails either. It counts one episode of each environment."""

    def weights_with(name="usual", **changes) -> list[torch.Tensor]:
        return weights(qsm.main(quick(tmp_path / name, **changes)))

    usual = weights_with()
    assert equal(usual, weights_with(deterministic=True))
    assert not equal(usual, weights_with(seed=2))
    assert equal(usual, weights_with("evaluated", eval_every=20, eval_episodes=3, log_every=7))
    evaluations = list(csv.DictReader((run_of(tmp_path / "evaluated") / "evaluations.csv").open()))
    assert [int(x["global_step"]) for x in evaluations[::3]] == [0, 20, 40, 60]
    assert [int(x["length"]) for x in evaluations] == [5, 3, 5] * 4  # seeds 1,000,001 + i
    monkeypatch.setattr(Counter, "fault", lambda env: 1 / (env.episode < 10**8))
    assert equal(usual, weights_with(eval_every=30))
    assert "30: no evaluation, an environment failed: ZeroDivision" in capsys.readouterr().out


def test_best_of_candidates_has_the_highest_min_q():
    torch.manual_seed(0)
    args, K, schedule = Args(hidden_dims=(8,), diffusion_steps=3), 6, make_schedule("vp", 3)
    learner, still = make_learner(args, OBS, ACT, "cpu"), Args(action_noise=0.0)
    obs, noise = random_batch().obs, torch.randn(4, K * B, ACT, generator=generator())
    best = act(learner, obs, noise, schedule, still)
    for i in range(B):  # one state at a time, its candidates one by one
        one = [act(learner, obs[[i]], noise[:, [k * B + i]], schedule, still) for k in range(K)]
        q = learner.critic(obs[[i]].expand(K, -1), torch.cat(one)).min(0).values
        torch.testing.assert_close(best[[i]], one[q.argmax()])
    noisy = act(learner, obs, noise, schedule, args)
    torch.testing.assert_close(noisy, (best + 0.1 * noise[-1, :B]).clamp(-1, 1))


def scalars(run: Path) -> dict[str, list]:
    """(step, value) of every scalar in the event files, but for the speed."""
    events = EventAccumulator(str(run))
    events.Reload()
    names = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {name: sorted((x.step, x.value) for x in events.Scalars(name)) for name in names}


def check_same_run(whole: Path, resumed: Path) -> None:
    """Bit for bit: networks, buffer, CSVs, event file."""
    assert equal(weights(whole), weights(resumed))
    np.testing.assert_equal(checkpoint(whole)["buffer"], checkpoint(resumed)["buffer"])
    for name in ("episodes.csv", "evaluations.csv"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert scalars(whole) == scalars(resumed)


CUDA = dict(device="cuda", compile=True, deterministic=True)
STOPS = [(dict(env_id="Humanoid-v4"), signal.SIGTERM, 45, 90)]
STOPS += [(dict(compile=True), signal.SIGINT, 45, 90)]
STOPS += [(dict(eval_every=80), signal.SIGTERM, *x) for x in ((10, 0), (200 + 40 + 10, 80))]
STOPS += [pytest.param(CUDA, signal.SIGTERM, 45, 90, marks=needs_cuda)]


@pytest.mark.parametrize(("changes", "signum", "call", "saved"), STOPS)
def test_run_resumed_after_a_signal(changes, signum, call, saved, monkeypatch, tmp_path, capsys):
    """From the middle of an episode; where it was traced for the compiler; of an evaluation."""
    changes = dict(env_id="Pendulum-v1", num_envs=2, eval_episodes=1, log_every=16) | changes
    changes |= dict(total_timesteps=160, utd=0.5)
    if "device" not in changes:
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_: graph)
    whole, calls = qsm.main(quick(tmp_path / "whole", **changes)), []
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def step_with_signal(*args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signum)
            assert signal.getsignal(signum) in handlers  # a second one ends it at once
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(qsm, "step", step_with_signal)
        message = f"stopped at step {saved}; to continue: --resume"
        fails(capsys, quick(tmp_path / "stopped", **changes), message, code=128 + signum)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    stopped = run_of(tmp_path / "stopped")
    assert (len(calls), checkpoint(stopped)["step"]) == (call, saved)  # that step was the last
    (stopped / "evaluations.csv").open("a").write("what a kill left\n")
    check_same_run(whole, qsm.main(Args(resume=stopped)))
    assert not re.search("not (captured|compiled)", capsys.readouterr().out)


def test_checkpoint_of_another_device_is_resumed_and_told(finished, monkeypatch, capsys):
    """The generator's state is the only part of a checkpoint that a CPU cannot take from CUDA."""
    args = runfiles.load_checkpoint(Args(resume=finished, gamma=0.5))[0]
    moved, saved = runfiles.load_checkpoint(Args(resume=finished, device="cuda"))
    assert (args.gamma, args.device, moved.device) == (0.99, "cpu", "cuda")
    args.total_timesteps, saved["rng"], saved["device"] = 70, saved["rng"][:16], "cuda"
    monkeypatch.setattr(runfiles, "load_checkpoint", lambda _: (args, saved))
    qsm.main(Args(resume=finished))
    assert "--device\nnot bit for bit: saved on cuda\n" in capsys.readouterr().out
    assert torch.load(finished / "model.pt")["global_step"] == 70


def test_run_killed_at_50_random_moments_is_the_uninterrupted_run(monkeypatch, tmp_path, capsys):
    """A run that writes a checkpoint in every step is killed 50 times, and resumed each time."""
    changes, steps = dict(env_id="Pendulum-v1", actor_lr_decay=0.0), []
    args = quick(tmp_path / "killed", total_timesteps=100_000, checkpoint_every=1, **changes)
    moments, processes = np.random.default_rng(0), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["qsm", "torch._dynamo"])  # imported once

    def saved_at() -> list[int]:
        return [x.stat().st_mtime_ns for x in tmp_path.glob("killed/*/checkpoint.npz")]

    for _ in range(50):
        before, process = saved_at(), processes.Process(target=qsm.main, args=(args,))
        process.start()
        while saved_at() == before:  # until its first one
            assert process.is_alive()
            time.sleep(0.001)
        args = Args(resume=run_of(tmp_path / "killed"))
        fails(capsys, args, "in use by another process")
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        steps.append(checkpoint(args.resume)["step"])
    assert steps == sorted(set(steps))  # each got further
    with (args.resume / "episodes.csv").open("a") as file:
        file.write("92,0,1.0,9\n94,1,2.")  # of after the last checkpoint
    with runfiles.SummaryWriter(args.resume) as events:
        events.add_scalar("losses/critic_loss", 1.0, steps[-1] + 1)
    time.sleep(1)  # event files are read in the order of their names: by second
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(runfiles.StopRequest, "__call__", lambda self: signal.SIGTERM)
        qsm.main(args)
    whole = qsm.main(quick(tmp_path / "whole", total_timesteps=steps[-1], **changes))
    check_same_run(whole, args.resume)


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, None])
@pytest.mark.parametrize("where", ["reward", "factor"])
def test_broken_environment_stops_the_run(value, where, monkeypatch, tmp_path, capsys):
    """1e39 is infinite in float32, None raises a TypeError. Then resumed without its simulators."""

    def diverge(env):
        if env.episode >= 202 + 8 and env.t == 3:  # env 1 of 2, at the end of its ninth episode
            setattr(env, where, value)

    message = "environment 1 diverged" if value else "an environment failed: .*TypeError"
    with monkeypatch.context() as patch:
        patch.setattr(Counter, "fault", diverge)
        fails(capsys, quick(tmp_path, total_timesteps=120, num_envs=2), f"{message}.*--resume")
    run = run_of(tmp_path)
    assert checkpoint(run)["step"] >= 60
    check_transitions(run, checkpoint(run)["step"])
    monkeypatch.setattr(Counter, "fault", lambda env: setattr(env, "unpicklable", lambda: None))
    check_transitions(qsm.main(Args(resume=run)), 120)
    assert checkpoint(run)["envs"] == (None, None)


@pytest.mark.parametrize(("what", "saved"), [("loss", 46), ("action", 40)])
def test_nan_stops_the_run_and_is_not_saved(what, saved, monkeypatch, tmp_path, capsys):
    real_update, count = qsm.update, []

    def poisoned(learner, batch, *rest):
        count.append(1)
        if len(count) == 25:  # at step 45, after the checkpoint at step 40
            x = batch.rewards if what == "loss" else learner.score_net.out.bias.data
            x.fill_(math.nan)
        return real_update(learner, batch, *rest)

    monkeypatch.setattr(qsm, "update", poisoned)
    fails(capsys, quick(tmp_path, checkpoint_every=40), "loss or action not finite")
    run = run_of(tmp_path)
    assert checkpoint(run)["step"] == saved
    assert all(x.isfinite().all() for x in weights(run))


@pytest.mark.parametrize("name", ["checkpoint.npz", "model.pt"])
def test_full_disk_keeps_the_older_file_and_trains_on(name, monkeypatch, tmp_path, capsys):
    whole_file, (soft, hard) = runfiles.whole_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def file_on_full_disk(path):
        most = 20_000 if path.name == name and path.exists() else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        return whole_file(path)

    monkeypatch.setattr(runfiles, "whole_file", file_on_full_disk)
    out = fails(capsys, quick(tmp_path, checkpoint_every=20), "step 60 could not be saved whole")
    assert "step 40 is not saved whole: [Errno 27] File too large" in out
    run = run_of(tmp_path)
    model = torch.load(run / "model.pt")
    assert (model["global_step"] if name == "model.pt" else checkpoint(run)["step"]) == 20
    assert not list(run.glob("*.tmp"))


def test_full_disk_while_logging_stops_with_one_line(monkeypatch, tmp_path, capsys):
    def full(self, global_step, *episode):
        if global_step > 40:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(runfiles.RunFiles, "log_episode", full)
    fails(capsys, quick(tmp_path, checkpoint_every=20), "No space left on device")
    assert checkpoint(run_of(tmp_path))["step"] == 40


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": lambda path: np.bitwise_xor.at(np.memmap(path, mode="r+"), 10_000, 1),
    "empty": lambda path: os.truncate(path, 0),
    "foreign": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_checkpoint_gets_one_line(damage, finished, capsys):
    DAMAGES[damage](finished / "checkpoint.npz")
    before = {path: path.read_bytes() for path in finished.iterdir()}
    message = "has no checkpoint.npz" if damage == "missing" else "checkpoint.npz is damaged"
    fails(capsys, Args(resume=finished), message)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.parametrize("change", [{"hidden_dims": (9,)}, {"num_envs": 2}, {"new_flag": 1}])
def test_checkpoint_of_other_sizes_gets_one_line(change, finished, monkeypatch, capsys):
    def load_changed(*args, load=torch.load, **flags) -> dict:
        saved = load(*args, **flags)
        return saved | {"args": saved["args"] | change}

    monkeypatch.setattr(torch, "load", load_changed)
    fails(capsys, Args(resume=finished), "of another version of qsm.py")


def test_runs_have_names_of_their_own_and_are_tracked(monkeypatch, tmp_path):
    tracked = []
    wandb = SimpleNamespace(init=lambda **flags: tracked.append(flags), __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    runs = [qsm.main(quick(tmp_path, track=True)) for _ in range(2)]
    qsm.main(Args(resume=runs[0]))
    names = [run.name for run in runs]
    assert len({*names}) == 2 and all(name.startswith("Counter-v0__qsm__1__") for name in names)
    assert [x["id"] for x in tracked] == [*names, names[0]]
    assert all(x["resume"] == "allow" and x["sync_tensorboard"] for x in tracked)


IMPOSSIBLE = [("gamma", 1.5), ("gamma", math.nan), ("total_timesteps", 0), ("seed", -1)]
IMPOSSIBLE += [("utd", 0.0), ("hidden_dims", ()), ("alpha", -1.0), ("num_envs", 1001)]
IMPOSSIBLE += [("device", "tpu"), ("device", "cuda:99"), ("device", "meta"), ("beta_schedule", "x")]
IMPOSSIBLE = [(name, value, "--" + name.replace("_", "-")) for name, value in IMPOSSIBLE]
IMPOSSIBLE += [("env_id", f"{x}-v1", "1-D Box") for x in ("CartPole", "Square", "Whole", "Stuck")]
IMPOSSIBLE += [("env_id", "Nan-v0", "began with a value that is not finite")]
IMPOSSIBLE += [("env_id", "NoSuchEnv-v0", "cannot make NoSuch"), ("env_id", "Pusher-v4", "mujoco")]
IMPOSSIBLE += [("env_id", "dm_control/walker-walk-v0", "pip install 'shimmy")]
IMPOSSIBLE += [("track", True, "pip install wandb"), ("run_dir", Path("/dev/null/x"), "/dev/null")]
IMPOSSIBLE += [("buffer_size", 10**12, "needs .* GiB"), ("hidden_dims", (10**6,) * 2, "lower --b")]


@pytest.mark.parametrize(("name", "value", "message"), IMPOSSIBLE)
def test_impossible_arguments_are_refused(name, value, message, monkeypatch, tmp_path, capsys):
    for package in ("shimmy", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    fails(capsys, quick(**{"run_dir": tmp_path / "runs", name: value}), message)
    assert not (tmp_path / "runs").exists()


def test_command_line(tmp_path):
    options = dict(capture_output=True, text=True, timeout=170)
    command = [sys.executable, qsm.__file__, "--env-id", "Pendulum-v1", "--device", "cpu"]
    flags = f"--total-timesteps 60 --learning-starts 40 --hidden-dims 8 8 --run-dir {tmp_path}"
    subprocess.run([*command, *flags.split()], **options, check=True)
    assert checkpoint(run_of(tmp_path))["step"] == 60
    result = subprocess.run([*command, "--gamma", "2"], **options)
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
