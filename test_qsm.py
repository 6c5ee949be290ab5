"""Tests: first the mathematics against closed forms, then the loop, then faults. On a CPU.

Each fault below is a test; "saved" means that the run can be resumed from the step under way.

| broken | what happens | exit code |
|---|---|---|
| NaN, infinite or float32-overflowing reward or observation | not stored; named; saved | 1 |
| NaN in a loss | that optimizer step is left out; at the next log line, saved | 1 |
| policy with NaN weights | does not act, is not saved over the last good state | 1 |
| an environment raises an error, its worker is killed | named; saved | 1 |
| the same in an evaluation | named; training goes on | - |
| SIGKILL at random moments | the resumed run is the uninterrupted one, bit for bit | - |
| SIGTERM, Ctrl-C | ends its step, breaks off an evaluation, saves | 143, 130 |
| full disk while saving; at the end; while logging | goes on; older files stay | -; 1; 1 |
| run folder in use or not writable | one line, nothing touched | 1 |
| checkpoint truncated, one bit flipped, empty, foreign, missing, of other sizes | untouched | 1 |
| model that names code to import | refused | 1 |
| replay buffer or networks larger than the memory | one line | 1 |
| a compiler that does not work | one line; goes on without | - |
| unknown or discrete environment, impossible flag, no such device, package missing | one line | 1 |
"""

import copy
import csv
import importlib.util
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
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._inductor
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fast
import qsm
import runfiles
from buffer import Batch, ReplayBuffer
from envs import UserError, make_env, make_envs, step
from networks import Critic, ScoreNet
from qsm import (
    Args,
    Learner,
    Noise,
    act,
    actor_lr_at,
    draw_noise,
    make_learner,
    make_schedule,
    posterior_mean,
    q_gradient,
    sample_actions,
    update,
)

ROOT = Path(__file__).parent
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


class QuadraticCritic:
    """Q_i(s, a) = -k_i/2 |a - s[:ACT]|^2, whose mean gradient is -mean(k) (a - s[:ACT])."""

    k = torch.tensor([1.0, 3.0])

    def __call__(self, obs, actions):
        return -self.k[:, None] / 2 * (actions - obs[:, :ACT]).square().sum(-1)

    def gradient(self, obs, actions):
        return -self.k.mean() * (actions - obs[:, :ACT])


class Fixed(torch.nn.Module):
    """A network that is the function `f`; its one parameter, 0, is there for an optimizer."""

    def __init__(self, f):
        super().__init__()
        self.f, self.zero = f, torch.nn.Parameter(torch.zeros(()))

    def forward(self, *inputs):
        return self.f(*inputs) + self.zero


class FixedScore(Fixed):
    """A score network likewise; `sample_actions` sees a prediction of 0."""

    def time_features(self):
        return torch.zeros(100, 1)

    def obs_features(self, obs):
        return torch.zeros(len(obs), 1)

    def denoise(self, features, actions):
        return torch.zeros_like(actions)


class OracleScore(FixedScore):
    """A score network whose prediction in the sampler is `predict(a_t, t)`."""

    def time_features(self):
        return torch.arange(100.0)[:, None]

    def denoise(self, features, actions):
        return self.f(actions, int(features[0, 0]))


def learner_of(score_net, critic, critic_target=None, lr: float = 0.0) -> Learner:
    """A learner around networks that are given; with a learning rate of 0 they stay."""
    nets = (score_net, lr), (critic, 0.0)
    adams = [torch.optim.Adam(x.parameters(), torch.tensor(lr), fused=True) for x, lr in nets]
    dtype = next(score_net.parameters()).dtype
    target = critic_target or copy.deepcopy(critic).requires_grad_(False)
    return Learner(score_net, critic, target, *adams, torch.zeros(2, dtype=dtype), torch.zeros(()))


# ---------------------------------------------------------------------------------------- networks


def test_score_net_equals_the_concatenated_network():
    net = ScoreNet(OBS, ACT, (32, 24), 7).double()
    torch.nn.init.normal_(net.first.bias)
    batch, t = random_batch(), torch.tensor([0, 6, 3, 3, 1])
    obs, actions = batch.obs.double(), batch.actions.double()
    angles = 2 * math.pi * t[:, None].double() * net.frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], -1)
    embedding = net.time_mlp[1](F.mish(net.time_mlp[0](embedding)))
    x = F.mish(net.first(torch.cat([actions, obs, embedding], 1)))
    torch.testing.assert_close(net(obs, actions, t), net.out(F.mish(net.hidden[0](x))))


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
    for name in ("log-snr", "vp", "cosine", "linear"):
        betas, alphas, abar, *_ = make_schedule(name, T)
        torch.testing.assert_close(alphas, 1 - betas)
        torch.testing.assert_close(abar, (1 - betas.double()).cumprod(0).float(), rtol=1e-4, atol=0)
    # The exponents of vp sum to -b_min - (b_max - b_min) / 2 for all T.
    assert make_schedule("vp", T).alphas_cumprod[-1].item() == pytest.approx(math.exp(-5.05), 1e-4)
    f = [math.cos(math.pi / 2 * (t / T + 0.008) / 1.008) ** 2 for t in range(T + 1)]
    cosine = make_schedule("cosine", T)
    for t in range(T - 1):  # the last beta is cut to 0.999
        assert cosine.alphas_cumprod[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-4)
    assert cosine.betas[-1].item() == pytest.approx(0.999)
    linear = make_schedule("linear", T).betas
    assert [linear[0].item(), linear[-1].item()] == pytest.approx([1e-4, 2e-2 if T > 1 else 1e-4])


def test_log_snr_schedule_is_equally_spaced_between_its_ends():
    sigma = (1 - make_schedule("log-snr", 10).alphas_cumprod.double()).sqrt()
    assert sigma[[0, -1]].tolist() == pytest.approx([0.1, 0.995], rel=1e-4)
    gaps = ((1 - sigma**2) / sigma**2).log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-3, atol=0)
    one = make_schedule("log-snr", 1).alphas_cumprod
    assert one.item() == pytest.approx(1 - 0.995**2, rel=1e-4)


def test_vp_schedule_as_in_the_released_code():
    sigma = (1 - make_schedule("vp", 5).alphas_cumprod).sqrt()
    expected = torch.tensor([0.443, 0.752, 0.917, 0.980, 0.997])
    torch.testing.assert_close(sigma, expected, atol=5e-4, rtol=0)


def test_released_sampler_with_a_linear_score_has_the_closed_form_mean_and_variance():
    """With eps = g_t (a - m) each step is linear: mean and variance follow a two-line recursion."""
    schedule, g, m = make_schedule("vp", 5), [0.9, 0.7, 1.1, 0.5, 0.8], 0.3
    n, scale = 200_000, 0.02  # noise this small never meets the clamp: the recursion is exact
    noise = scale * torch.randn(6, n, 1, generator=generator())
    score, args = OracleScore(lambda a, t: g[t] * (a - m)), Args(score_target="released")
    args.action_noise = 0.0
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
def test_sampler_recovers_a_gaussian_from_its_exact_score(score_target):
    """eps or E[a_0 | a_t] of N(0.2, 0.1^2); 100 steps leave a bias far below the tolerances."""
    T, mean, std, schedule = 100, 0.2, 0.1, make_schedule("cosine", 100)

    def predict(a, t):
        abar = schedule.alphas_cumprod[t]
        residual = (a - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)
        posterior = score_target == "posterior"
        return mean + abar.sqrt() * std**2 * residual if posterior else (1 - abar).sqrt() * residual

    noise = torch.randn(T + 1, 20_000, 1, generator=generator())
    args = Args(score_target=score_target, action_noise=0.0)
    samples = sample_actions(OracleScore(predict), torch.zeros(20_000, OBS), noise, schedule, args)
    assert samples.mean().item() == pytest.approx(mean, abs=0.005)
    assert samples.std().item() == pytest.approx(std, rel=0.05)


@both_targets
def test_samples_stay_in_bounds_and_use_all_the_noise(score_target):
    T, obs, args = 5, random_batch().obs, Args(score_target=score_target)
    net, schedule = ScoreNet(OBS, ACT, (16,), T), make_schedule("vp", T)
    noise = torch.randn(T + 1, B, ACT, generator=generator())
    actions = sample_actions(net, obs, noise, schedule, args)
    assert actions.shape == (B, ACT)
    assert actions.abs().max() <= 1
    contraction, tame = OracleScore(lambda a, t: 0.5 * a), 0.05 * noise  # away from the bounds
    actions = sample_actions(contraction, obs, tame, schedule, args)
    for k in range(T + 1):
        changed = tame.clone()
        changed[k] += 0.01
        assert not torch.equal(sample_actions(contraction, obs, changed, schedule, args), actions)


# ---------------------------------------------------------------------------- update, line by line


def test_q_gradient_of_a_quadratic():
    critic, batch = QuadraticCritic(), random_batch()
    exact = critic.gradient(batch.obs, batch.actions)
    torch.testing.assert_close(q_gradient(critic, batch.obs, batch.actions), exact)


def test_td_target_and_critic_loss_by_hand():
    """y = r + gamma min(Q'_1, Q'_2), or r at a termination; sum of both mean (Q_i - y)^2."""
    batch = random_batch(3)._replace(
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        next_obs=torch.tensor([[10.0, 0, 0], [20.0, 0, 0], [-7.0, 0, 0]]),
        terminations=torch.tensor([0.0, 1.0, 0.0]),  # a truncation is stored as not terminated
    )
    args, seen, net = Args(gamma=0.9, diffusion_steps=4), [], ScoreNet(OBS, ACT, (8,), 4)
    schedule, noise = make_schedule("cosine", 4), draw_noise(4, 3, ACT, generator())

    def critic_target(obs, actions):
        seen.append(actions)
        return torch.stack([obs[:, 0], 2 * obs[:, 0]])  # the smaller one depends on the sign

    critic = Fixed(lambda obs, actions: torch.stack([0 * actions.sum(1), 0 * actions.sum(1) + 1]))
    metrics = update(learner_of(net, critic, Fixed(critic_target)), batch, noise, schedule, args)
    y = torch.tensor([1 + 0.9 * 10, 2, 3 + 0.9 * -14])
    expected = y.square().mean() + (1 - y).square().mean()
    assert metrics["losses/critic_loss"].item() == pytest.approx(expected.item())
    sampled = sample_actions(net, batch.next_obs, noise.next_actions, schedule, args)
    torch.testing.assert_close(seen[0], sampled)


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
        schedule = make_schedule(
            "linear" if s < 0.1 else "log-snr", 10
        )  # linear begins at s = 0.01
        for u in (-3.0, -1.0, -0.3, 0.0, 0.77, 1.5):
            abar = (1 / (1 + s**2)).expand(13, 1)
            mean = posterior_mean(drift[:, None], u * abar.sqrt(), abar, schedule)[:, 0]
            rest = torch.full((13,), u, dtype=torch.float64), s.double().expand(13)
            assert (mean - exact_posterior_mean(drift.double(), *rest)).abs().max() < 1e-3, (s, u)
    extremes = torch.tensor([[1e30], [-1e30], [0.0]])
    mean = posterior_mean(extremes, torch.zeros(3, 1), abar[:3], schedule)
    assert mean[:, 0].tolist() == pytest.approx([1, -1, 0], abs=1e-3)


@both_targets
def test_actor_loss_by_hand(score_target):
    """Of a network that always says 0.3, with a quadratic Q, whose gradient there is known."""
    args = Args(score_target=score_target, alpha=0.7, normalize_q_grad=False)
    schedule, critic, batch = make_schedule("vp", 5), QuadraticCritic(), random_batch(64)
    noise, said = draw_noise(5, 64, ACT, generator()), torch.full((64, ACT), 0.3)
    learner = learner_of(FixedScore(lambda *_: said), Fixed(critic))
    loss = update(learner, batch, noise, schedule, args)["losses/actor_loss"].item()
    abar = schedule.alphas_cumprod[noise.t, None]
    noisy_actions = abar.sqrt() * batch.actions + (1 - abar).sqrt() * noise.actions
    if score_target == "released":
        target = -0.7 * critic.gradient(batch.obs, noisy_actions)
    else:
        drift, s = (
            0.7 * critic.gradient(batch.obs, said),
            ((1 - abar) / abar).sqrt().expand(-1, ACT),
        )
        inputs = (x.double().flatten() for x in (drift, noisy_actions / abar.sqrt(), s))
        target = exact_posterior_mean(*inputs).view(64, ACT)
    assert loss == pytest.approx((0.3 - target).square().mean().item(), rel=1e-5)


def test_posterior_asks_for_the_gradient_inside_the_box_only():
    """Whatever the network predicts; the noised actions are outside."""
    schedule, batch, asked = make_schedule("log-snr", 10), random_batch(64), []
    noise = draw_noise(10, 64, ACT, generator())

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(actions):
            asked.append(actions.abs().max().item())
            return actions.clone()

        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(lambda ctx, grad: grad)

    critic = Fixed(lambda obs, actions: Recorded.apply(actions).square().sum(-1).expand(2, -1))
    for target, said, most in ("posterior", -5.0, 1), ("posterior", 0.3, 0.3), ("released", 0.3, 0):
        net = FixedScore(lambda *_, said=said: torch.full((64, ACT), said))
        update(learner_of(net, critic), batch, noise, schedule, Args(score_target=target))
        assert asked[-1] == pytest.approx(most) if most else asked[-1] > 1


@both_targets
def test_actor_gradient_against_finite_differences_and_none_to_the_critics(
    score_target, monkeypatch
):
    flags = dict(alpha=2.0, diffusion_steps=5, normalize_q_grad=False, tau=0.0)
    args = Args(score_target=score_target, **flags)
    torch.manual_seed(0)
    net, critic = ScoreNet(OBS, ACT, (8, 8), 5).double(), Critic(OBS, ACT, (8, 8)).double()
    schedule = qsm.Schedule(*(x.double() for x in make_schedule("vp", 5)))
    batch, noise = Batch(*(x.double() for x in random_batch())), draw_noise(5, B, ACT, generator())
    noise = Noise(*(x.double() for x in noise[:3]), noise.t)
    learner = learner_of(net, critic)

    def loss() -> float:
        return update(learner, batch, noise, schedule, args)["losses/actor_loss"].item()

    loss()
    gradients = [p.grad.clone() for p in net.parameters()]
    targets, mean = [], qsm.posterior_mean  # no gradient flows through the target: hold it
    hold = lambda *inputs: targets.append(mean(*inputs)) or targets[0]  # noqa: E731
    monkeypatch.setattr(qsm, "posterior_mean", hold)
    loss()
    for parameter, gradient in zip(net.parameters(), gradients):
        flat, h = parameter.data.view(-1), 1e-6
        for k in range(0, len(flat), max(1, len(flat) // 3)):
            value = flat[k].item()
            flat[k] = value + h
            up = loss()
            flat[k] = value - h
            down = loss()
            flat[k] = value
            numeric = (up - down) / (2 * h)
            assert gradient.view(-1)[k].item() == pytest.approx(numeric, rel=1e-4, abs=1e-7)

    loss()
    next_actions = sample_actions(net, batch.next_obs, noise.next_actions, schedule, args)
    next_q = learner.critic_target(batch.next_obs, next_actions).amin(0)
    y = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    critic_loss = (critic(batch.obs, batch.actions) - y).square().mean(1).sum()
    expected = torch.autograd.grad(critic_loss, list(critic.parameters()))
    for parameter, gradient in zip(critic.parameters(), expected):  # line 6 has added nothing
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradient_scale_is_the_running_mean_and_makes_the_target_scale_free():
    schedule, critic, losses = make_schedule("log-snr", 10), QuadraticCritic(), []
    for reward_scale in (1.0, 10.0):
        net = FixedScore(lambda obs, noisy_actions, t: torch.zeros_like(noisy_actions))
        q = Fixed(lambda obs, actions, k=reward_scale: k * critic(obs, actions))
        learner, values = learner_of(net, q), []
        for seed in range(4):
            noise = draw_noise(10, 64, ACT, generator(seed))
            metrics = update(learner, random_batch(64, seed), noise, schedule, Args())
            values.append(metrics["diffusion/q_grad_abs"].item())
        weights = [0.999**k for k in (3, 2, 1, 0)]
        expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        actual = learner.q_scale[0] / learner.q_scale[1]
        assert actual.item() == pytest.approx(expected, rel=1e-4)
        losses.append(metrics["losses/actor_loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_update_moves_critics_targets_and_score_as_stated():
    args = Args(hidden_dims=(16, 16), tau=0.1)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    for seed in range(3):
        old = [[p.clone() for p in net.parameters()] for net in learner[:3]]
        noise = draw_noise(10, 32, ACT, generator(seed))
        metrics = update(learner, random_batch(32), noise, schedule, args)
        new = [list(net.parameters()) for net in learner[:3]]
        for x, before, online in zip(new[2], old[2], new[1]):
            torch.testing.assert_close(x, 0.1 * online.detach() + 0.9 * before)
            assert not x.requires_grad  # or every update hangs its graph on the last one's
        for x, before in zip(new[0] + new[1], old[0] + old[1]):
            assert not torch.equal(x, before)
        assert all(not x.requires_grad and math.isfinite(x) for x in metrics.values())


def everything_in(learner) -> list[torch.Tensor]:
    """Copies of weights, optimizer states, gradient scale; not the count of skipped steps."""
    return [x.detach().clone() for x in fast.tensors_in(learner)[:-1]]


def equal(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@both_targets
def test_update_with_a_non_finite_loss_changes_nothing(score_target):
    """A NaN reward spoils the critic's loss and nothing else; a NaN observation spoils both."""
    args = Args(score_target=score_target, hidden_dims=(8, 8), diffusion_steps=3, tau=0.0)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("cosine", 3)
    batch, noise, row = random_batch(), draw_noise(3, B, ACT, generator()), torch.tensor([2])
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
    update(learner, batch, noise, schedule, args)
    assert learner.skipped == 5
    assert not torch.equal(everything_in(learner)[0], before[0])


def test_critic_learns_a_known_value():
    """Reward 1 in every state and no termination: Q = 1 / (1 - gamma)."""
    args = Args(hidden_dims=(32, 32), diffusion_steps=2, gamma=0.5, tau=0.1, critic_lr=3e-3)
    torch.manual_seed(0)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("cosine", 2)
    for seed in range(400):
        ones = dict(rewards=torch.ones(64), terminations=torch.zeros(64))
        batch = random_batch(64, seed)._replace(**ones)
        update(learner, batch, draw_noise(2, 64, ACT, generator(seed)), schedule, args)
    assert (learner.critic(batch.obs, batch.actions) - 2).abs().mean() < 0.05


def test_wrong_shapes_raise():
    batch, args = random_batch(), Args(hidden_dims=(8,))
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    for name in ("rewards", "terminations"):
        bad = batch._replace(**{name: getattr(batch, name)[:, None]})
        with pytest.raises(ValueError, match=name):
            update(learner, bad, draw_noise(10, B, ACT, generator()), schedule, args)
        with pytest.raises(ValueError, match=name):
            ReplayBuffer(10, OBS, ACT).add(bad)


def test_actor_lr_schedule():
    args = Args(total_timesteps=1000, utd=0.5, actor_lr=1.0)  # 500 updates, decay over 1000
    assert actor_lr_at(0, args) == 1.0
    assert actor_lr_at(500, args) == pytest.approx(0.5)
    assert actor_lr_at(1000, args) == actor_lr_at(2000, args) == pytest.approx(0, abs=1e-12)
    assert actor_lr_at(900, Args(actor_lr_decay=0, actor_lr=1.0)) == 1.0


# ------------------------------------------------------------- samples against Boltzmann densities

Q_FUNCTIONS = {  # Q(a) on [-1, 1] and dQ/da
    "quadratic": (lambda a: -((a - 0.3) ** 2), lambda a: -2 * (a - 0.3)),
    "bimodal": (lambda a: -4 * (a**2 - 0.25) ** 2, lambda a: -16 * a * (a**2 - 0.25)),
    "linear": (lambda a: a, torch.ones_like),
    "flat": (torch.zeros_like, torch.zeros_like),
}


def oracle_samples(q_grad, args: Args, n: int = 20_000) -> torch.Tensor:
    """Samples (n,) of the policy whose network is exactly at its target, dQ/da in closed form.

    The posterior target depends on what the network predicts. Training moves a prediction to it in
    small steps, and so does the oracle: 400 steps of 0.03, on a grid of a_t.
    """
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    grid = torch.linspace(-6, 6, 301)[:, None]

    def predict(a, t):
        if args.score_target == "released":
            return -args.alpha * q_grad(a)
        abar, x = schedule.alphas_cumprod[t].expand(len(grid), 1), torch.zeros_like(grid)
        for _ in range(400):
            x += 0.03 * (posterior_mean(args.alpha * q_grad(x), grid, abar, schedule) - x)
        return torch.from_numpy(np.interp(a, grid[:, 0], x[:, 0])).float()

    noise = torch.randn(args.diffusion_steps + 1, n, 1, generator=generator())
    noise[-1] = 0
    return sample_actions(OracleScore(predict), torch.zeros(n, OBS), noise, schedule, args)[:, 0]


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
    for q, q_grad in Q_FUNCTIONS.values():
        for alpha in (1.0, 10.0, 50.0, 200.0):
            args = Args(score_target=score_target, alpha=alpha, **flags)
            distances.append(w1_to_boltzmann(oracle_samples(q_grad, args), q, alpha))
    return sum(distances) / len(distances)


two_schedules = pytest.mark.parametrize(
    ("T", "schedule", "all_q", "flat_q"), [(10, "log-snr", 0.030, 0.03), (5, "cosine", 0.045, 0.04)]
)


@two_schedules
def test_posterior_target_samples_the_boltzmann_density(T, schedule, all_q, flat_q):
    """Measured: 0.020 and 0.037. A flat or linear Q does not send actions to the bounds."""
    assert mean_w1("posterior", diffusion_steps=T, beta_schedule=schedule) < all_q
    args, (q, q_grad) = Args(diffusion_steps=T, beta_schedule=schedule), Q_FUNCTIONS["flat"]
    flat = oracle_samples(q_grad, args)
    assert w1_to_boltzmann(flat, q, 10.0) < flat_q
    assert (flat.abs() == 1).double().mean() < 0.02
    linear = oracle_samples(Q_FUNCTIONS["linear"][1], args)
    assert (linear.abs() == 1).double().mean() < 0.01


def test_released_target_does_not():
    """A fact about the released form: distance 0.45, a flat Q sends 67 % to the bounds."""
    assert mean_w1("released") > 0.40
    flat = oracle_samples(torch.zeros_like, Args(score_target="released"))
    assert (flat.abs() == 1).double().mean() > 0.60


FOUR = [(i, j) for i in (-0.5, 0.5) for j in (-0.5, 0.5)]
ANGLES = torch.tensor([0.0, 0.4, 0.9])
STATES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def turned_back(obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of actions (B, 2) in a frame that the states, unit vectors (B, 2), turn."""
    return (obs * actions).sum(-1), obs[:, 0] * actions[:, 1] - obs[:, 1] * actions[:, 0]


def hills(obs: torch.Tensor, actions: torch.Tensor, centers: list) -> torch.Tensor:
    """Q of which exp(Q) is a sum of bumps of width 0.2 at centers that the state turns, (2, B)."""
    x, y = turned_back(obs, actions)
    bumps = [-((x - i) ** 2 + (y - j) ** 2) / (2 * 0.2**2) for i, j in centers]
    return torch.stack(bumps).logsumexp(0).expand(2, -1)


def learn_hills(centers: list, reward_scale: float = 1.0, steps: int = 2000, n: int = 8000):
    """Train the real network on reward_scale * Q; samples (n, 2) at each of STATES, alpha of Q."""
    torch.manual_seed(0)
    g, T, schedule = generator(), 10, make_schedule("log-snr", 10)
    args = Args(hidden_dims=(128, 128), actor_lr=3e-3, total_timesteps=steps, actor_lr_decay=1)
    args.action_noise = 0.0
    critic = Fixed(lambda obs, actions: reward_scale * hills(obs, actions, centers))
    learner = learner_of(ScoreNet(2, 2, args.hidden_dims, T), critic)
    for k in range(steps):
        angles = 2 * torch.pi * torch.rand(256, generator=g)
        obs = torch.stack([angles.cos(), angles.sin()], 1)
        actions = 2 * torch.rand(256, 2, generator=g) - 1
        batch = Batch(obs, actions, torch.zeros(256), obs, torch.ones(256))
        learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(k, args))
        update(learner, batch, draw_noise(T, 256, 2, g), schedule, args)
    noise = torch.randn(T + 1, n, 2, generator=generator(1))
    net = learner.score_net
    samples = [sample_actions(net, state.expand(n, 2), noise, schedule, args) for state in STATES]
    return samples, args.alpha * reward_scale * (learner.q_scale[1] / learner.q_scale[0]).item()


def sliced_w1(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over 16 directions of the Wasserstein-1 distance between projections of two samples."""
    angles = torch.arange(16) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def distance_to_exact(samples: list[torch.Tensor], alpha: float, centers: list) -> float:
    """The largest sliced distance to exp(alpha Q) over STATES."""
    axis = torch.linspace(-1, 1, 201)
    grid, distances = torch.cartesian_prod(axis, axis), []
    for state, actions in zip(STATES, samples):
        density = (alpha * hills(state.expand(len(grid), 2), grid, centers)[0]).softmax(0)
        exact = grid[density.multinomial(len(actions), replacement=True, generator=generator(2))]
        distances.append(sliced_w1(actions, exact))
    return max(distances)


def test_learned_policy_is_the_boltzmann_density_of_one_hill():
    samples, alpha = learn_hills(FOUR[:1])
    assert distance_to_exact(samples, alpha, FOUR[:1]) < 0.02  # measured: 0.009


@pytest.mark.xfail(strict=True, reason="a known limit, see docs/score_target.md")
def test_learned_policy_has_four_modes_in_equal_shares():
    """Wanted, and not so: shares are 0.04 to 0.51 over four seeds, the distance about 0.17.

    The same network regressed onto the exact mean comes to 0.07: 0.06 is out of its reach.
    """
    samples, alpha = learn_hills(FOUR)
    for state, actions in zip(STATES, samples):
        x, y = turned_back(state.expand_as(actions), actions)
        for i, j in FOUR:
            assert 0.20 < ((x * i > 0) & (y * j > 0)).float().mean() < 0.30
    assert distance_to_exact(samples, alpha, FOUR) < 0.06


def test_reward_scale_does_not_change_the_policy():
    samples, alpha = learn_hills(FOUR, steps=200, n=2000)
    scaled, scaled_alpha = learn_hills(FOUR, reward_scale=10.0, steps=200, n=2000)
    assert scaled_alpha == pytest.approx(alpha, rel=1e-3)
    assert max(sliced_w1(x, y) for x, y in zip(samples, scaled)) < 0.01


# ------------------------------------------------------------------------------------------- speed


def test_adam_of_compiled_updates_is_that_of_torch():
    """Over 50 steps: gradients of many sizes, another learning rate in each, one left out."""
    nets = [torch.nn.Linear(3, 2)]
    nets.append(copy.deepcopy(nets[0]))
    lr = torch.tensor(1e-2)
    theirs = torch.optim.Adam(nets[1].parameters(), lr, fused=True)
    parameters = list(nets[0].parameters())
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.zeros(()) for _ in parameters]
    for seed in range(50):
        scale, skip = 10 ** (seed % 7 - 4), torch.tensor(float(seed == 7))
        grads = [scale * torch.randn(p.shape, generator=generator(seed)) for p in parameters]
        lr.fill_(1e-2 / (1 + seed))
        theirs.found_inf = skip
        for parameter, grad in zip(nets[1].parameters(), grads):
            parameter.grad = grad.clone()
        theirs.step()
        with torch.no_grad():
            constants = dict(beta1=0.9, beta2=0.999, eps=1e-8, lr=lr, found_inf=skip)
            torch._foreach_add_(steps, 1)
            fast.adam(parameters, grads, means, squares, [], steps, **constants)
            torch._foreach_sub_(steps, [skip] * 2)
        for x, y in zip(parameters, nets[1].parameters()):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_compiled_mish_is_mish():
    """And its derivative, against float64, over all of float32's range."""
    ends = torch.tensor([-3e38, -1e4, 1e4, 3e38])
    x = torch.cat([torch.linspace(-100, 100, 20_001), ends])
    x64 = x.double().requires_grad_()
    exact = F.mish(x64)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x64)
    torch.testing.assert_close(fast.mish(x).double(), exact, rtol=1e-6, atol=1e-12)
    grad = fast.mish_backward(torch.tensor(2.0), x).double()
    torch.testing.assert_close(grad, 2 * exact_grad, rtol=1e-5, atol=1e-6)


def no_compiler(graph, inputs, options):
    raise RuntimeError("Python.h: no such file")


@pytest.mark.parametrize("compiler", ["none", "broken", pytest.param("", marks=needs_compiler)])
def test_compiled_updates_and_actions_agree_with_eager(compiler, monkeypatch, capsys):
    """With NaN in one batch; as traced, also with two batch sizes in turns."""
    args = Args(hidden_dims=(16, 16), diffusion_steps=3, compile=True)
    schedule, batch_sizes, results = make_schedule("cosine", 3), [16, 16, 16], []
    if compiler:
        batch_sizes = [16, 16, 8, 16, 8]
        compile_with = no_compiler if compiler == "broken" else lambda graph, *_: graph
        monkeypatch.setattr(torch._inductor, "compile", compile_with)
    for make in (fast.accelerate, lambda function, args, device: function):
        torch.manual_seed(0)
        learner = make_learner(args, OBS, ACT, "cpu")
        update_once, act_once = (make(f, args, torch.device("cpu")) for f in (update, act))
        for seed, batch_size in enumerate(batch_sizes):
            batch = random_batch(batch_size, seed)
            if seed == 1:
                batch.rewards[0] = math.nan
            noise = draw_noise(3, batch_size, ACT, generator(seed))
            metrics = update_once(learner, batch, noise, schedule, args)
        assert learner.skipped == 1
        actions = act_once(learner, batch.obs, noise.next_actions, schedule, args)
        results.append([*everything_in(learner), actions, *metrics.values()])
    told = "not compiled: RuntimeError: Python.h" in capsys.readouterr().out
    assert told == (compiler == "broken")
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_updates_on_two_threads_give_the_same_bits_every_time(compiled):
    """At sizes that are worth threads. A scatter of gradients fails here."""
    args, schedule = Args(hidden_dims=(256, 256), diffusion_steps=5), make_schedule("cosine", 5)
    update_once = fast.compiled(update, on_cpu=True) if compiled else update
    learner, results, threads = make_learner(args, OBS, ACT, "cpu"), [], torch.get_num_threads()
    update(learner, random_batch(256), draw_noise(5, 256, ACT, generator()), schedule, args)
    tensors = fast.tensors_in(learner)
    before = [x.detach().clone() for x in tensors]
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            with torch.no_grad():
                torch._foreach_copy_(tensors, before)
            for seed in range(3):
                noise = draw_noise(5, 256, ACT, generator(seed))
                update_once(learner, random_batch(256, seed), noise, schedule, args)
            results.append(everything_in(learner))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(result, results[0]) for result in results[1:])


def test_update_and_acting_never_read_a_value():
    """On a GPU that would be a synchronisation. Fake tensors have no values: reading one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    args, schedule = Args(hidden_dims=(16, 16)), make_schedule("log-snr", 10)
    learner, noise = make_learner(args, OBS, ACT, "cpu"), draw_noise(10, 16, ACT, generator())
    inputs = random_batch(16), noise, schedule
    with FakeTensorMode() as mode:
        fake = {id(x): mode.from_tensor(x) for x in fast.tensors_in(learner)}
        learner = copy.deepcopy(learner, fake)
        batch, noise, schedule = (type(x)(*map(mode.from_tensor, x)) for x in inputs)
        update(learner, batch, noise, schedule, args)
        act(learner, batch.obs, noise.next_actions, schedule, args)
        with pytest.raises(RuntimeError):
            batch.obs.sum().item()


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_updates_agree_with_eager_and_draw_fresh_noise(compiled, capsys):
    flags, results = dict(hidden_dims=(16, 16), diffusion_steps=3), []
    schedule = make_schedule("cosine", 3, "cuda")
    batch = Batch(*(x.cuda() for x in random_batch(16)))
    for captured in (False, True):
        args = Args(**flags, compile=captured and compiled, cuda_graph=captured)
        update_once, act_once = (
            fast.accelerate(f, args, torch.device("cuda")) for f in (update, act)
        )
        torch.manual_seed(0)
        learner, rng = make_learner(args, OBS, ACT, "cuda"), torch.Generator("cuda").manual_seed(0)
        losses = []
        for _ in range(4):
            noise = draw_noise(3, 16, ACT, rng)
            metrics = update_once(learner, batch, noise, schedule, args)
            losses.append(metrics["losses/actor_loss"].item())
        assert len(set(losses)) == 4  # the same batch, another noise
        actions = act_once(learner, batch.obs, noise.next_actions, schedule, args)
        results.append([*everything_in(learner), actions])
    assert "not captured" not in capsys.readouterr().out
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compiling_without_a_compiler_is_refused(device, variable, monkeypatch):
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(UserError, match="--compile True needs no-such-compiler"):
        fast.accelerate(update, Args(compile=True), torch.device(device))
    args = Args(cuda_graph=False)  # 990,000 updates, which would be compiled
    assert fast.accelerate(update, args, torch.device(device)) is update


# ----------------------------------------------------------------------- environments and the loop


class Counter(gym.Env):
    """Observation (episode, step): even episodes terminate after 3 steps, odd truncate after 5.

    Episodes of copies are told apart by a start that depends on the seed. `fault(env)` is called in
    each step and may break it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-0.4, 0.4, (1,), np.float64)  # as in dm_control
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    episode, reward, factor, fault = None, 0.0, 1.0, staticmethod(lambda env: None)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        again = self.episode is None or seed is not None
        self.episode = 101 * seed if again else self.episode + 1
        self.t = 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        self.fault(self)
        odd = self.episode % 2 == 1
        ends = (not odd and self.t == 3, odd and self.t == 5)
        obs = np.array([self.episode, self.t], np.float64) * self.factor
        return obs, float(self.t) + self.reward, *ends, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class Square(Counter):
    action_space = gym.spaces.Box(-1, 1, (2, 2))


gym.register("Counter-v0", Counter)
gym.register("Square-v0", Square)
QUICK = dict(
    env_id="Counter-v0", hidden_dims=(8,), batch_size=4, buffer_size=1000, learning_starts=20,
    total_timesteps=60, eval_every=0, log_every=20, device="cpu", compile=False
)  # fmt: skip


@pytest.fixture
def buffers(monkeypatch):
    """The replay buffers that `qsm.main` makes."""
    made = []

    def make(*args):
        made.append(ReplayBuffer(*args))
        return made[-1]

    monkeypatch.setattr(qsm, "ReplayBuffer", make)
    return made


@pytest.fixture
def checkpointed(tmp_path, capsys):
    """The folder of a run that has ended."""
    run = qsm.main(Args(**QUICK, run_dir=tmp_path / "runs"))
    capsys.readouterr()
    return run


def run_of(path: Path) -> Path:
    (run,) = path.iterdir()
    return run


def error_line(capsys) -> str:
    """The one line on stderr, progress bars aside."""
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    (line,) = [line for line in lines if not re.search("step/s|s/step", line)]
    return line


def fails(capsys, args: Args, message: str, code: int = 1) -> None:
    """The run ends with this exit code and one line that matches `message`."""
    with pytest.raises(SystemExit, match=str(code)):
        qsm.main(args)
    assert re.search(message, error_line(capsys))


def weights(run: Path) -> list[torch.Tensor]:
    saved = torch.load(run / "model.pt", weights_only=True)
    return [*saved["score_net"].values(), *saved["critic"].values()]


def saved_step(run: Path) -> int:
    return runfiles.load_checkpoint(Args(resume=run))[1]["loop"][0]


def check_transitions(buffer: ReplayBuffer, size: int) -> None:
    """Every stored transition of Counter-v0 is one that an episode can hold."""
    assert buffer.size == size
    obs, actions, rewards, next_obs, terminations = (x[:size] for x in buffer.storage)
    assert torch.equal(next_obs[:, 0], obs[:, 0])  # the same episode
    assert torch.equal(next_obs[:, 1], obs[:, 1] + 1)  # one step later
    assert torch.equal(rewards, next_obs[:, 1])
    assert torch.equal(terminations, ((obs[:, 0] % 2 == 0) & (next_obs[:, 1] == 3)).float())
    truncated = (obs[:, 0] % 2 == 1) & (next_obs[:, 1] == 5)
    assert truncated.any()
    assert not terminations[truncated].any()
    assert 0.5 < actions.abs().max() <= 1  # stored in [-1, 1], not in the environment's +-0.4


@pytest.mark.parametrize("async_envs", [False, True])
def test_no_stored_transition_crosses_an_episode(async_envs, buffers, tmp_path):
    qsm.main(Args(**QUICK, num_envs=3, async_envs=async_envs, run_dir=tmp_path))
    check_transitions(buffers[0], 60)
    assert len(buffers[0].storage.obs[:60].unique(dim=0)) == 60  # nothing twice, nothing lost


def test_step_reports_episodes_and_what_each_step_led_to():
    envs = make_envs("Counter-v0", 2, asynchronous=False)
    envs.reset(seed=[0, 1])  # env 0 terminates after 3 steps, env 1 is truncated after 5
    results = [step(envs, np.zeros((2, 1), np.float32)) for _ in range(5)]
    rewards, next_obs, terminations, obs = (x.tolist() for x in results[2][:4])
    assert (rewards, terminations, next_obs) == ([3, 3], [1, 0], [[0, 3], [101, 3]])
    assert obs == [[1, 0], [101, 3]]  # the next episode, to act on
    assert [x[-1] for x in results] == [[], [], [(0, 6.0, 3)], [], [(1, 15.0, 5)]]
    envs.close()


@pytest.mark.parametrize(("env_id", "bound"), [("Humanoid-v4", 0.4), ("InvertedPendulum-v4", 3.0)])
def test_actions_are_rescaled_to_the_bounds_of_the_environment(env_id, bound):
    env = make_env(env_id)
    env.reset(seed=0)
    for action in (-1.0, 0.0, 1.0):
        env.step(np.full(env.action_space.shape, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.data.ctrl, action * bound, rtol=1e-6)
    env.close()


def test_workers_are_for_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert isinstance(make_envs("Counter-v0", 2), gym.vector.SyncVectorEnv)


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
    with pytest.raises(MemoryError, match=r"needs .* GiB.*--buffer-size"):
        ReplayBuffer(10**12, 376, 17)


@pytest.mark.parametrize("num_envs_utd", [(1, 1.0), (4, 0.25), (3, 0.1), (2, 2.5), (1, 0.29)])
def test_update_to_data_ratio_is_exact(num_envs_utd, monkeypatch, tmp_path):
    (num_envs, utd), counts = num_envs_utd, []
    monkeypatch.setattr(qsm, "update", lambda *args: counts.append(1) or {"q": torch.zeros(())})
    args = QUICK | {"total_timesteps": 120, "num_envs": num_envs, "utd": utd}
    qsm.main(Args(**args, run_dir=tmp_path))  # batches lag by one vector step
    assert len(counts) == math.floor(round((120 - num_envs - 20) * utd, 6))


def test_same_seed_same_run_and_evaluation_disturbs_nothing(tmp_path):
    evaluated = {"eval_every": 10, "eval_episodes": 2, "log_every": 7}
    made = [
        qsm.main(Args(**QUICK | {"env_id": "Pendulum-v1"} | changes, run_dir=tmp_path / str(i)))
        for i, changes in enumerate(({}, {"deterministic": True}, evaluated, {"seed": 2}))
    ]
    torch.use_deterministic_algorithms(False)
    assert [equal(weights(made[0]), weights(run)) for run in made[1:]] == [True, True, False]
    rows = list(csv.DictReader((made[2] / "evaluations.csv").open()))
    steps = [step for step in range(0, 61, 10) for _ in range(2)]
    assert [int(row["global_step"]) for row in rows] == steps
    assert all(int(row["length"]) == 200 for row in rows)


def test_evaluation_counts_one_episode_of_each_environment():
    envs = make_envs("Counter-v0", 3, asynchronous=False)
    args = Args(hidden_dims=(8,), seed=7)
    learner, schedule = make_learner(args, 2, 1, "cpu"), make_schedule("log-snr", 10)
    lengths = {0: (6.0, 3), 1: (15.0, 5)}  # of episodes 101 * (1,000,007 + i)
    expected = [lengths[1], lengths[0], lengths[1]]
    assert qsm.evaluate(learner, envs, schedule, args) == expected
    assert qsm.evaluate(learner, envs, schedule, args) == expected
    envs.close()


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


@pytest.mark.parametrize("candidates", [1, 4])
def test_evaluation_of_a_saved_policy_is_the_one_of_the_run(candidates, tmp_path, capsys):
    changes = {"env_id": "Pendulum-v1", "eval_every": 60, "eval_episodes": 3}
    run = qsm.main(Args(**QUICK | changes, candidates=candidates, run_dir=tmp_path))
    qsm.main(Args(evaluate=run, eval_episodes=3, candidates=candidates))
    evaluations = (run / "evaluations.csv").read_text().splitlines()
    assert (run / "evaluate.csv").read_text().splitlines() == [evaluations[0], *evaluations[-3:]]
    mean = np.mean([float(row["return"]) for row in csv.DictReader(evaluations)][-3:])
    protocol = f"(3 episodes, seed 1, best of {candidates}, no action noise)"
    printed = capsys.readouterr().out
    assert f"mean return {mean:.2f}" in printed
    assert protocol in printed


def scalars(run: Path) -> dict[str, list]:
    """(step, value) of every scalar in the event files, but for the speed."""
    events = EventAccumulator(str(run))
    events.Reload()
    names = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


class Crash(Exception):
    """Stands for a machine that dies right after a checkpoint was written."""


@pytest.fixture
def resumed(monkeypatch, tmp_path):
    """A function: a run that crashed after its first checkpoint and was resumed."""

    def make(changes: dict) -> Path:
        save = runfiles.RunFiles.save

        def save_and_crash(self, *args):
            save(self, *args)
            raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(runfiles.RunFiles, "save", save_and_crash)
            qsm.main(Args(**QUICK | changes, run_dir=tmp_path / "resumed"))
        run = run_of(tmp_path / "resumed")
        with (run / "episodes.csv").open("a") as file:
            file.write("92,0,1.0,9\n94,1,2.")  # written after the checkpoint, before the crash
        return qsm.main(Args(resume=run))

    return make


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4", "Humanoid-v4", "Pendulum-v1"])
def test_resumed_run_is_the_uninterrupted_run(env_id, async_envs, buffers, resumed, tmp_path):
    """Bit for bit, from the middle of episodes: networks, buffer, CSVs, event file."""
    changes = {"env_id": env_id, "num_envs": 2, "async_envs": async_envs, "total_timesteps": 160}
    changes |= {"log_every": 16, "eval_every": 80, "eval_episodes": 1, "checkpoint_every": 90}
    whole = qsm.main(Args(**QUICK | changes, utd=0.5, run_dir=tmp_path / "whole"))
    again = resumed(changes | {"utd": 0.5})
    assert equal(weights(whole), weights(again))
    assert equal([x[:160] for x in buffers[0].storage], [x[:160] for x in buffers[-1].storage])
    for name in ("episodes.csv", "evaluations.csv"):
        if (whole / name).exists() or (again / name).exists():
            assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert scalars(whole) == scalars(again)


def test_resumed_run_is_traced_like_the_uninterrupted_one(monkeypatch, resumed, tmp_path):
    """The compiled path without its compiler: what was restored must be found by the trace."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    changes = {"compile": True, "checkpoint_every": 40}
    whole = qsm.main(Args(**QUICK | changes, run_dir=tmp_path / "whole"))
    assert equal(weights(whole), weights(resumed(changes)))


@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_run_with_the_default_path_is_resumed(deterministic, resumed, tmp_path, capsys):
    """Compiled and captured, from the loop; with --deterministic bit for bit."""
    changes = {"device": "cuda", "compile": True, "deterministic": deterministic}
    changes |= {"checkpoint_every": 40}
    try:
        whole = qsm.main(Args(**QUICK | changes, run_dir=tmp_path / "whole"))
        again = resumed(changes)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = {"rtol": 0, "atol": 0} if deterministic else {}
    for x, y in zip(weights(whole), weights(again)):
        torch.testing.assert_close(x, y, **exact)
    assert "not captured" not in capsys.readouterr().out


def test_checkpoint_of_another_device_and_version_is_resumed_and_told(
    checkpointed, monkeypatch, capsys
):
    """Generator states are the only part of a checkpoint that a CPU cannot take from CUDA."""
    args, saved = runfiles.load_checkpoint(Args(resume=checkpointed))
    assert saved["args"]["cuda_graph"] is None  # as given, not as this machine has it
    saved["rng"] = "cuda", saved["rng"][1][:16]
    monkeypatch.setattr(runfiles, "load_checkpoint", lambda _: (args, saved))
    monkeypatch.setattr(runfiles, "versions", lambda: {"python": "4.0"})
    qsm.main(Args(resume=checkpointed, gamma=0.5))
    assert re.search(r"flags are ignored.*not bit for bit.*cuda.*4\.0", capsys.readouterr().out, 16)


def test_resume_without_simulators_starts_new_episodes(buffers, monkeypatch, resumed):
    """One that cannot be pickled: another run, but no transition is wrong or there twice."""
    monkeypatch.setattr(
        Counter, "fault", staticmethod(lambda env: setattr(env, "handle", lambda: None))
    )
    resumed({"checkpoint_every": 31})
    check_transitions(buffers[-1], 60)
    assert len(buffers[-1].storage.obs[:60].unique(dim=0)) == 60


def train_in_a_process(run: Path) -> None:
    torch.set_num_threads(1)  # as in the test: sums have another order with two
    qsm.main(Args(resume=run))


def test_run_killed_at_50_random_moments_is_the_uninterrupted_run(
    buffers, monkeypatch, tmp_path, request
):
    """A run that writes a checkpoint in every step is killed 50 times, and resumed each time."""
    stop_at = [30]

    class StopAt:
        """A StopRequest for when so many transitions are stored."""

        close = staticmethod(lambda: None)
        __call__ = lambda self: 15 * (buffers[-1].size >= stop_at[0])  # noqa: E731

    monkeypatch.setattr(qsm, "StopRequest", StopAt)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    changes = {"env_id": "Pendulum-v1", "total_timesteps": 100_000, "checkpoint_every": 1}
    args = Args(**QUICK | changes, run_dir=tmp_path / "killed")
    with pytest.raises(SystemExit, match="143"):
        qsm.main(args)
    killed, steps = run_of(args.run_dir), [30]
    moments, processes = np.random.default_rng(0), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_qsm", "torch._dynamo"])  # imported once
    for _ in range(50):
        process = processes.Process(target=train_in_a_process, args=(killed,))
        process.start()
        before = (killed / "checkpoint.npz").stat().st_mtime_ns
        while (killed / "checkpoint.npz").stat().st_mtime_ns == before:  # until its first one
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        steps.append(saved_step(killed))
    assert steps == sorted(set(steps))  # each got further
    time.sleep(1)  # event files are read in the order of their names: by second
    stop_at[0] = steps[-1] + 5
    with pytest.raises(SystemExit, match="143"):
        qsm.main(Args(resume=killed))
    args.run_dir = tmp_path / "whole"
    with pytest.raises(SystemExit, match="143"):
        qsm.main(args)
    whole = run_of(args.run_dir)
    assert equal(weights(whole), weights(killed))
    assert (whole / "episodes.csv").read_bytes() == (killed / "episodes.csv").read_bytes()
    assert scalars(whole) == scalars(killed)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_checkpoint_and_end_the_run(signum, tmp_path):
    """The worker processes get them too, as from a terminal or a scheduler."""
    flags = "--env-id Pendulum-v1 --num-envs 2 --async-envs True --hidden-dims 8 --compile False"
    flags += f" --learning-starts 50 --eval-every 0 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "qsm.py"), *flags.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(len(x.read_text().splitlines()) > 1 for x in tmp_path.glob("*/episodes.csv")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, stderr
    run = run_of(tmp_path)
    assert f"--resume {run}" in stderr.splitlines()[-1]
    assert runfiles.load_checkpoint(Args(resume=run))[1]["envs"][0]
    rows = list(csv.DictReader((run / "episodes.csv").open()))
    assert saved_step(run) >= int(rows[-1]["global_step"]) >= 200


def test_signal_breaks_off_an_evaluation_which_a_resumed_run_makes_again(monkeypatch, tmp_path):
    steps = []

    def endless(env):
        env.t = min(env.t, 2)
        steps.append(1)
        if len(steps) == 100:
            signal.raise_signal(signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    changes = QUICK | {"eval_every": 60, "eval_episodes": 2}
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(Counter, "fault", staticmethod(endless))
        qsm.main(Args(**changes, run_dir=tmp_path / "stopped"))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    stopped = run_of(tmp_path / "stopped")
    whole = qsm.main(Args(**changes, run_dir=tmp_path / "whole"))
    qsm.main(Args(resume=stopped))
    assert (stopped / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
@pytest.mark.parametrize("where", ["reward", "factor"])
def test_non_finite_transitions_stop_the_run(value, where, monkeypatch, tmp_path, buffers, capsys):
    """1e39 is infinite in float32. Also in the final observation of an episode. Then resumed."""

    def diverge(env):
        if env.episode >= 202 + 8 and env.t == 3:  # env 1 of 2, at the end of its ninth episode
            setattr(env, where, value)

    args = Args(**QUICK | {"total_timesteps": 120}, num_envs=2, run_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Counter, "fault", staticmethod(diverge))
        fails(capsys, args, "environment 1 diverged.*--resume")
    stored = buffers[0].size
    assert stored >= 60
    check_transitions(buffers[0], stored)
    qsm.main(Args(resume=run_of(tmp_path)))
    check_transitions(buffers[1], 120)


@pytest.mark.parametrize("async_envs", [False, True])
def test_failing_environment_saves_first(async_envs, buffers, monkeypatch, tmp_path, capsys):
    def fail(env):
        if env.t == 4:
            raise RuntimeError("the joints broke")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(Counter, "fault", staticmethod(fail))
        qsm.main(Args(**QUICK, num_envs=2, async_envs=async_envs, run_dir=tmp_path))
    assert "RuntimeError: the joints broke" in capsys.readouterr().err
    qsm.main(Args(resume=run_of(tmp_path)))
    check_transitions(buffers[1], 60)


def test_killed_worker_is_told_and_the_run_saved(monkeypatch, tmp_path, buffers, capsys):
    real_update, count = qsm.update, []

    def kill(*args):
        count.append(1)
        if len(count) == 15:
            os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        return real_update(*args)

    monkeypatch.setattr(qsm, "update", kill)
    args = Args(**QUICK, num_envs=3, async_envs=True, run_dir=tmp_path)
    fails(capsys, args, "an environment failed or was killed.*--resume")
    assert not multiprocessing.active_children()
    qsm.main(Args(resume=run_of(tmp_path)))
    check_transitions(buffers[1], 60)


def test_failing_evaluation_does_not_end_the_training(monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise UserError("the camera broke")

    monkeypatch.setattr(qsm, "evaluate", fail)
    run = qsm.main(Args(**QUICK | {"eval_every": 30}, run_dir=tmp_path))
    assert "step 30: no evaluation, the camera broke" in capsys.readouterr().out
    assert saved_step(run) == 60


@pytest.mark.parametrize(("what", "message"), [("loss", "a loss is"), ("weights", "actions are")])
def test_nan_stops_the_run_and_is_not_saved(what, message, monkeypatch, tmp_path, capsys):
    real_update, count = qsm.update, []

    def poisoned(learner, batch, *rest):
        count.append(1)
        if what == "loss" and len(count) == 5:
            batch = batch._replace(rewards=batch.rewards * math.nan)
        metrics = real_update(learner, batch, *rest)
        if what == "weights" and len(count) == 25:  # right after the checkpoint at step 40
            next(learner.score_net.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(qsm, "update", poisoned)
    args = Args(**QUICK, checkpoint_every=40, run_dir=tmp_path)
    fails(capsys, args, f"{message} not finite: try a lower")
    run = run_of(tmp_path)
    assert saved_step(run) == 40
    assert all(x.isfinite().all() for x in weights(run))


def test_full_disk_keeps_the_older_checkpoint_and_trains_on(monkeypatch, tmp_path, capsys):
    """From the first checkpoint on, no file may grow larger than that one."""
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), runfiles.RunFiles.save

    def save_and_limit(self, *args):
        saved = save(self, *args)
        most = (self.path / "checkpoint.npz").stat().st_size + 500
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        return saved

    monkeypatch.setattr(runfiles.RunFiles, "save", save_and_limit)
    try:
        changes = {"env_id": "Ant-v4", "checkpoint_every": 20}
        with pytest.raises(SystemExit, match="1"):
            qsm.main(Args(**QUICK | changes, run_dir=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run, printed = run_of(tmp_path), capsys.readouterr()
    assert re.search("nothing saved at step 40: .*too large", printed.out)
    assert "step 60 could not be saved" in printed.err
    assert saved_step(run) == 20
    assert not list(run.glob("*.tmp"))


def test_full_disk_while_logging_stops_with_one_line(monkeypatch, tmp_path, capsys):
    def full(self, global_step, *episode):
        if global_step > 40:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(runfiles.RunFiles, "log_episode", full)
    fails(capsys, Args(**QUICK, checkpoint_every=20, run_dir=tmp_path), "No space left on device")
    assert saved_step(run_of(tmp_path)) == 40


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("obs.npy").header_offset + 300] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "foreign": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "missing": lambda path: path.unlink(),
}


FILES = [(damage, name) for damage in DAMAGES for name in ("checkpoint.npz", "model.pt")]
FILES.remove(("flipped", "model.pt"))  # torch compares no checksum


@pytest.mark.parametrize(("damage", "name"), FILES)
def test_unusable_files_get_one_line(damage, name, checkpointed, capsys):
    path = checkpointed / name
    DAMAGES[damage](path)
    content = path.read_bytes() if path.exists() else None
    key = "resume" if name == "checkpoint.npz" else "evaluate"
    fails(capsys, Args(**{key: checkpointed}), f"{name} is")
    assert content == (path.read_bytes() if path.exists() else None)


@pytest.mark.parametrize(
    "change", [("hidden_dims", (9,)), ("env_id", "Pendulum-v1"), ("num_envs", 2), ("new_flag", 1)]
)
def test_checkpoint_of_other_sizes_gets_one_line(change, checkpointed, monkeypatch, capsys):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **flags: changed(load(*args, **flags)))

    def changed(saved: dict) -> dict:
        saved["args"] |= [change]
        return saved

    fails(capsys, Args(resume=checkpointed), "not of this qsm.py")


def test_folder_in_use_by_another_process_is_left_alone(checkpointed, capsys):
    content = {path: path.read_bytes() for path in checkpointed.iterdir()}
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", str(checkpointed / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        fails(capsys, Args(resume=checkpointed), "in use by another process")
        other.communicate(b"\n")
    assert content == {path: path.read_bytes() for path in checkpointed.iterdir()}
    qsm.main(Args(resume=checkpointed))


def test_two_runs_of_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("time.time", lambda: 1_790_000_000.5)
    names = [qsm.main(Args(**QUICK, run_dir=tmp_path)).name for _ in range(2)]
    assert names == [f"Counter-v0__qsm__1__1790000000{suffix}" for suffix in ("", "-1")]


def test_model_that_names_code_is_not_evaluated_unless_asked(
    checkpointed, monkeypatch, tmp_path, capsys
):
    (tmp_path / "stranger.py").write_text("raise SystemExit('the code of a stranger has run')")
    monkeypatch.syspath_prepend(tmp_path)
    model = torch.load(checkpointed / "model.pt", weights_only=True)
    model["args"]["env_id"] = "stranger:Toy-v0"
    torch.save(model, checkpointed / "model.pt")
    fails(capsys, Args(evaluate=checkpointed), "--env-id stranger:Toy-v0")
    with pytest.raises(SystemExit, match="stranger has run"):
        qsm.main(Args(evaluate=checkpointed, env_id="stranger:Toy-v0"))


@pytest.mark.parametrize("package", ["moviepy", "wandb", "shimmy"])
def test_missing_packages_get_one_line(package, checkpointed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    new = QUICK | {"run_dir": checkpointed.parent / "new"}
    changes = {
        "moviepy": {"evaluate": checkpointed, "capture_video": True},
        "wandb": new | {"track": True},
        "shimmy": new | {"env_id": "dm_control/walker-walk-v0"},
    }
    fails(capsys, Args(**changes[package]), "pip install")
    assert not (checkpointed.parent / "new").exists()


def test_tracking_mirrors_the_event_file_under_the_name_of_the_run(monkeypatch, tmp_path):
    calls = []
    wandb = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = qsm.main(Args(**QUICK, track=True, run_dir=tmp_path))
    qsm.main(Args(resume=run))
    assert [(x["id"], x["resume"], x["sync_tensorboard"]) for x in calls] == [
        (run.name, "allow", True)
    ] * 2


def test_video_of_the_first_episode(checkpointed):
    pytest.importorskip("moviepy", reason="an mp4 needs moviepy, which is optional")
    qsm.main(Args(evaluate=checkpointed, eval_episodes=2, capture_video=True))
    video = run_of(checkpointed / "videos")
    assert video.name == "step-60-seed-1-episode-0.mp4"
    assert video.stat().st_size > 500


def test_environment_of_a_module(monkeypatch, tmp_path):
    """--env-id module:id, as gym.make takes it; the folder's name suits every file system."""
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    text = f"import gymnasium\ngymnasium.register('Toy-v0', '{entry_point}', max_episode_steps=10)"
    (tmp_path / "toy_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    run = qsm.main(Args(**QUICK | {"env_id": "toy_module:Toy-v0"}, run_dir=tmp_path / "runs"))
    assert run.name.startswith("toy_module-Toy-v0__qsm__1__")
    assert len(list(csv.DictReader((run / "episodes.csv").open()))) == 6


IMPOSSIBLE = [("gamma", 1.5), ("gamma", math.nan), ("total_timesteps", 0), ("num_envs", -1)]
IMPOSSIBLE += [("utd", 0.0), ("hidden_dims", ()), ("alpha", -1.0), ("buffer_size", 0)]
IMPOSSIBLE += [("learning_starts", -5), ("device", "tpu"), ("device", "cuda:99")]
IMPOSSIBLE += [("cuda_graph", True), ("run_dir", "/dev/null/x")]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused(name, value, tmp_path, capsys):
    args = Args(**QUICK | {"run_dir": tmp_path / "runs"} | {name: value})
    args.run_dir = Path(args.run_dir)
    message = "/dev/null" if name == "run_dir" else "--" + name.replace("_", "-")
    fails(capsys, args, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", "1-D Box"),
        ("Square-v0", "1-D Box"),
        ("NoSuchEnv-v0", "NoSuchEnv"),
        ("Pusher-v4", "mujoco"),
    ],
)
def test_impossible_environments_get_one_line(env_id, message, capsys):
    fails(capsys, Args(**QUICK | {"env_id": env_id}), message)


def test_networks_larger_than_the_memory_get_one_line(capsys):
    fails(capsys, Args(**QUICK | {"hidden_dims": (10**7, 10**7)}), "can't allocate memory")


def test_every_argument_is_read():
    source = "".join((ROOT / name).read_text() for name in ("qsm.py", "runfiles.py", "fast.py"))
    for field in fields(Args):
        named = field.name in " ".join(runfiles.RANGES).split() or field.name in qsm.PRESETS
        assert named or re.search(rf"\bargs\.{field.name}\b", source), field.name


def test_command_line_trains_and_refuses(tmp_path):
    command = [sys.executable, str(ROOT / "qsm.py"), "--env-id", "Hopper-v4", "--num-envs", "2"]
    flags = "--total-timesteps 400 --learning-starts 200 --utd 0.5 --hidden-dims 32 32 --device cpu"
    flags += f" --eval-every 200 --eval-episodes 2 --log-every 100 --run-dir {tmp_path}"
    options = dict(capture_output=True, text=True, timeout=170)
    result = subprocess.run([*command, *flags.split()], **options)
    assert result.returncode == 0, result.stderr
    run = run_of(tmp_path)
    steps = [int(row["global_step"]) for row in csv.DictReader((run / "evaluations.csv").open())]
    assert steps == [0, 0, 200, 200, 400, 400]
    assert list(run.glob("events.out.tfevents.*"))
    result = subprocess.run([*command, "--gamma", "2"], **options)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_line_numbers_of_the_paper_map_are_right():
    spec = importlib.util.spec_from_file_location("paper_map", ROOT / "docs/paper_map.py")
    paper_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper_map)
    page = paper_map.PAGE.read_text()
    assert page.count("#L") > 30
    assert page == paper_map.with_line_numbers(page), "run python docs/paper_map.py"


def test_readme_snippets_work(tmp_path, monkeypatch):
    args = Args(hidden_dims=(8, 8))
    model = {"score_net": make_learner(args, 376, 17, "cpu").score_net.state_dict()}
    torch.save(model | {"args": vars(args) | {"run_dir": "runs"}}, tmp_path / "model.pt")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        variables = {}
        exec(snippet, variables)
        assert variables["actions"].abs().max() <= 1
    assert snippets
