"""Tests of the mathematics against closed forms, and of the loop's accounting. CPU only, no network, three minutes.

What was broken on purpose, one thing at a time, and what a user then sees. Every line is a test below, but for those
marked with *, which were tried by hand. "Kept" means that the checkpoint and model on the disk can be resumed from.

| broken | what happens | exit code |
|---|---|---|
| NaN, infinite or float32-overflowing reward or observation | not stored; names environment and step; saved first | 1 |
| NaN in a loss | that step of the optimizer is left out; at the next log line, saved first | 1 |
| policy with NaN weights | not saved over the last good state, no action taken; kept | 1 |
| worker process of an environment killed | names the environment; saved first | 1 |
| process killed (SIGKILL) at 50 random moments | kept, and the resumed run is the uninterrupted one, bit for bit | - |
| SIGTERM, Ctrl-C, also in the middle of a step | ends its step, saves | 143, 130 |
| Ctrl-C in --evaluate | one line | 130 |
| full disk while saving | one line, older files kept, training goes on | - |
| full disk while logging | kept | 1 |
| run folder in use by another process, or cannot be written to | one line, nothing touched | 1 |
| checkpoint or model truncated, one bit flipped, empty, foreign, missing, of other sizes | untouched | 2 |
| environment that raises an error | names it; saved first | 1 |
| the same in an evaluation | named; training goes on | - |
| model that names code to import | refused | 2 |
| GPU (simulated) or CPU out of memory | what to lower; kept | 1 |
| replay buffer larger than the memory | sizes, what to lower, before training | 1 |
| unknown or discrete environment, impossible or unknown flag, no such device | one line | 1 |
| wandb, moviepy, shimmy missing | what to install | 1, 2 |
| no W&B key *, no OpenGL library for MUJOCO_GL=osmesa, glfw without a screen * | one line | 1, 2 |
"""

import copy
import csv
import ctypes
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
import runs
from buffer import Batch, ReplayBuffer
from envs import finished_episodes, make_env, make_envs, true_next_obs
from networks import Critic, ScoreNet
from qsm import (
    Args,
    Learner,
    Noise,
    actor_lr_at,
    draw_noise,
    make_learner,
    make_optimizer,
    make_schedule,
    posterior_mean,
    q_gradient,
    sample_actions,
    update,
)
from runs import load_checkpoint

ROOT = Path(__file__).parent
OBS, ACT, B = 3, 2, 5  # sizes of observation, action and batch where nothing else is said


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(batch_size: int = B, seed: int = 0) -> Batch:
    g = generator(seed)
    obs, next_obs = torch.randn(2, batch_size, OBS, generator=g)
    rewards = torch.randn(batch_size, generator=g)
    actions = torch.rand(batch_size, ACT, generator=g) * 2 - 1
    return Batch(obs, actions, rewards, next_obs, (torch.rand(batch_size, generator=g) < 0.3).float())


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


def learner_of(score_net, critic, critic_target=None, lr: float = 0.0) -> Learner:
    """A learner around networks that are given; with a learning rate of 0 they stay."""
    optimizers = make_optimizer(score_net, lr), make_optimizer(critic, 0.0)
    dtype = next(score_net.parameters()).dtype
    target = critic_target or copy.deepcopy(critic).requires_grad_(False)
    return Learner(score_net, critic, target, *optimizers, torch.zeros(2, dtype=dtype), torch.zeros(()))


class OracleScore:
    """Stands in for ScoreNet: its prediction given in closed form by `predict(a_t, t)`."""

    def __init__(self, predict, T):
        self.predict, self.T = predict, T

    def time_features(self):
        return torch.arange(self.T, dtype=torch.float32)[:, None]

    def obs_features(self, obs):
        return torch.zeros(len(obs), 1)

    def denoise(self, features, actions):
        return self.predict(actions, int(features[0, 0]))


# ------------------------------------------------------------------------------------------------------- networks


def test_score_net_equals_the_concatenated_network():
    """The first layer in three pieces is the same function as one layer over [action; observation; time embedding]."""
    T = 7
    net = ScoreNet(OBS, ACT, (32, 24), T).double()
    torch.nn.init.normal_(net.first_bias)
    batch, t = random_batch(), torch.tensor([0, 6, 3, 3, 1])
    obs, actions = batch.obs.double(), batch.actions.double()

    angles = 2 * math.pi * t[:, None].double() * net.frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], -1)
    embedding = net.time_mlp[1](F.mish(net.time_mlp[0](embedding)))
    weight = torch.cat([net.act_weight, net.obs_weight, net.time_weight], 1)
    x = F.mish(F.linear(torch.cat([actions, obs, embedding], 1), weight, net.first_bias))
    expected = net.out(F.mish(net.hidden[0](x)))
    torch.testing.assert_close(net(obs, actions, t), expected)


def test_critic_equals_two_separate_networks():
    critic = Critic(OBS, ACT, (16, 8))
    for bias in [critic.first_bias, *critic.biases]:
        torch.nn.init.normal_(bias)
    batch = random_batch()
    for i, q in enumerate(critic(batch.obs, batch.actions)):
        weight = torch.cat([critic.obs_weight[i], critic.act_weight[i]])
        x = torch.cat([batch.obs, batch.actions], 1) @ weight + critic.first_bias[i]
        for w, b in zip(critic.weights, critic.biases, strict=True):
            x = x.relu() @ w[i] + b[i]
        torch.testing.assert_close(q, x[:, 0])


def test_initialisation_is_xavier_uniform_over_the_concatenated_input():
    torch.manual_seed(0)
    net, critic = ScoreNet(300, 20, (256, 256)), Critic(300, 20, (256, 256))
    for weights, fan_in in (
        ((net.act_weight, net.obs_weight, net.time_weight), 300 + 20 + 128),
        ((critic.obs_weight, critic.act_weight), 300 + 20),
    ):
        bound = (6 / (fan_in + 256)) ** 0.5
        for weight in weights:
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert net.frequencies.shape == (32,)
    assert all(not b.any() for b in [net.first_bias, net.out.bias, critic.first_bias, *critic.biases])


# ------------------------------------------------------------------------------------------------ schedule, sampler


@pytest.mark.parametrize("T", [1, 5, 20])
def test_schedules_match_their_definitions(T):
    for name in ("log-snr", "vp", "cosine", "linear"):
        betas, alphas, alphas_cumprod, *_ = make_schedule(name, T)
        product = 1.0
        for t in range(T):
            product *= 1 - betas[t].item()
            assert alphas[t].item() == pytest.approx(1 - betas[t].item(), abs=1e-7)
            assert alphas_cumprod[t].item() == pytest.approx(product, rel=1e-4)
    # The exponents of the vp schedule sum to -b_min - (b_max - b_min) / 2, whatever T is.
    assert make_schedule("vp", T).alphas_cumprod[-1].item() == pytest.approx(math.exp(-5.05), rel=1e-4)
    f = [math.cos(math.pi / 2 * (t / T + 0.008) / 1.008) ** 2 for t in range(T + 1)]
    for t in range(T - 1):  # the last beta is cut to 0.999
        assert make_schedule("cosine", T).alphas_cumprod[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-4)
    assert make_schedule("cosine", T).betas[-1].item() == pytest.approx(0.999)
    linear = make_schedule("linear", T).betas
    assert linear[0].item() == pytest.approx(1e-4)
    assert T == 1 or linear[-1].item() == pytest.approx(2e-2)


def test_log_snr_schedule_is_equally_spaced_between_its_ends():
    sigma = (1 - make_schedule("log-snr", 10).alphas_cumprod.double()).sqrt()
    assert sigma[[0, -1]].tolist() == pytest.approx([0.1, 0.995], rel=1e-4)
    gaps = ((1 - sigma**2) / sigma**2).log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-3, atol=0)
    assert make_schedule("log-snr", 1).alphas_cumprod.item() == pytest.approx(1 - 0.995**2, rel=1e-4)


def test_vp_schedule_as_in_the_released_code():
    sigma = (1 - make_schedule("vp", 5).alphas_cumprod).sqrt()
    torch.testing.assert_close(sigma, torch.tensor([0.443, 0.752, 0.917, 0.980, 0.997]), atol=5e-4, rtol=0)


def test_sampler_with_a_linear_score_has_the_closed_form_mean_and_variance():
    """With eps = g_t (a - m) each step is linear in a and z: mean and variance follow a two-line recursion."""
    schedule, g, m = make_schedule("vp", 5), [0.9, 0.7, 1.1, 0.5, 0.8], 0.3
    n, scale = 200_000, 0.02  # noise this small never meets the clamp, so that the recursion is exact
    noise = scale * torch.randn(6, n, 1, generator=generator())
    score = OracleScore(lambda a, t: g[t] * (a - m), 5)
    samples = sample_actions(score, torch.zeros(n, OBS), noise, schedule, "released").double()
    mean, var = 0.0, scale**2
    for t in reversed(range(5)):
        beta, alpha, alpha_bar = (x[t].item() for x in schedule[:3])
        k = beta / math.sqrt(1 - alpha_bar) * g[t]
        mean = ((1 - k) * mean + k * m) / math.sqrt(alpha)
        var = (1 - k) ** 2 * var / alpha + (beta * scale**2 if t > 0 else 0)
    assert abs(mean) < 0.9
    assert samples.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
    assert samples.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("score_target", ["released", "posterior"])
def test_sampler_recovers_a_gaussian_from_its_exact_score(score_target):
    """eps or E[a_0 | a_t] of N(0.2, 0.1^2) diffused to level t; 100 steps leave a bias far below the tolerances."""
    T, mean, std = 100, 0.2, 0.1
    schedule = make_schedule("cosine", T)

    def predict(a, t):
        alpha_bar = schedule.alphas_cumprod[t]
        residual = (a - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)
        if score_target == "posterior":
            return mean + alpha_bar.sqrt() * std**2 * residual
        return (1 - alpha_bar).sqrt() * residual

    noise = torch.randn(T + 1, 20_000, 1, generator=generator())
    samples = sample_actions(OracleScore(predict, T), torch.zeros(20_000, OBS), noise, schedule, score_target)
    assert samples.mean().item() == pytest.approx(mean, abs=0.005)
    assert samples.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("score_target", ["released", "posterior"])
def test_samples_stay_in_bounds_and_use_all_the_noise(score_target):
    T = 5
    net, schedule = ScoreNet(OBS, ACT, (16,), T), make_schedule("vp", T)
    noise = torch.randn(T + 1, B, ACT, generator=generator())
    obs = random_batch().obs
    actions = sample_actions(net, obs, noise, schedule, score_target, action_noise=0.1)
    assert actions.shape == (B, ACT)
    assert actions.abs().max() <= 1
    contraction, tame = OracleScore(lambda a, t: 0.5 * a, T), 0.05 * noise  # away from the bounds every noise shows
    actions = sample_actions(contraction, obs, tame, schedule, score_target, action_noise=0.1)
    for k in range(T + 1):
        changed = tame.clone()
        changed[k] += 0.01
        sampled = sample_actions(contraction, obs, changed, schedule, score_target, action_noise=0.1)
        assert not torch.equal(sampled, actions)


# ------------------------------------------------------------------------------------------------ targets, losses


def test_q_gradient_of_a_quadratic():
    critic, batch = QuadraticCritic(), random_batch()
    torch.testing.assert_close(q_gradient(critic, batch.obs, batch.actions), critic.gradient(batch.obs, batch.actions))


def test_td_target_and_critic_loss_by_hand():
    """y = r + gamma min(Q'_1, Q'_2) without, r with a termination; sum over critics of mean (Q_i - y)^2."""
    batch = random_batch(3)._replace(
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        next_obs=torch.tensor([[10.0, 0, 0], [20.0, 0, 0], [-7.0, 0, 0]]),
        terminations=torch.tensor([0.0, 1.0, 0.0]),  # a truncation is stored as not terminated
    )
    args, seen = Args(gamma=0.9, diffusion_steps=4), []
    net, schedule, noise = ScoreNet(OBS, ACT, (8,), 4), make_schedule("cosine", 4), draw_noise(4, 3, ACT, generator())

    def critic_target(obs, actions):
        seen.append(actions)
        return torch.stack([obs[:, 0], 2 * obs[:, 0]])  # the minimum is Q_1 where positive, Q_2 where negative

    critic = Fixed(lambda obs, actions: torch.stack([actions.sum(1) * 0, actions.sum(1) * 0 + 1]))
    metrics = update(learner_of(net, critic, Fixed(critic_target)), batch, noise, schedule, args)
    y = torch.tensor([1 + 0.9 * 10, 2, 3 + 0.9 * -14])
    expected = y.square().mean() + (1 - y).square().mean()
    assert metrics["losses/critic_loss"].item() == pytest.approx(expected.item())
    assert metrics["losses/q_values"].item() == 0.5
    sampled = sample_actions(net, batch.next_obs, noise.next_actions, schedule, args.score_target, args.action_noise)
    torch.testing.assert_close(seen[0], sampled)


def exact_posterior_mean(drift, u, s) -> torch.Tensor:
    """Mean of exp(drift a - (a - u)^2 / 2 s^2) on [-1, 1] for float64 vectors, by the trapezoid rule, 20,001 points."""
    a = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    logits = drift[:, None] * a - (a - u[:, None]) ** 2 / (2 * s[:, None] ** 2)
    logits[:, [0, -1]] -= math.log(2)
    return logits.softmax(1) @ a


def test_posterior_mean_against_quadrature():
    """For s from 1e-2 to 1e3 and drifts from -1e3 to 1e3, in float32; measured: 3e-5 where s is in the schedule."""
    drift = torch.cat([-(10.0 ** torch.arange(-2, 4)), torch.zeros(1), 10.0 ** torch.arange(-2, 4)])
    for s in 10.0 ** torch.arange(-2, 3.5, 0.5):
        for u in (-3.0, -1.0, -0.3, 0.0, 0.77, 1.5):
            alphas_cumprod = (1 / (1 + s**2)).expand(len(drift), 1)
            schedule = make_schedule("linear" if s < 0.1 else "log-snr", 10)  # the linear one begins at s = 0.01
            noisy = (u * alphas_cumprod.sqrt()).expand(-1, 1)
            mean = posterior_mean(drift[:, None], noisy, alphas_cumprod, schedule)[:, 0]
            exact = exact_posterior_mean(drift.double(), torch.full((len(drift),), u).double(), s.double().expand(13))
            assert (mean - exact).abs().max() < 1e-3, (s, u)


def test_posterior_mean_of_extremes_is_finite():
    schedule = make_schedule("cosine", 5)
    drift = torch.tensor([[1e30], [-1e30], [0.0]])
    mean = posterior_mean(drift, torch.zeros(3, 1), schedule.alphas_cumprod[[4, 0, 4], None], schedule)
    assert mean[:, 0].tolist() == pytest.approx([1, -1, 0], abs=1e-3)


@pytest.mark.parametrize("score_target", ["released", "posterior"])
def test_actor_loss_is_zero_at_its_target(score_target):
    """posterior: the network says 0.3; for a quadratic Q the target is then known, with the gradient at 0.3."""
    args = Args(score_target=score_target, alpha=0.7, normalize_q_grad=False)
    schedule, critic, batch = make_schedule("vp", 5), QuadraticCritic(), random_batch(64)
    noise = draw_noise(5, 64, ACT, generator())

    def score_net(obs, noisy_actions, t):
        alphas_cumprod = schedule.alphas_cumprod[t][:, None]
        sigma = (1 - alphas_cumprod).sqrt()
        expected_noisy = alphas_cumprod.sqrt() * batch.actions + sigma * noise.actions
        torch.testing.assert_close(noisy_actions, expected_noisy)
        if score_target == "released":
            return -0.7 * critic.gradient(obs, noisy_actions)
        drift = 0.7 * critic.gradient(obs, torch.tensor(0.3)).double()
        u, s = noisy_actions / alphas_cumprod.sqrt(), (sigma / alphas_cumprod.sqrt()).expand(-1, ACT)
        return exact_posterior_mean(drift.flatten(), u.double().flatten(), s.double().flatten()).view(64, ACT).float()

    def loss(predict) -> dict:
        return update(learner_of(FixedScore(predict), Fixed(critic)), batch, noise, schedule, args)

    if score_target == "released":
        metrics = loss(score_net)
        assert metrics["losses/actor_loss"].item() == pytest.approx(0, abs=1e-10)
        assert metrics["diffusion/cosine"].item() == pytest.approx(1, abs=1e-5)
    else:
        noisy = (x := schedule.alphas_cumprod[noise.t, None]).sqrt() * batch.actions + (1 - x).sqrt() * noise.actions
        expected = (0.3 - score_net(batch.obs, noisy, noise.t)).square().mean()
        actual = loss(lambda *_: torch.full((64, ACT), 0.3))["losses/actor_loss"]
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_posterior_asks_for_the_gradient_inside_the_box_only():
    """A critic that raises outside of it, whatever the network predicts; the noised actions are outside."""
    schedule, batch, noise = make_schedule("log-snr", 10), random_batch(64), draw_noise(10, 64, ACT, generator())
    asked = []

    class Boxed(torch.autograd.Function):
        @staticmethod
        def forward(actions):
            asked.append(actions.abs().max().item())
            return actions.clone()

        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(lambda ctx, grad: grad)

    def critic(obs, actions):
        return Boxed.apply(actions).square().sum(-1).expand(2, -1)

    for target, prediction, most in (("posterior", -5.0, 1), ("posterior", 0.3, 0.3), ("released", 0.3, None)):
        net, q = FixedScore(lambda *_: torch.full((64, ACT), prediction)), Fixed(critic)  # noqa: B023
        update(learner_of(net, q), batch, noise, schedule, Args(score_target=target))
        assert asked[-1] == pytest.approx(most) if most else asked[-1] > 1


@pytest.mark.parametrize("score_target", ["released", "posterior"])
def test_actor_gradient_against_finite_differences_and_none_to_the_critics(score_target, monkeypatch):
    args = Args(score_target=score_target, alpha=2.0, diffusion_steps=5, normalize_q_grad=False, tau=0.0)
    torch.manual_seed(0)
    net, critic = ScoreNet(OBS, ACT, (8, 8), 5).double(), Critic(OBS, ACT, (8, 8)).double()
    schedule = qsm.Schedule(*(x.double() for x in make_schedule("vp", 5)))
    batch = Batch(*(x.double() for x in random_batch()))
    noise = draw_noise(5, B, ACT, generator())
    noise = Noise(noise.next_actions.double(), noise.actions.double(), noise.t)
    learner = learner_of(net, critic)

    def loss() -> float:
        return update(learner, batch, noise, schedule, args)["losses/actor_loss"].item()

    loss()
    gradients = [p.grad.clone() for p in net.parameters()]
    if score_target == "posterior":  # the target moves with the prediction, but no gradient flows there: hold it
        targets, mean = [], qsm.posterior_mean
        monkeypatch.setattr(qsm, "posterior_mean", lambda *inputs: targets.append(mean(*inputs)) or targets[0])
    loss()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        flat, h = parameter.data.view(-1), 1e-6
        for k in range(0, len(flat), max(1, len(flat) // 3)):
            value = flat[k].item()
            flat[k] = value + h
            up = loss()
            flat[k] = value - h
            down = loss()
            flat[k] = value
            assert gradient.view(-1)[k].item() == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-7)

    loss()
    next_actions = sample_actions(net, batch.next_obs, noise.next_actions, schedule, score_target, args.action_noise)
    next_q = learner.critic_target(batch.next_obs, next_actions).amin(0)
    y = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    critic_loss = (critic(batch.obs, batch.actions) - y).square().mean(1).sum()
    expected = torch.autograd.grad(critic_loss, list(critic.parameters()))
    for parameter, gradient in zip(critic.parameters(), expected, strict=True):  # line 6 has added nothing
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradient_scale_is_the_running_mean_and_makes_the_target_scale_free():
    args, schedule, batch = Args(), make_schedule("log-snr", 10), random_batch(64)
    assert args.normalize_q_grad
    critic = QuadraticCritic()
    targets = []
    for reward_scale in (1.0, 10.0):
        net = FixedScore(lambda obs, noisy_actions, t: torch.zeros_like(noisy_actions))
        learner, values = learner_of(net, Fixed(lambda s, a, k=reward_scale: k * critic(s, a))), []
        for seed in range(4):
            batch = random_batch(64, seed)
            metrics = update(learner, batch, draw_noise(10, 64, ACT, generator(seed)), schedule, args)
            values.append(metrics["diffusion/q_grad_abs"].item())
        weights = [0.999**k for k in (3, 2, 1, 0)]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert (learner.q_scale[0] / learner.q_scale[1]).item() == pytest.approx(expected, rel=1e-4)
        targets.append(metrics["losses/actor_loss"].item())
    assert len(set(values)) == 4
    assert targets[0] == pytest.approx(targets[1], rel=1e-4)


def test_wrong_shapes_raise():
    batch, args = random_batch(), Args(hidden_dims=(8,))
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("log-snr", 10)
    for name in ("rewards", "terminations"):
        bad = batch._replace(**{name: getattr(batch, name)[:, None]})
        with pytest.raises(ValueError, match=name):
            update(learner, bad, draw_noise(10, B, ACT, generator()), schedule, args)
        with pytest.raises(ValueError, match=name):
            ReplayBuffer(10, OBS, ACT).add(bad)


# --------------------------------------------------------------------------------------------------- whole updates


def test_update_moves_critics_targets_and_score_as_stated():
    args = Args(hidden_dims=(16, 16), tau=0.1)
    learner = make_learner(args, OBS, ACT, "cpu")
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    before = [p.clone() for p in learner.critic_target.parameters()]
    for seed in range(3):
        old_target = [p.clone() for p in learner.critic_target.parameters()]
        old_score = [p.clone() for p in learner.score_net.parameters()]
        metrics = update(learner, random_batch(32), draw_noise(10, 32, ACT, generator(seed)), schedule, args)
        for new, old, online in zip(
            learner.critic_target.parameters(), old_target, learner.critic.parameters(), strict=True
        ):
            torch.testing.assert_close(new, 0.1 * online.detach() + 0.9 * old)
            assert not new.requires_grad  # or every update would hang its graph on the last one's
        assert all(not torch.equal(p, q) for p, q in zip(learner.score_net.parameters(), old_score, strict=True))
        assert all(not value.requires_grad and math.isfinite(value) for value in metrics.values())
    assert all(not torch.equal(p, q) for p, q in zip(learner.critic_target.parameters(), before, strict=True))


def everything_in(learner) -> list[torch.Tensor]:
    """Copies of weights, optimizer states and gradient scale, without the count of skipped steps."""
    return [x.detach().clone() for x in fast.tensors_in(learner)[:-1]]


@pytest.mark.parametrize("score_target", ["released", "posterior"])
def test_update_with_a_non_finite_loss_changes_nothing(score_target):
    """A NaN reward spoils the critic's loss and nothing else; a NaN observation spoils both losses."""
    args = Args(score_target=score_target, hidden_dims=(8, 8), diffusion_steps=3, tau=0.0)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("cosine", 3)
    batch, noise = random_batch(), draw_noise(3, B, ACT, generator())
    update(learner, batch, noise, schedule, args)
    bad_rewards = batch._replace(rewards=batch.rewards.index_fill(0, torch.tensor([2]), math.nan))
    critics = [*learner.critic.parameters(), *learner.critic_target.parameters()]
    critics_before, before = [p.clone() for p in critics], everything_in(learner)
    update(learner, bad_rewards, noise, schedule, args)
    assert learner.skipped == 1
    assert all(torch.equal(x, y) for x, y in zip(critics, critics_before, strict=True))
    assert not torch.equal(everything_in(learner)[0], before[0])
    before = everything_in(learner)
    for value in (math.nan, math.inf):
        obs = batch.obs.index_fill(0, torch.tensor([2]), value)
        metrics = update(learner, batch._replace(obs=obs), noise, schedule, args)
        assert not math.isfinite(metrics["losses/actor_loss"])
        assert all(torch.equal(x, y) for x, y in zip(everything_in(learner), before, strict=True))
    assert learner.skipped == 5
    update(learner, batch, noise, schedule, args)
    assert learner.skipped == 5
    assert not torch.equal(everything_in(learner)[0], before[0])


def test_adam_of_compiled_updates_is_that_of_torch():
    """fast.adam in place of torch's kernel over 50 steps: gradients of many sizes, another lr in each, one left out."""
    nets = [torch.nn.Linear(3, 2)]
    nets.append(copy.deepcopy(nets[0]))
    ours, theirs = (make_optimizer(net, 1e-2) for net in nets)
    state = [ours.state[p] for p in nets[0].parameters()]
    lists = [[s[name] for s in state] for name in ("exp_avg", "exp_avg_sq", "step")]
    constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    for seed in range(50):
        grads = [10 ** (seed % 7 - 4) * torch.randn(p.shape, generator=generator(seed)) for p in nets[0].parameters()]
        theirs.found_inf = torch.tensor(float(seed == 7))
        theirs.param_groups[0]["lr"].fill_(1e-2 / (1 + seed))
        for parameter, grad in zip(nets[1].parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        theirs.step()
        with torch.no_grad():
            torch._foreach_add_(lists[2], 1)
            flags = {"lr": torch.tensor(1e-2 / (1 + seed)), "found_inf": theirs.found_inf}
            fast.adam(list(nets[0].parameters()), grads, *lists[:2], [], lists[2], **constants, **flags)
            torch._foreach_sub_(lists[2], [theirs.found_inf] * 2)
        for x, y in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_critic_learns_a_known_value():
    """Reward 1 in every state and no termination: Q = 1 / (1 - gamma)."""
    args = Args(hidden_dims=(32, 32), diffusion_steps=2, gamma=0.5, tau=0.1, critic_lr=3e-3)
    torch.manual_seed(0)
    learner, schedule = make_learner(args, OBS, ACT, "cpu"), make_schedule("cosine", 2)
    for seed in range(400):
        batch = random_batch(64, seed)._replace(rewards=torch.ones(64), terminations=torch.zeros(64))
        update(learner, batch, draw_noise(2, 64, ACT, generator(seed)), schedule, args)
    assert (learner.critic(batch.obs, batch.actions) - 2).abs().mean() < 0.05


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++ on the CPU")


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=needs_compiler)])
def test_compiled_updates_agree_with_eager(inductor, monkeypatch):
    """With NaN in one batch; without Inductor, that is as traced, also two learners in turns and two batch sizes."""
    args, schedule = Args(hidden_dims=(16, 16), diffusion_steps=3), make_schedule("cosine", 3)
    turns = [(0, 16)] * 3 if inductor else [(0, 16), (1, 16), (0, 16), (0, 8), (1, 16), (0, 8)]
    if not inductor:
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    results = []
    for step in (fast.compiled(update, on_cpu=True), update):
        torch.manual_seed(0)
        learners, metrics = [make_learner(args, OBS, ACT, "cpu") for _ in range(2)], {}
        for seed, (i, batch_size) in enumerate(turns):
            batch = random_batch(batch_size, seed)
            if seed == 1:
                batch.rewards[0] = math.nan
            metrics |= step(learners[i], batch, draw_noise(3, batch_size, ACT, generator(seed)), schedule, args)
        assert learners[turns[1][0]].skipped == 1
        results.append([*everything_in(learners[0]), *everything_in(learners[1]), *metrics.values()])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_updates_on_two_threads_give_the_same_bits_every_time(compiled):
    """At sizes that are worth threads. A scatter of gradients fails here in nearly every repetition."""
    args, schedule = Args(hidden_dims=(256, 256), diffusion_steps=5), make_schedule("cosine", 5)
    step, results, threads = fast.compiled(update, on_cpu=True) if compiled else update, [], torch.get_num_threads()
    learner = make_learner(args, OBS, ACT, "cpu")
    tensors = fast.tensors_in(learner)
    before = [x.detach().clone() for x in tensors]
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            with torch.no_grad():
                for x, value in zip(tensors, before, strict=True):
                    x.copy_(value)
            for seed in range(3):
                step(learner, random_batch(256, seed), draw_noise(5, 256, ACT, generator(seed)), schedule, args)
            results.append(everything_in(learner))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


def test_compiled_mish_is_mish():
    """Its form in compiled updates, and the derivative, against float64: over all of float32's range."""
    x = torch.cat([torch.linspace(-100, 100, 20_001), torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    x64 = x.double().requires_grad_()
    exact = F.mish(x64)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x64)
    torch.testing.assert_close(fast.mish(x).double(), exact, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(fast.mish_backward(torch.tensor(2.0), x).double(), 2 * exact_grad, rtol=1e-5, atol=1e-6)


def test_fast_matmul_is_float32_and_only_in_the_update():
    x, y = torch.randn(2, 200, 200, generator=generator())
    product = fast.with_fast_matmul(torch.matmul)(x, y)
    torch.testing.assert_close(product.double(), x.double() @ y.double(), rtol=1e-4, atol=1e-4)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_updates_agree_with_eager_and_draw_fresh_noise(compiled):
    args, schedule = Args(hidden_dims=(16, 16), batch_size=16, diffusion_steps=3), make_schedule("cosine", 3, "cuda")
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        learner = make_learner(args, OBS, ACT, "cuda")
        step = fast.compiled(update, on_cpu=False) if captured and compiled else update
        step = fast.captured(step) if captured else step
        rng, losses = torch.Generator("cuda").manual_seed(0), []
        batch = Batch(*(x.cuda() for x in random_batch(16)))
        for _ in range(4):
            metrics = step(learner, batch, draw_noise(3, 16, ACT, rng), schedule, args)
            losses.append(metrics["losses/actor_loss"].item())
        assert len(set(losses)) == 4  # the same batch, and another noise
        results.append([*everything_in(learner), *(value.clone() for value in metrics.values())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_actor_lr_schedule():
    args = Args(total_timesteps=1000, utd=0.5, actor_lr=1.0)  # 500 updates, decay over 1000
    assert actor_lr_at(0, args) == 1.0
    assert actor_lr_at(500, args) == pytest.approx(0.5)
    assert actor_lr_at(1000, args) == actor_lr_at(2000, args) == pytest.approx(0, abs=1e-12)
    assert actor_lr_at(900, Args(actor_lr_decay=0, actor_lr=1.0)) == 1.0


# ----------------------------------------------------------------------------- sampled against Boltzmann densities

Q_FUNCTIONS = {  # Q(a) on [-1, 1] and dQ/da
    "quadratic": (lambda a: -((a - 0.3) ** 2), lambda a: -2 * (a - 0.3)),
    "bimodal": (lambda a: -4 * (a**2 - 0.25) ** 2, lambda a: -16 * a * (a**2 - 0.25)),
    "linear": (lambda a: a, torch.ones_like),
    "flat": (torch.zeros_like, torch.zeros_like),
}


def oracle_samples(q_grad, args: Args, n: int = 20_000) -> torch.Tensor:
    """Samples (n,) of the policy whose network is exactly at its regression target, dQ/da in closed form.

    The posterior target depends on what the network predicts. Training moves a prediction in small steps to it, and so
    does the oracle: 400 steps of 0.03, on a grid of a_t between whose points predictions are interpolated.
    """
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    grid = torch.linspace(-6, 6, 301)[:, None]

    def predict(a, t):
        if args.score_target == "released":
            return -args.alpha * q_grad(a)
        alphas_cumprod = schedule.alphas_cumprod[t].expand(len(grid), 1)
        clean = torch.zeros_like(grid)
        for _ in range(400):
            clean += 0.03 * (posterior_mean(args.alpha * q_grad(clean), grid, alphas_cumprod, schedule) - clean)
        return torch.from_numpy(np.interp(a, grid[:, 0], clean[:, 0])).float()

    score = OracleScore(predict, args.diffusion_steps)
    noise = torch.randn(args.diffusion_steps + 1, n, 1, generator=generator())
    return sample_actions(score, torch.zeros(n, OBS), noise, schedule, args.score_target)[:, 0].double()


def w1_to_boltzmann(samples: torch.Tensor, q, alpha: float) -> float:
    """Wasserstein-1 distance to the density proportional to exp(alpha Q) on [-1, 1], by quantiles."""
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    density = (alpha * q(grid) - (alpha * q(grid)).max()).exp()
    cdf = density.cumsum(0) / density.sum()
    levels = (torch.arange(len(samples), dtype=torch.float64) + 0.5) / len(samples)
    quantiles = grid[torch.searchsorted(cdf, levels).clamp(max=len(grid) - 1)]
    return (samples.sort().values - quantiles).abs().mean().item()


def mean_w1(score_target: str, **kwargs) -> dict[str, float]:
    """Mean over alpha in {1, 10, 50, 200} of the distance to exp(alpha Q), for each of the four Q."""
    distances = {}
    for name, (q, q_grad) in Q_FUNCTIONS.items():
        args = [Args(score_target=score_target, alpha=alpha, **kwargs) for alpha in (1.0, 10.0, 50.0, 200.0)]
        distances[name] = sum(w1_to_boltzmann(oracle_samples(q_grad, a), q, a.alpha) for a in args) / len(args)
    return distances


@pytest.mark.parametrize(("T", "beta_schedule", "bound"), [(10, "log-snr", 0.030), (5, "cosine", 0.045)])
def test_posterior_target_samples_the_boltzmann_density(T, beta_schedule, bound):
    """Measured: 0.020 and 0.037."""
    distances = mean_w1("posterior", diffusion_steps=T, beta_schedule=beta_schedule)
    assert sum(distances.values()) / 4 < bound


@pytest.mark.parametrize(("T", "beta_schedule", "bound"), [(10, "log-snr", 0.03), (5, "cosine", 0.04)])
def test_posterior_target_of_flat_and_linear_q_stays_off_the_bounds(T, beta_schedule, bound):
    args = Args(diffusion_steps=T, beta_schedule=beta_schedule)
    q, q_grad = Q_FUNCTIONS["flat"]
    flat = oracle_samples(q_grad, args)
    assert w1_to_boltzmann(flat, q, 10.0) < bound
    assert (flat.abs() == 1).double().mean() < 0.02
    linear = oracle_samples(Q_FUNCTIONS["linear"][1], args)
    assert (linear.abs() == 1).double().mean() < 0.01


def test_released_target_does_not():
    """A documented fact about the released form, T = 5, vp: distance 0.45; a flat Q sends 67 % to the bounds."""
    assert sum(mean_w1("released").values()) / 4 > 0.40
    flat = oracle_samples(torch.zeros_like, Args(score_target="released"))
    assert (flat.abs() == 1).double().mean() > 0.60


def four_modes(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Q whose exp(Q) is four equal Gaussian bumps at the corners of a square that the state rotates, (2, B)."""
    x = (obs * actions).sum(-1)
    y = obs[:, 0] * actions[:, 1] - obs[:, 1] * actions[:, 0]
    bumps = [-((x - i) ** 2 + (y - j) ** 2) / (2 * 0.2**2) for i in (-0.5, 0.5) for j in (-0.5, 0.5)]
    return torch.stack(bumps).logsumexp(0).expand(2, -1)


def learn_four_modes(reward_scale: float, steps: int, states: torch.Tensor, n: int) -> tuple[list[torch.Tensor], float]:
    """Train the real network with the real loss on reward_scale * Q; samples (n, 2) at each state, alpha of Q."""
    torch.manual_seed(0)
    g = generator()
    args = Args(hidden_dims=(128, 128), actor_lr=3e-3, total_timesteps=steps, actor_lr_decay=1)
    T, schedule = args.diffusion_steps, make_schedule(args.beta_schedule, args.diffusion_steps)
    critic = Fixed(lambda obs, actions: reward_scale * four_modes(obs, actions))
    learner = learner_of(ScoreNet(2, 2, args.hidden_dims, T), critic)
    for step in range(steps):
        angles = 2 * torch.pi * torch.rand(256, generator=g)
        obs, actions = torch.stack([angles.cos(), angles.sin()], 1), 2 * torch.rand(256, 2, generator=g) - 1
        batch = Batch(obs, actions, torch.zeros(256), obs, torch.ones(256))
        learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(step, args))
        update(learner, batch, draw_noise(T, 256, 2, g), schedule, args)
    q_scale = learner.q_scale
    noise = torch.randn(T + 1, n, 2, generator=generator(1))
    samples = [
        sample_actions(learner.score_net, state.expand(n, 2), noise, schedule, args.score_target) for state in states
    ]
    return samples, args.alpha * reward_scale / (q_scale[0] / q_scale[1]).item()


def sliced_w1(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over 16 directions of the Wasserstein-1 distance between the projections of two samples (n, 2)."""
    angles = torch.arange(16) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


ANGLES = torch.tensor([0.0, 0.4, 0.9])
STATES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def test_learned_policy_has_the_four_modes():
    """Measured: 18 to 34 % in each mode, sliced W1 0.11 to exp(alpha Q): the limit in docs/score_target.md."""
    samples, alpha = learn_four_modes(1.0, 2000, STATES, n=8000)
    axis = torch.linspace(-1, 1, 201)
    grid = torch.cartesian_prod(axis, axis)
    for state, actions in zip(STATES, samples, strict=True):
        x = (state * actions).sum(-1)
        y = state[0] * actions[:, 1] - state[1] * actions[:, 0]
        shares = [((x > 0) == i) & ((y > 0) == j) for i in (False, True) for j in (False, True)]
        assert min(share.float().mean().item() for share in shares) > 0.15
        density = (alpha * four_modes(state.expand(len(grid), 2), grid)[0]).softmax(0)
        exact = grid[density.multinomial(8000, replacement=True, generator=generator(2))]
        assert sliced_w1(actions, exact) < 0.15


def test_reward_scale_does_not_change_the_policy():
    samples, alpha = learn_four_modes(1.0, 200, STATES, n=2000)
    scaled, scaled_alpha = learn_four_modes(10.0, 200, STATES, n=2000)
    assert scaled_alpha == pytest.approx(alpha, rel=1e-3)
    for x, y in zip(samples, scaled, strict=True):
        assert sliced_w1(x, y) < 0.01


# ------------------------------------------------------------------------------------------- environments, the loop


class Counter(gym.Env):
    """Observation (episode, step): even episodes terminate after 3 steps, odd ones are truncated after 5.

    Episodes of copies are told apart by a start that depends on the seed.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-0.4, 0.4, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    episode = None

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 101 * seed if self.episode is None or seed is not None else self.episode + 1
        self.t = 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        terminated, truncated = self.episode % 2 == 0 and self.t == 3, self.episode % 2 == 1 and self.t == 5
        return np.array([self.episode, self.t], np.float64), float(self.t), terminated, truncated, {}


gym.register("Counter-v0", Counter)

QUICK = {
    "env_id": "Counter-v0",
    "hidden_dims": (8,),
    "batch_size": 4,
    "buffer_size": 1000,
    "learning_starts": 20,
    "total_timesteps": 60,
    "eval_every": 0,
    "log_every": 20,
    "device": "cpu",
    "compile": False,
}


@pytest.fixture
def buffers(monkeypatch):
    """The replay buffers that `qsm.main` makes."""
    made = []

    class Recorded(ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(qsm, "ReplayBuffer", Recorded)
    return made


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
    assert actions.abs().max() <= 1
    assert actions.abs().max() > 0.5  # stored in [-1, 1], not in the environment's +-0.4


@pytest.mark.parametrize("async_envs", [False, True])
def test_no_stored_transition_crosses_an_episode(async_envs, buffers, tmp_path):
    qsm.main(Args(**QUICK, num_envs=3, async_envs=async_envs, run_dir=tmp_path))
    check_transitions(buffers[0], 60)
    assert len(buffers[0].storage.obs[:60].unique(dim=0)) == 60  # nothing stored twice, nothing lost


def test_sync_and_async_runs_are_the_same_run(buffers, tmp_path):
    for async_envs in (False, True):
        qsm.main(Args(**QUICK, num_envs=2, async_envs=async_envs, run_dir=tmp_path / str(async_envs)))
    for x, y in zip(buffers[0].storage, buffers[1].storage, strict=True):
        assert torch.equal(x[:60], y[:60])


def test_episode_statistics_and_final_observations():
    envs = make_envs("Counter-v0", 2, asynchronous=False)
    envs.reset(seed=[0, 1])  # env 0 terminates after 3 steps, env 1 is truncated after 5
    finished = []
    for step in range(1, 6):
        next_obs, _, terminations, truncations, infos = envs.step(np.zeros((2, 1), np.float32))
        dones = terminations | truncations
        final_obs = true_next_obs(next_obs, dones, infos)
        finished += [(step, *episode) for episode in finished_episodes(dones, infos)]
        if step == 3:
            assert dones.tolist() == [True, False]
            assert final_obs.tolist() == [[0, 3], [101, 3]]
            assert next_obs.tolist() == [[1, 0], [101, 3]]  # what the policy acts on is the new episode
    assert finished == [(3, 0, 1 + 2 + 3, 3), (5, 1, 1 + 2 + 3 + 4 + 5, 5)]
    envs.close()


@pytest.mark.parametrize(("env_id", "bound"), [("Humanoid-v4", 0.4), ("InvertedPendulum-v4", 3.0)])
def test_actions_are_rescaled_to_the_bounds_of_the_environment(env_id, bound):
    env = make_env(env_id)
    env.reset(seed=0)
    assert np.all(env.action_space.low == -1)
    assert np.all(env.action_space.high == 1)
    for action in (-1.0, 0.0, 1.0):
        env.step(np.full(env.action_space.shape, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.data.ctrl, action * bound, rtol=1e-6)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", "continuous"),
        ("NoSuchEnv-v0", "NoSuchEnv"),
        ("no such id", "no such id"),
        ("Pusher-v4", "mujoco"),
    ],
)
def test_impossible_environments_get_one_line(env_id, message):
    with pytest.raises(ValueError, match=message) as error:
        make_envs(env_id, 1)
    assert "\n" not in str(error.value)


def test_buffer_is_a_ring_of_the_newest():
    buffer = ReplayBuffer(7, OBS, ACT)
    for start in range(0, 20, 4):  # 4 does not divide 7: additions wrap around
        batch = random_batch(4, seed=start)
        buffer.add(batch._replace(rewards=torch.arange(start, start + 4.0)))
    assert buffer.size == 7
    assert sorted(buffer.storage.rewards.tolist()) == list(range(13, 20))
    row = buffer.storage.rewards.tolist().index(18.0)
    assert torch.equal(buffer.gather(torch.tensor([row])).obs[0], batch.obs[2])
    indices = buffer.sample_indices(7000, generator())
    assert indices.bincount(minlength=7).min() > 850  # uniform: 1000 each, standard deviation 29


def test_buffer_that_cannot_fit_says_so():
    with pytest.raises(MemoryError, match=r"needs .* GiB.*--buffer-size"):
        ReplayBuffer(10**12, 376, 17)
    assert ReplayBuffer.num_bytes(1_000_000, 376, 17) == 4 * (376 + 17 + 1 + 376 + 1) * 10**6


@pytest.mark.parametrize(("num_envs", "utd"), [(1, 1.0), (4, 0.25), (3, 0.1), (2, 2.5), (1, 0.29)])
def test_update_to_data_ratio_is_exact(num_envs, utd, monkeypatch, tmp_path):
    counts = []
    monkeypatch.setattr(qsm, "update", lambda *args: counts.append(1) or {"losses/q": torch.zeros(())})
    qsm.main(Args(**QUICK | {"total_timesteps": 120}, num_envs=num_envs, utd=utd, run_dir=tmp_path))
    # The last transitions are stored after the last updates: batches lag by one vector step.
    assert len(counts) == math.floor(round((120 - num_envs - 20) * utd, 6))


def weights(run: Path) -> list[torch.Tensor]:
    saved = torch.load(run / "model.pt", weights_only=True)
    return [*saved["score_net"].values(), *saved["critic"].values()]


def test_same_seed_same_run_and_evaluation_disturbs_nothing(tmp_path):
    made = {}
    for name, changes in {
        "first": {},
        "again": {},
        "evaluated": {"eval_every": 10, "eval_episodes": 2, "log_every": 7},
        "seed 2": {"seed": 2},
    }.items():
        made[name] = qsm.main(Args(**QUICK | {"env_id": "Pendulum-v1"} | changes, run_dir=tmp_path / name))
    for name, same in {"again": True, "evaluated": True, "seed 2": False}.items():
        pairs = zip(weights(made["first"]), weights(made[name]), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs) is same, name
    rows = list(csv.DictReader((made["evaluated"] / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [step for step in range(0, 61, 10) for _ in range(2)]
    assert all(int(row["length"]) == 200 for row in rows)


def test_evaluation_counts_one_episode_of_each_environment():
    envs = make_envs("Counter-v0", 3, asynchronous=False)
    policy, schedule = (ScoreNet(2, 1, (8,), 5), Critic(2, 1, (8,))), make_schedule("vp", 5)
    episodes = qsm.evaluate(*policy, envs, schedule, Args(), seed=7)  # episodes 707, 808, 909
    assert episodes == [(15.0, 5), (6.0, 3), (15.0, 5)]
    assert qsm.evaluate(*policy, envs, schedule, Args(), seed=7) == episodes
    envs.close()


def test_best_of_candidates_has_the_highest_min_q():
    torch.manual_seed(0)
    net, critic, schedule, K = ScoreNet(OBS, ACT, (8,), 3), Critic(OBS, ACT, (8,)), make_schedule("vp", 3), 6
    obs, noise = random_batch().obs, torch.randn(4, K * B, ACT, generator=generator())
    args = Args()
    best = qsm.best_of(net, critic, obs, noise, schedule, args)
    for i in range(B):  # one state at a time, its candidates one by one
        candidates = torch.cat(
            [sample_actions(net, obs[[i]], noise[:, [k * B + i]], schedule, "posterior") for k in range(K)]
        )
        q = critic(obs[[i]].expand(K, -1), candidates).min(0).values
        torch.testing.assert_close(best[i], candidates[q.argmax()])
    noisy = qsm.best_of(net, critic, obs, noise, schedule, args, action_noise=0.1)
    torch.testing.assert_close(noisy, (best + 0.1 * noise[-1, :B]).clamp(-1, 1))
    alone = noise[:, :B]
    alone = qsm.best_of(net, critic, obs, alone, schedule, args), sample_actions(net, obs, alone, schedule, "posterior")
    assert torch.equal(*alone)


@pytest.mark.parametrize("candidates", [1, 4])
def test_evaluation_of_a_saved_policy_is_the_one_of_the_run(candidates, tmp_path, capsys):
    changes = {"env_id": "Pendulum-v1", "eval_every": 60, "eval_episodes": 3, "candidates": candidates}
    run = qsm.main(Args(**QUICK | changes, run_dir=tmp_path))
    rows = [row for row in csv.DictReader((run / "evaluations.csv").open()) if row["global_step"] == "60"]
    capsys.readouterr()
    assert qsm.main(Args(evaluate=run, eval_episodes=3, candidates=candidates)) == run
    logged = list(csv.DictReader((run / "evaluate.csv").open()))
    assert [row["return"] for row in logged] == [row["return"] for row in rows]
    assert {row["candidates"] for row in logged + rows} == {str(candidates)}
    returns = np.array([float(row["return"]) for row in rows])
    printed = capsys.readouterr().out
    assert f"3 episodes, seed 1000001, candidates {candidates}, action_noise 0" in printed
    assert f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f}" in printed
    qsm.main(Args(evaluate=run, eval_episodes=2, alpha=3.0))
    assert "ignoring alpha" in capsys.readouterr().out
    assert len(list(csv.reader((run / "evaluate.csv").open()))) == 1 + 3 + 2


def error_line(capsys) -> str:
    """The one line on stderr, progress bars aside."""
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    (line,) = [line for line in lines if not re.search("step/s|s/step", line)]  # the latter on a very slow machine
    return line


@pytest.mark.parametrize("package", ["moviepy", "wandb", "shimmy"])
def test_missing_packages_get_one_line(package, checkpointed, monkeypatch, capsys):
    changes = {
        "moviepy": {"evaluate": checkpointed, "capture_video": True},
        "wandb": QUICK | {"track": True, "run_dir": checkpointed.parent / "tracked"},
        "shimmy": QUICK | {"env_id": "dm_control/walker-walk-v0"},
    }
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    if package == "moviepy":
        monkeypatch.setattr(Counter, "render", lambda self: np.zeros((4, 4, 3), np.uint8))
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"1|2"):
        qsm.main(Args(**changes[package]))
    assert re.search(r"pip install", error_line(capsys))
    assert not (checkpointed.parent / "tracked").exists()


def test_tracking_mirrors_the_event_file_under_the_name_of_the_run(monkeypatch, tmp_path):
    calls = []
    wandb = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs), Error=Exception)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = qsm.main(Args(**QUICK, track=True, run_dir=tmp_path))
    qsm.main(Args(resume=run))
    assert [(call["id"], call["resume"], call["sync_tensorboard"]) for call in calls] == [(run.name, "allow", True)] * 2
    assert calls[0]["config"]["utd"] == 1.0


def test_video_needs_an_opengl_library(checkpointed, monkeypatch, capsys):
    def no_library(self):
        raise RuntimeError("no OpenGL")

    monkeypatch.setattr(Counter, "render", no_library)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        qsm.main(Args(evaluate=checkpointed, capture_video=True))
    assert "libosmesa6" in error_line(capsys)


def test_video_of_the_first_episode(checkpointed, monkeypatch):
    pytest.importorskip("moviepy", reason="an mp4 needs moviepy, which is optional")
    monkeypatch.setattr(Counter, "render", lambda self: np.zeros((16, 16, 3), np.uint8))
    qsm.main(Args(evaluate=checkpointed, eval_episodes=2, capture_video=True))
    (video,) = (checkpointed / "videos").iterdir()
    assert video.name == "step-60-seed-1-episode-0.mp4"
    assert video.stat().st_size > 500


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
@pytest.mark.parametrize("where", ["reward", "observation", "final observation"])
def test_non_finite_transitions_stop_the_run(value, where, monkeypatch, tmp_path, buffers, capsys):
    """Environment 1 of 2 breaks in its 40th step; 1e39 is infinite in float32. The run can be resumed."""
    step, steps = Counter.step, []

    def broken(self, action):
        obs, reward, terminated, truncated, info = step(self, action)
        steps.append(self)
        if len(steps) >= 80 and self is steps[1] and (where != "final observation" or terminated or truncated):
            obs, reward = (obs, value) if where == "reward" else (obs * value, reward)
        return obs, reward, terminated, truncated, info

    with monkeypatch.context() as patch:
        patch.setattr(Counter, "step", broken)
        with pytest.raises(SystemExit, match="1"):
            qsm.main(Args(**QUICK | {"total_timesteps": 120}, num_envs=2, run_dir=tmp_path))
    (run,) = tmp_path.iterdir()
    stored = buffers[0].size
    assert re.search(rf"environment 1 diverged.* from step {stored} .*--resume {run}", error_line(capsys))
    assert stored >= 78
    check_transitions(buffers[0], stored)
    qsm.main(Args(resume=run))
    check_transitions(buffers[1], 120)


def test_non_finite_losses_stop_the_run_at_the_next_log(monkeypatch, tmp_path, capsys):
    real_update, count = qsm.update, []

    def poisoned(learner, batch, *rest):
        count.append(1)
        rewards = batch.rewards * math.nan if len(count) == 5 else batch.rewards
        return real_update(learner, batch._replace(rewards=rewards), *rest)

    monkeypatch.setattr(qsm, "update", poisoned)
    with pytest.raises(SystemExit, match="1"):
        qsm.main(Args(**QUICK, run_dir=tmp_path))
    assert "1 optimizer steps with a non-finite loss were left out" in error_line(capsys)
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "checkpoint.zip")["loop"]["state"][0] == 40
    assert all(x.isfinite().all() for x in weights(run))
    qsm.main(Args(resume=run))


def test_networks_with_nan_are_not_saved_and_do_not_act(monkeypatch, tmp_path, capsys):
    """A step that spoils the weights although its loss is finite, right after the checkpoint at step 40."""
    real_update, count = qsm.update, []

    def spoiling(learner, *rest):
        count.append(1)
        metrics = real_update(learner, *rest)
        if len(count) == 25:
            next(learner.score_net.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(qsm, "update", spoiling)
    with pytest.raises(SystemExit, match="1"):
        qsm.main(Args(**QUICK, checkpoint_every=40, run_dir=tmp_path))
    assert re.search("actions are not finite.*from the last checkpoint", error_line(capsys))
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "checkpoint.zip")["loop"]["state"][0] == 40
    assert all(x.isfinite().all() for x in weights(run))


def test_killed_worker_is_named_and_the_run_saved(monkeypatch, tmp_path, buffers, capsys):
    real_update, count = qsm.update, []

    def kill(*args):
        count.append(1)
        if len(count) == 15:
            os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        return real_update(*args)

    monkeypatch.setattr(qsm, "update", kill)
    with pytest.raises(SystemExit, match="1"):
        qsm.main(Args(**QUICK, num_envs=3, async_envs=True, run_dir=tmp_path))
    assert re.search(r"worker process of environment \d died \(exit codes \{\d: -9\}\)", error_line(capsys))
    assert not multiprocessing.active_children()
    (run,) = tmp_path.iterdir()
    qsm.main(Args(resume=run))
    check_transitions(buffers[1], 60)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failing_environment_saves_first(asynchronous, buffers, monkeypatch, tmp_path, capsys):
    def fail(self, action):
        if self.t == 4:
            raise RuntimeError("the joints broke")
        return step(self, action)

    step = Counter.step
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(Counter, "step", fail)
        qsm.main(Args(**QUICK, num_envs=2, async_envs=asynchronous, run_dir=tmp_path))
    assert "an environment failed, RuntimeError: the joints broke" in capsys.readouterr().err
    (run,) = tmp_path.iterdir()
    qsm.main(Args(resume=run))
    check_transitions(buffers[1], 60)


def test_interrupt_that_ends_the_compiler_gets_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(fast, "compiled", lambda function, on_cpu: interrupted)
    with pytest.raises(SystemExit, match="130"):
        qsm.main(Args(**QUICK | {"compile": True}, run_dir=tmp_path))
    assert re.search("stopped.*the compiler was killed", error_line(capsys))


def test_interrupted_evaluation_gets_one_line(checkpointed, monkeypatch, capsys):
    monkeypatch.setattr(qsm, "evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="130"):
        qsm.main(Args(evaluate=checkpointed))
    assert error_line(capsys) == "qsm.py: stopped"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_out_of_memory_gets_one_line(on_gpu, monkeypatch, tmp_path, capsys):
    def full(*args):
        if on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
        torch.empty(10**17)

    monkeypatch.setattr(qsm, "update", full)
    with pytest.raises(SystemExit, match="1"):
        qsm.main(Args(**QUICK, checkpoint_every=20, run_dir=tmp_path))
    assert re.search("--batch-size.*2 GiB" if on_gpu else "out of memory.*--batch-size", error_line(capsys))
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "checkpoint.zip")


def test_two_runs_of_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("time.time", lambda: 1_790_000_000.5)
    first, second = (qsm.main(Args(**QUICK, run_dir=tmp_path)) for _ in range(2))
    assert (first.name, second.name) == ("Counter-v0__qsm__1__1790000000", "Counter-v0__qsm__1__1790000000-1")


def test_folder_in_use_by_another_process_is_left_alone(checkpointed, capsys):
    content = {path: path.read_bytes() for path in checkpointed.iterdir()}
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(checkpointed / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1"):
            qsm.main(Args(resume=checkpointed))
        other.communicate(b"\n")
    assert "in use by another process" in error_line(capsys)
    assert content == {path: path.read_bytes() for path in checkpointed.iterdir()}
    qsm.main(Args(resume=checkpointed))


def test_model_that_names_code_is_not_evaluated_unless_asked(checkpointed, monkeypatch, tmp_path, capsys):
    (tmp_path / "stranger.py").write_text("raise SystemExit('the code of a stranger has run')")
    monkeypatch.syspath_prepend(tmp_path)
    model = torch.load(checkpointed / "model.pt", weights_only=True)
    model["args"]["env_id"] = "stranger:Toy-v0"
    torch.save(model, checkpointed / "model.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        qsm.main(Args(evaluate=checkpointed))
    assert "--env-id stranger:Toy-v0" in error_line(capsys)
    with pytest.raises(SystemExit, match="stranger has run"):
        qsm.main(Args(evaluate=checkpointed, env_id="stranger:Toy-v0"))


def test_a_stopped_run_leaves_nothing_behind_in_its_process(monkeypatch, tmp_path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    real_update = qsm.update
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(qsm, "update", lambda *args: signal.raise_signal(signal.SIGTERM) or real_update(*args))
        qsm.main(Args(**QUICK, run_dir=tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(qsm, "update", lambda *args: 1 / 0)
        qsm.main(Args(**QUICK, run_dir=tmp_path / "failed"))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    qsm.main(Args(**QUICK, run_dir=tmp_path / "whole"))


def test_failing_evaluation_does_not_end_the_training(monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise RuntimeError("the camera broke")

    monkeypatch.setattr(qsm, "evaluate", fail)
    run = qsm.main(Args(**QUICK | {"eval_every": 30}, run_dir=tmp_path))
    assert "step 30: no evaluation, RuntimeError: the camera broke" in capsys.readouterr().out
    assert load_checkpoint(run / "checkpoint.zip")["loop"]["state"][0] == 60


def test_signal_breaks_off_an_evaluation_which_a_resumed_run_makes_again(monkeypatch, tmp_path):
    """Also one whose episodes never end."""
    step, stepped = Counter.step, []

    def endless(self, action):
        obs, reward, _, _, info = step(self, action)
        stepped.append(1)
        if len(stepped) == 100:
            signal.raise_signal(signal.SIGTERM)
        return obs, reward, False, False, info

    changes = QUICK | {"eval_every": 60, "eval_episodes": 2}
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(Counter, "step", endless)
        qsm.main(Args(**changes, run_dir=tmp_path / "stopped"))
    (stopped,) = (tmp_path / "stopped").iterdir()
    whole = qsm.main(Args(**changes, run_dir=tmp_path / "whole"))
    qsm.main(Args(resume=stopped))
    assert (stopped / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()


def test_workers_are_for_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    envs = make_envs("Counter-v0", 2)
    assert isinstance(envs, gym.vector.SyncVectorEnv)
    envs.close()


def test_checkpoint_of_another_kind_of_device_is_resumed_and_told(checkpointed, monkeypatch, capsys):
    """Generator states are the only part of a checkpoint that a CPU cannot take from CUDA."""
    load = runs.load_checkpoint

    def load_from_cuda(path):
        saved = load(path)
        *libraries, own = saved["random"]
        saved["random"] = [*libraries, [("cuda", state[:16]) for _, state in own]]
        return saved

    monkeypatch.setattr(runs, "load_checkpoint", load_from_cuda)
    qsm.main(Args(resume=checkpointed))
    assert "not bit for bit: saved on cuda, resumed on cpu" in capsys.readouterr().out
    saved = load(checkpointed / "checkpoint.zip")
    assert all(isinstance(value, float) for value in saved["loop"]["state"][3].values())
    assert saved["loop"]["args"]["cuda_graph"] is None  # as given, not as this machine has it


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_run_with_the_default_path_is_resumed(deterministic, monkeypatch, tmp_path):
    """Compiled and captured, from the loop; with --deterministic the resumed run has the same bits."""
    changes = QUICK | {"device": "cuda", "compile": True, "deterministic": deterministic, "checkpoint_every": 40}
    try:
        whole = qsm.main(Args(**changes, run_dir=tmp_path / "whole"))
        with monkeypatch.context() as patch:
            crash_after_checkpoint(patch)
            with pytest.raises(Crash):
                qsm.main(Args(**changes, run_dir=tmp_path / "resumed"))
        (resumed,) = (tmp_path / "resumed").iterdir()
        qsm.main(Args(resume=resumed))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0) if deterministic else torch.testing.assert_close(x, y)


def test_other_versions_and_ignored_arguments_are_told(checkpointed, monkeypatch, capsys):
    monkeypatch.setattr(runs, "versions", lambda: {"python": "4.0"})
    qsm.main(Args(resume=checkpointed, gamma=0.5))
    printed = capsys.readouterr().out
    assert "not bit for bit" in printed
    assert "ignoring gamma" in printed


def test_deterministic_algorithms_train(tmp_path):
    """Every kernel of the loop has a deterministic form: torch raises otherwise (also for CUDA's, when run there)."""
    try:
        runs_of = [qsm.main(Args(**QUICK, deterministic=d, run_dir=tmp_path / str(d))) for d in (True, False)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*map(weights, runs_of), strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"gamma": 1.5},
        {"gamma": math.nan},
        {"total_timesteps": 0},
        {"num_envs": -1},
        {"utd": 0.0},
        {"diffusion_steps": 0},
        {"hidden_dims": ()},
        {"alpha": -1.0},
        {"buffer_size": 2, "num_envs": 3},
        {"learning_starts": -5},
    ],
)
def test_impossible_values_are_refused(bad, capsys):
    with pytest.raises(SystemExit, match="1"):
        runs.check_args(Args(**bad))
    assert "--" + next(iter(bad)).replace("_", "-") in capsys.readouterr().err


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compiling_without_a_compiler_is_refused(device, variable, monkeypatch):
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(ValueError, match="--compile True needs a compiler: install no-such-compiler"):
        fast.resolve_flags(Args(compile=True), torch.device(device))
    args = Args()  # with 990,000 updates, which would be compiled
    fast.resolve_flags(args, torch.device(device))
    assert (args.compile, args.cuda_graph) == (False, device == "cuda")


class Crash(Exception):
    """Stands for a machine that dies right after a checkpoint was written."""


def crash_after_checkpoint(monkeypatch):
    save = runs.save_checkpoint

    def save_and_crash(*args):
        save(*args)
        raise Crash

    monkeypatch.setattr(runs, "save_checkpoint", save_and_crash)


def scalars(run: Path) -> dict[str, list]:
    """(step, value) of every scalar in the event files, but for the speed."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name != "charts/SPS"
    }


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4", "Humanoid-v4", "Pendulum-v1"])
def test_resumed_run_is_the_uninterrupted_run(env_id, async_envs, buffers, monkeypatch, tmp_path):
    """Bit for bit, from the middle of episodes: networks, buffer, CSVs, event file."""
    changes = {"env_id": env_id, "num_envs": 2, "async_envs": async_envs, "total_timesteps": 160, "log_every": 16}
    changes |= {"eval_every": 80, "eval_episodes": 1, "checkpoint_every": 90, "utd": 0.5}
    whole = qsm.main(Args(**QUICK | changes, run_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        crash_after_checkpoint(patch)
        with pytest.raises(Crash):
            qsm.main(Args(**QUICK | changes, run_dir=tmp_path / "resumed"))
    (resumed,) = (tmp_path / "resumed").iterdir()
    with (resumed / "episodes.csv").open("a") as file:
        file.write("92,0,1.0,9\r\n94,1,2.")  # written after the checkpoint, before the crash
    assert qsm.main(Args(resume=resumed)) == resumed

    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))
    for x, y in zip(buffers[0].storage, buffers[-1].storage, strict=True):
        assert torch.equal(x[:160], y[:160])
    for name in ("episodes.csv", "evaluations.csv"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert len((whole / "episodes.csv").read_text().splitlines()) > 3 or env_id in ("Ant-v4", "Pendulum-v1")
    assert scalars(whole) == scalars(resumed)


def test_resumed_run_is_traced_like_the_uninterrupted_one(monkeypatch, tmp_path):
    """The compiled path without its compiler: what a checkpoint put in place must be found by the trace."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    changes = QUICK | {"compile": True, "checkpoint_every": 40}
    whole = qsm.main(Args(**changes, run_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        crash_after_checkpoint(patch)
        with pytest.raises(Crash):
            qsm.main(Args(**changes, run_dir=tmp_path / "resumed"))
    (resumed,) = (tmp_path / "resumed").iterdir()
    qsm.main(Args(resume=resumed))
    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))


def test_each_checkpoint_is_written_once(monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, loop, *args: steps.append(loop["state"][0]))
    qsm.main(Args(**QUICK, checkpoint_every=20, run_dir=tmp_path))
    assert steps == [20, 40, 60]


@pytest.mark.parametrize("handle", [lambda: None, ctypes.pointer(ctypes.c_int())])  # TypeError or so, ValueError
def test_resume_without_simulators_starts_new_episodes(handle, buffers, monkeypatch, tmp_path):
    """A simulator that cannot be pickled: the resumed run is another one, but none of its transitions is wrong."""
    reset = Counter.reset

    def reset_and_hold_a_handle(self, **kwargs):
        self.handle = handle
        return reset(self, **kwargs)

    monkeypatch.setattr(Counter, "reset", reset_and_hold_a_handle)
    with monkeypatch.context() as patch:
        crash_after_checkpoint(patch)
        with pytest.raises(Crash):
            qsm.main(Args(**QUICK, checkpoint_every=31, run_dir=tmp_path))
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "checkpoint.zip")["envs"] == (None,)
    qsm.main(Args(resume=run))
    check_transitions(buffers[-1], 60)


@pytest.fixture
def checkpointed(tmp_path):
    return qsm.main(Args(**QUICK, run_dir=tmp_path / "runs"))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("buffer/obs").header_offset + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        flip_a_bit,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello"),
        lambda path: torch.save({"model": torch.zeros(3)}, path),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "flipped", "empty", "text", "foreign", "missing"],
)
def test_unusable_checkpoints_get_one_line(damage, checkpointed, capsys):
    path = checkpointed / "checkpoint.zip"
    damage(path)
    content = path.read_bytes() if path.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        qsm.main(Args(resume=checkpointed))
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert content == (path.read_bytes() if path.exists() else None)


@pytest.mark.parametrize("changes", [{"hidden_dims": (9,)}, {"env_id": "Pendulum-v1"}, {"num_envs": 2}])
def test_checkpoint_of_other_networks_or_environments_gets_one_line(changes, checkpointed, monkeypatch, capsys):
    load = runs.load_checkpoint

    def load_other(path):
        saved = load(path)
        saved["loop"]["args"] |= changes
        return saved

    monkeypatch.setattr(runs, "load_checkpoint", load_other)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        qsm.main(Args(resume=checkpointed))
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def train_in_a_process(run: Path) -> None:
    torch.set_num_threads(1)  # as in the test: sums have another order with two
    qsm.main(Args(resume=run))


def test_run_killed_at_50_random_moments_is_the_uninterrupted_run(buffers, monkeypatch, tmp_path, request):
    """A run that writes a checkpoint in every step is killed by SIGKILL 50 times, and resumed each time."""

    class StopAt:
        """A StopRequest for when `stop_at` transitions are stored."""

        restore = lambda self: None  # noqa: E731
        signum = property(lambda self: signal.SIGTERM if buffers[-1].size >= stop_at else 0)

    monkeypatch.setattr(qsm, "StopRequest", StopAt)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    args = Args(**QUICK | {"env_id": "Pendulum-v1", "total_timesteps": 100_000, "checkpoint_every": 1})
    args.run_dir, stop_at = tmp_path / "killed", 30
    with pytest.raises(SystemExit, match="143"):
        qsm.main(args)
    (killed,) = args.run_dir.iterdir()
    moments, processes = np.random.default_rng(0), multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_qsm", "torch._dynamo"])  # imported once
    steps, writing = [30], 0
    for _ in range(50):
        process = processes.Process(target=train_in_a_process, args=(killed,))
        process.start()
        before = (killed / "checkpoint.zip").stat().st_mtime_ns
        while (killed / "checkpoint.zip").stat().st_mtime_ns == before:  # until it wrote its first one
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        writing += (killed / "checkpoint.tmp").exists()
        steps.append(load_checkpoint(killed / "checkpoint.zip")["loop"]["state"][0])
    assert steps == sorted(set(steps))  # each got further
    assert writing > 0  # killed in the middle of a checkpoint, 9 times or more where this was run
    time.sleep(1)  # event files are read in the order of their names: by second, then by process
    stop_at = steps[-1] + 5
    with pytest.raises(SystemExit, match="143"):
        qsm.main(Args(resume=killed))
    args.run_dir = tmp_path / "whole"
    with pytest.raises(SystemExit, match="143"):
        qsm.main(args)
    (whole,) = args.run_dir.iterdir()
    assert all(torch.equal(x, y) for x, y in zip(weights(whole), weights(killed), strict=True))
    assert (whole / "episodes.csv").read_bytes() == (killed / "episodes.csv").read_bytes()
    assert scalars(whole) == scalars(killed)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_checkpoint_and_end_the_run(signum, tmp_path):
    flags = "--env-id Pendulum-v1 --num-envs 2 --async-envs True --hidden-dims 8 --learning-starts 50 --eval-every 0"
    flags += " --compile False"
    command = [sys.executable, str(ROOT / "qsm.py"), *flags.split(), "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(len(path.read_text().splitlines()) > 1 for path in tmp_path.glob("*/episodes.csv")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signum)  # as a terminal does: the worker processes get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, stderr
    (run,) = tmp_path.iterdir()
    assert f"--resume {run}" in stderr.splitlines()[-1]
    global_step, *_ = load_checkpoint(run / "checkpoint.zip")["loop"]["state"]
    rows = list(csv.DictReader((run / "episodes.csv").open()))
    assert global_step >= int(rows[-1]["global_step"]) >= 200


def test_full_disk_keeps_the_older_checkpoint_and_trains_on(monkeypatch, tmp_path, capsys):
    """From the first checkpoint on, no file may grow larger than that one; the next ones hold more transitions."""
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), runs.save_checkpoint

    def save_and_limit(path, *args):
        save(path, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 500, limits[1]))

    monkeypatch.setattr(runs, "save_checkpoint", save_and_limit)
    try:
        run = qsm.main(Args(**QUICK | {"env_id": "Ant-v4"}, checkpoint_every=20, run_dir=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "nothing saved at step 60: [Errno 27] File too large" in capsys.readouterr().out
    assert load_checkpoint(run / "checkpoint.zip")["loop"]["state"][0] == 20
    assert not list(run.glob("*.tmp"))


def test_full_disk_while_logging_stops_with_one_line(monkeypatch, tmp_path, capsys):
    real = runs.RunFolder.log_episode

    def full(self, global_step, *episode):
        if global_step > 40:
            raise OSError(28, "No space left on device")
        real(self, global_step, *episode)

    monkeypatch.setattr(runs.RunFolder, "log_episode", full)
    with pytest.raises(SystemExit, match="1"):
        qsm.main(Args(**QUICK, checkpoint_every=20, run_dir=tmp_path))
    assert "No space left on device" in error_line(capsys)
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "checkpoint.zip")["loop"]["state"][0] == 40


def test_environment_of_a_module(monkeypatch, tmp_path):
    """--env-id module:id, as gym.make takes it; the folder's name is one that every file system takes."""
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    text = f"import gymnasium\ngymnasium.register('Toy-v0', '{entry_point}', max_episode_steps=10)\n"
    (tmp_path / "toy_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    run = qsm.main(Args(**QUICK | {"env_id": "toy_module:Toy-v0"}, run_dir=tmp_path / "runs"))
    assert run.name.startswith("toy_module-Toy-v0__qsm__1__")
    assert len(list(csv.DictReader((run / "episodes.csv").open()))) == 6


def test_every_argument_is_read():
    source = "".join((ROOT / name).read_text() for name in ("qsm.py", "runs.py", "fast.py"))
    for field in fields(Args):
        read = rf"""\bargs(\.|\["){field.name}\b"""
        assert re.search(read, source), f"{field.name} is declared and never read"


def command_line(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "qsm.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)


def test_command_line_trains_evaluates_and_saves(tmp_path):
    flags = "--env-id Hopper-v4 --num-envs 2 --total-timesteps 400 --learning-starts 200 --utd 0.5 --hidden-dims 32 32"
    flags += f" --eval-every 200 --eval-episodes 2 --log-every 100 --device cpu --run-dir {tmp_path}"
    result = command_line(*flags.split())
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.iterdir()
    steps = [int(row["global_step"]) for row in csv.DictReader((run / "evaluations.csv").open())]
    assert steps == [0, 0, 200, 200, 400, 400]
    saved = torch.load(run / "model.pt", weights_only=True)
    net = ScoreNet(11, 3, saved["args"]["hidden_dims"], saved["args"]["diffusion_steps"])
    net.load_state_dict(saved["score_net"])
    assert list(run.glob("events.out.tfevents.*"))


def test_line_numbers_of_the_paper_map_are_right():
    spec = importlib.util.spec_from_file_location("paper_map", ROOT / "docs/paper_map.py")
    paper_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper_map)
    page = paper_map.PAGE.read_text()
    assert page.count("#L") > 30
    assert page == paper_map.with_line_numbers(page), "run python docs/paper_map.py"


def test_readme_snippet_acts_with_a_saved_policy(tmp_path, monkeypatch):
    args = Args(hidden_dims=(8, 8))
    score_net = make_learner(args, 376, 17, "cpu").score_net
    torch.save({"score_net": score_net.state_dict(), "args": vars(args) | {"run_dir": "runs"}}, tmp_path / "model.pt")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(snippet, variables)
    assert variables["actions"].shape == (1, 17)
    assert variables["actions"].abs().max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--env-id", "CartPole-v1"), "continuous"),
        (("--gamma", "2"), "--gamma"),
        (("--device", "tpu"), "--device"),
        (("--device", "cuda:99"), "--device"),
        (("--device", "cpu", "--cuda-graph", "True"), "--cuda-graph"),
        (("--run-dir", "/dev/null/runs"), "/dev/null"),
    ],
)
def test_command_line_refuses_in_one_line(flags, message):
    result = command_line("--env-id", "Pendulum-v1", *flags)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
