"""Q-Score Matching (QSM): off-policy reinforcement learning with a diffusion-model policy.

Psenka, Escontrela, Abbeel, Ma: "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024,
arXiv 2312.11752. A policy pi(a|s) ~ exp(alpha Q(s, a)) has the score grad_a log pi = alpha dQ/da. QSM regresses the
network of a diffusion policy onto that action gradient, instead of back-propagating through the denoising chain.

The paper's Algorithm 1, with Psi the score network (of the ICLR 2024 submission; the ICML text was not at hand):

    1  initialise critics Q_1, Q_2, score network Psi, targets Q' = Q, an empty replay buffer
    2  act with a sample of the diffusion policy, store the transition
    3  draw a batch (s, a, r, s')
    4  y = r + gamma min_i Q'_i(s', a'),  a' ~ the diffusion policy at s'
    5  critics: minimise mean (Q_i(s, a) - y)^2
    6  score network: minimise mean |Psi(s, a) - dQ/da(s, a)|^2
    7  Q' <- tau Q + (1 - tau) Q'

--score-target released does line 6 as the authors' code does: noise a to a_t and regress eps(s, a_t, t) onto
-alpha dQ/da(s, a_t). The default, posterior, is ours and has another line 6, derived in docs/score_target.md: the
network predicts the clean action x(s, a_t, t), and is regressed onto the mean of
    p(a_0 | a_t) ~ exp(alpha g a_0) N(a_t; sqrt(alphas_cumprod_t) a_0, 1 - alphas_cumprod_t) on [-1, 1],
with g = dQ/da(s, x). This is exact where Q is linear. The policy's score at a_t is then
    (sqrt(alphas_cumprod_t) x - a_t) / (1 - alphas_cumprod_t).

    python qsm.py --env-id Humanoid-v4
    python qsm.py --env-id HalfCheetah-v4 --num-envs 4 --utd 0.25 --hidden-dims 256 256
    python qsm.py --evaluate runs/<run> --eval-episodes 20
    python qsm.py --help

Needs beside it networks.py, buffer.py, envs.py, fast.py and runs.py. "Released" below means the authors' JAX code,
github.com/Alescontrela/score_matching_rl at 2e77893; SML is its jaxrl5/agents/score_matching/score_matching_learner.py
and DIF its jaxrl5/networks/diffusion.py. Where paper and released code differ, the line says which one it follows.
"""

import atexit
import copy
import itertools
import math
import os
import random
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import tyro
from tqdm import tqdm

import runs
from buffer import Batch, ReplayBuffer
from envs import finished_episodes, finite_float32, make_envs, true_next_obs
from fast import accelerate, resolve_flags
from networks import Critic, ScoreNet
from runs import CheckpointError, RunFolder, StopRequest, stop

PRESETS = {  # evidence for the values of posterior: "Why these constants" in results/README.md
    "posterior": {"alpha": 10.0, "diffusion_steps": 10, "beta_schedule": "log-snr", "normalize_q_grad": True},
    "released": {"alpha": 50.0, "diffusion_steps": 5, "beta_schedule": "vp", "normalize_q_grad": False},
}


@dataclass
class Args:
    # --- run ---

    # Gymnasium id with bounded actions, or module:id; dm_control/walker-walk-v0 and its like need shimmy
    env_id: str = "Humanoid-v4"
    seed: int = 1  # of Python, NumPy, torch, the environments and the action space
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda or cuda:N
    deterministic: bool = False  # the same bits on every run on CUDA too, slower; a CPU gives them without it
    # compile update and acting; None: if there is a C++ compiler and there are more than 20,000 updates to make
    compile: bool | None = None
    cuda_graph: bool | None = None  # replay the update as one CUDA graph; None: on CUDA
    run_dir: Path = Path("runs")  # where the folder of this run is made: event file, CSVs, networks, checkpoint
    # mirror the event file to Weights & Biases (pip install wandb), which reads WANDB_PROJECT and WANDB_ENTITY
    track: bool = False
    total_timesteps: int = 1_000_000  # environment steps, counted over all environments
    num_envs: int = 1  # environments stepped together
    async_envs: bool | None = None  # a worker process for each; None: if there is a core for each, and one more
    eval_every: int = 10_000  # environment steps between evaluations, the first before training; 0: never
    eval_episodes: int = 10  # episodes of an evaluation, one per evaluation environment
    log_every: int = 1_000  # environment steps between scalars in the event file
    checkpoint_every: int = 100_000  # environment steps between checkpoints; one is always written at the end
    resume: Path | None = None  # folder of a run: continue it bit for bit, with the arguments it was started with
    evaluate: Path | None = None  # folder of a run: evaluate its policy, print and log the returns, and exit
    capture_video: bool = False  # with --evaluate: the first episode as mp4 (pip install moviepy)

    # --- reinforcement learning ---
    buffer_size: int = 1_000_000  # transitions kept, on the training device
    learning_starts: int = 10_000  # environment steps with uniform random actions before the first update
    batch_size: int = 256  # transitions in an update (N in Algorithm 1)
    utd: float = 1.0  # update-to-data ratio: gradient updates per environment step, fractions included
    gamma: float = 0.99  # discount (gamma)
    tau: float = 0.005  # step of the target critics towards the critics in each update (tau)
    actor_lr: float = 3e-4  # Adam learning rate of the score network (phi)
    actor_lr_decay: float = 2.0  # cosine-decay actor_lr to 0 over this many run lengths (released: 2); 0: constant
    critic_lr: float = 3e-4  # Adam learning rate of the critics (theta)
    hidden_dims: tuple[int, ...] = (512, 512)  # widths of score network and critics (paper: 256 256)
    action_noise: float = 0.1  # standard deviation of the Gaussian noise on behaviour and target actions

    # --- diffusion; None takes the value of PRESETS for the score target ---

    # posterior: regress onto the posterior mean of the clean action (ours); released: eps onto -alpha dQ/da
    score_target: Literal["posterior", "released"] = "posterior"
    # inverse temperature (Algorithm 1: alpha, released code: M_q), higher is greedier; posterior 10, released 50
    alpha: float | None = None
    diffusion_steps: int | None = None  # denoising steps (T); posterior 10, released 5
    beta_schedule: Literal["log-snr", "vp", "cosine", "linear"] | None = None  # posterior log-snr, released vp
    # divide dQ/da by a running mean of |dQ/da|: alpha means the same on every task; posterior True, released False
    normalize_q_grad: bool | None = None
    # actions drawn where one is needed to act or evaluate; the one with the highest min-Q acts (paper: 1)
    candidates: int = 1

    def __post_init__(self):
        for name, value in PRESETS[self.score_target].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# ------------------------------------------------------------------------------------------------------- diffusion


class Schedule(NamedTuple):
    """Noise schedule of the diffusion, index t = 0 is the least noisy step, and a quadrature on [-1, 1]."""

    betas: torch.Tensor  # (T,)
    alphas: torch.Tensor  # (T,) 1 - betas
    alphas_cumprod: torch.Tensor  # (T,) products of alphas up to and including t
    nodes: torch.Tensor  # (G,) for posterior_mean
    log_weights: torch.Tensor  # (G,)


def make_schedule(name: str, diffusion_steps: int, device: torch.device | str = "cpu") -> Schedule:
    """The released schedules (DIF:8-32) and one of ours, computed in float64.

    vp:      alpha_t = exp(-b_min / T - (b_max - b_min) (2t - 1) / (2 T^2)), t = 1 .. T, b_min 0.1, b_max 10
    cosine:  alphas_cumprod_t = f(t) / f(0), f(t) = cos^2(pi/2 (t / T + 0.008) / 1.008), betas at most 0.999
    linear:  betas from 1e-4 to 2e-2
    log-snr: log of the signal-to-noise ratio equally spaced, sigma_t = sqrt(1 - alphas_cumprod_t) from 0.1 to 0.995
    """
    T = diffusion_steps
    t = torch.arange(T + 1, dtype=torch.float64)
    if name == "vp":
        betas = 1 - torch.exp(-0.1 / T - 0.5 * (10 - 0.1) * (2 * t[1:] - 1) / T**2)
    elif name == "cosine":
        f = torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    elif name == "linear":
        betas = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)
    elif name == "log-snr":
        least, most = torch.tensor([0.1, 0.995], dtype=torch.float64).square().logit().neg()  # log SNR at both ends
        snr = torch.linspace(most if T == 1 else least, most, T, dtype=torch.float64)  # (T,)
        betas = 1 - snr.sigmoid() / torch.cat([torch.ones(1), snr[:-1].sigmoid()])
    else:
        raise ValueError(f"unknown beta schedule {name!r}: log-snr, vp, cosine or linear")
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    # Gauss-Legendre nodes: dense at the bounds, where exp(alpha Q) can be steep, and at most pi / G apart. A sum over
    # nodes h apart has a relative error of 2 exp(-2 pi^2 s^2 / h^2) for a Gaussian of width s, 5e-9 for h = s. Hence
    # twice as many nodes as make h the least width, which is that of t = 0.
    least_width = ((1 - alphas_cumprod[0]) / alphas_cumprod[0]).sqrt().item()
    nodes, weights = np.polynomial.legendre.leggauss(max(64, math.ceil(2 * math.pi / least_width)))
    quadrature = torch.from_numpy(nodes), torch.from_numpy(weights).log()
    return Schedule(*(x.to(device, torch.float32) for x in (betas, alphas, alphas_cumprod, *quadrature)))


@torch.no_grad()
def sample_actions(
    score_net: ScoreNet,
    obs: torch.Tensor,
    noise: torch.Tensor,
    schedule: Schedule,
    score_target: str,
    action_noise: float = 0.0,
) -> torch.Tensor:
    """Actions of the policy by DDPM ancestral sampling, (B, O) -> (B, A) in [-1, 1].

    Args:
        noise: standard normal, (T + 1, B, A): the start a_T, the T - 1 step noises, the action noise. An argument,
            so that the function is deterministic, compilable, and never replays frozen noise in a CUDA graph.
        score_target: what the network was trained for, see Args.
        action_noise: standard deviation of the noise on the result (SML:193-195 and 299-301), 0 for evaluation.
    """
    betas, alphas, alphas_cumprod, *_ = schedule
    T = len(betas)
    variance = 1 - alphas_cumprod  # (T,) sigma_t^2
    before = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])  # (T,) alphas_cumprod of step t - 1
    clean_scale, noisy_scale = before.sqrt() * betas / variance, alphas.sqrt() * (1 - before) / variance
    eps_scale, rescale = betas * variance.rsqrt(), alphas.rsqrt()
    noise_scale = betas.sqrt()  # (T,), the larger of DDPM's two choices of the variance
    time_features = score_net.time_features()  # (T, H)
    obs_features = score_net.obs_features(obs)  # (B, H)
    actions = noise[0]  # a_T ~ N(0, I), not clamped
    for t in reversed(range(T)):
        prediction = score_net.denoise(obs_features + time_features[t], actions)  # (B, A): score_net(obs, actions, t)
        step_noise = noise_scale[t] * noise[T - t] if t > 0 else 0  # the last step is deterministic
        if score_target == "posterior":  # the clean action; DDPM's step to the mean of a_{t-1} given it and a_t
            actions = clean_scale[t] * prediction.clamp(-1, 1) + noisy_scale[t] * actions + step_noise
        else:  # eps, and a clamp to the bounds of the action space after every step (DIF:85-94)
            actions = (rescale[t] * (actions - eps_scale[t] * prediction) + step_noise).clamp(-1, 1)
    return (actions + action_noise * noise[T]).clamp(-1, 1)


# --------------------------------------------------------------------------- action gradient and score target


class Noise(NamedTuple):
    """All randomness of one update, drawn ahead so that the losses are functions of their arguments."""

    next_actions: torch.Tensor  # (T + 1, B, A) standard normal, for sample_actions at s'
    actions: torch.Tensor  # (B, A) standard normal, for the forward diffusion of the replayed actions
    t: torch.Tensor  # (B,) integers, uniform on 0 .. T-1 (SML:250)


def draw_noise(T: int, batch_size: int, act_dim: int, generator: torch.Generator) -> Noise:
    """Fresh randomness for one update, on the generator's device."""
    normal = torch.randn(T + 2, batch_size, act_dim, device=generator.device, generator=generator)
    t = torch.randint(T, (batch_size,), device=generator.device, generator=generator)
    return Noise(normal[:-1], normal[-1], t)


def q_gradient(critic: Critic, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """dQ/da averaged over the two critics, (B, O) and (B, A) -> (B, A), without any gradient to the critics.

    Released: the mean here, although the TD target takes the minimum (SML:271); online critics (SML:263-269).
    """
    with torch.no_grad():  # torch.func.grad still differentiates inside; the result is a constant outside
        return torch.func.grad(lambda a: critic(obs, a).mean(0).sum())(actions)


def posterior_mean(
    drift: torch.Tensor, noisy_actions: torch.Tensor, alphas_cumprod: torch.Tensor, schedule: Schedule
) -> torch.Tensor:
    """E[a_0 | a_t] for Q linear with slope drift / alpha, (B, A) in [-1, 1]; ours, see docs/score_target.md.

    p(a_0 | a_t) ~ exp(drift a_0) N(a_t; sqrt(alphas_cumprod) a_0, 1 - alphas_cumprod) on [-1, 1] falls apart into
    coordinates. The mean of each is a softmax over the nodes of a quadrature: finite for every drift and every t.

    Args:
        drift: alpha dQ/da, (B, A).
        alphas_cumprod: of each row's t, (B, 1).
    """
    variance = 1 - alphas_cumprod  # (B, 1)
    slope = drift + noisy_actions * alphas_cumprod.sqrt() / variance  # (B, A)
    curvature = (alphas_cumprod / variance)[..., None]  # (B, 1, 1)
    logits = slope[..., None] * schedule.nodes - 0.5 * curvature * schedule.nodes.square()  # (B, A, G)
    return (logits + schedule.log_weights).softmax(-1) @ schedule.nodes


# ---------------------------------------------------------------------------------------------------------- update


class Learner(NamedTuple):
    """Everything that an update changes."""

    score_net: ScoreNet
    critic: Critic
    critic_target: Critic
    actor_optimizer: torch.optim.Adam
    critic_optimizer: torch.optim.Adam
    q_scale: torch.Tensor  # (2,), exponential averages of mean |dQ/da| and of 1, from zeros; their ratio is the mean
    skipped: torch.Tensor  # (), number of optimizer steps left out because their loss was not finite


def make_learner(args: Args, obs_dim: int, act_dim: int, device: torch.device | str) -> Learner:
    """Networks with targets theta' = theta (Algorithm 1 line 1), and their optimizers."""
    score_net = ScoreNet(obs_dim, act_dim, args.hidden_dims, args.diffusion_steps).to(device)
    critic = Critic(obs_dim, act_dim, args.hidden_dims).to(device)
    critic_target = copy.deepcopy(critic).requires_grad_(False)
    optimizers = make_optimizer(score_net, args.actor_lr), make_optimizer(critic, args.critic_lr)
    zeros = torch.zeros(2, device=device), torch.zeros((), device=device)
    return Learner(score_net, critic, critic_target, *optimizers, *zeros)


def make_optimizer(net: torch.nn.Module, lr: float) -> torch.optim.Adam:
    """Adam whose learning rate is a tensor, to be changed in place, and whose state exists before the first step."""
    device = next(net.parameters()).device
    lr = torch.tensor(lr, device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True, capturable=device.type == "cuda")
    with torch.enable_grad():  # also for a caller who only wants to act
        step(optimizer, sum(p.sum() for p in net.parameters()) * math.nan)  # makes the state, moves nothing
    return optimizer


def step(optimizer: torch.optim.Adam, loss: torch.Tensor) -> torch.Tensor:
    """One step down `loss`. Returns 1.0 if it is not finite, else 0.0.

    With `found_inf`, an attribute that torch's GradScaler sets too, a fused Adam leaves weights, moments and step count
    as they are. The decision is made on the device: the host does not wait.
    """
    optimizer.zero_grad()
    loss.backward()
    optimizer.found_inf = (~loss.detach().isfinite()).float()
    optimizer.step()
    return optimizer.found_inf


def update(learner: Learner, batch: Batch, noise: Noise, schedule: Schedule, args: Args) -> dict[str, torch.Tensor]:
    """Algorithm 1 lines 4 to 7, once. No host synchronisation; returns metrics as detached device tensors."""
    score_net, critic, critic_target, actor_optimizer, critic_optimizer, q_scale, skipped = learner
    posterior = args.score_target == "posterior"

    # Line 4: TD target (SML:180-210). Only a termination ends the sum of rewards; time limits bootstrap.
    with torch.no_grad():
        next_actions = sample_actions(
            score_net, batch.next_obs, noise.next_actions, schedule, args.score_target, args.action_noise
        )  # (B, A), of the score network itself: there is no target actor
        next_q = critic_target(batch.next_obs, next_actions).amin(0)  # (B,), clipped double Q
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # (B,)

    # Line 5: critics (SML:214-222).
    q = critic(batch.obs, batch.actions)  # (2, B)
    if y.shape != q.shape[1:]:
        raise ValueError(f"rewards and terminations must have shape (B,): the TD target has {tuple(y.shape)}")
    critic_loss = (q - y).square().mean(1).sum()
    skipped += step(critic_optimizer, critic_loss)

    # Line 6: score network. The replayed action is noised to level t (SML:250-259). dQ/da is taken at the clean action
    # that the network predicts from it; released: at the noised one (SML:263-269); the paper: at the replayed one.
    alphas_cumprod = schedule.alphas_cumprod[noise.t, None]  # (B, 1)
    noisy_actions = alphas_cumprod.sqrt() * batch.actions + (1 - alphas_cumprod).sqrt() * noise.actions  # (B, A)
    prediction = score_net(batch.obs, noisy_actions, noise.t)  # (B, A), the clean action; released: eps
    q_grad = q_gradient(critic, batch.obs, prediction.detach().clamp(-1, 1) if posterior else noisy_actions)  # (B, A)
    q_grad_abs = q_grad.abs().mean()
    new_q_scale = q_scale.lerp(torch.stack([q_grad_abs, torch.ones_like(q_grad_abs)]), 0.001)
    if args.normalize_q_grad:
        q_grad = q_grad / (new_q_scale[0] / new_q_scale[1]).clamp_min(1e-12)
    # Eps is minus sigma_t times the score, hence the sign (SML:279; the README of the released code has the other).
    drift = args.alpha * q_grad
    target = posterior_mean(drift, noisy_actions, alphas_cumprod, schedule) if posterior else -drift  # (B, A)
    actor_loss = (prediction - target).square().mean()
    skipped += step(actor_optimizer, actor_loss)
    q_scale.copy_(torch.where(actor_loss.isfinite(), new_q_scale, q_scale))

    # Line 7: target networks, theta' <- tau theta + (1 - tau) theta'.
    with torch.no_grad():
        torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)

    return {
        "losses/critic_loss": critic_loss.detach(),
        "losses/actor_loss": actor_loss.detach(),
        "losses/q_values": q.detach().mean(),
        "losses/skipped_steps": skipped.clone(),
        "diffusion/q_grad_abs": q_grad_abs,
        "diffusion/target_abs": target.abs().mean(),
        "diffusion/cosine": torch.cosine_similarity(prediction.detach(), target, dim=-1).mean(),
    }


def actor_lr_at(num_updates: int, args: Args) -> float:
    """Learning rate of the score network: cosine decay over `actor_lr_decay` run lengths (SML:96)."""
    if args.actor_lr_decay == 0:
        return args.actor_lr
    progress = num_updates / (args.actor_lr_decay * args.utd * args.total_timesteps)
    return args.actor_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ------------------------------------------------------------------------------------------- evaluation and health


@torch.no_grad()
def best_of(
    score_net: ScoreNet,
    critic: Critic,
    obs: torch.Tensor,
    noise: torch.Tensor,
    schedule: Schedule,
    args: Args,
    action_noise: float = 0.0,
) -> torch.Tensor:
    """Draw K actions in each of B states and return the one with the highest min-Q, (B, A); noise is (T + 1, K B, A).

    K = 1 is the paper's policy. Many diffusion-policy results use K > 1: compare like with like.
    """
    B, K = len(obs), noise.shape[1] // len(obs)
    if K == 1:
        return sample_actions(score_net, obs, noise, schedule, args.score_target, action_noise)
    obs_K = obs.repeat(K, 1)  # (K B, O)
    actions = sample_actions(score_net, obs_K, noise, schedule, args.score_target)  # (K B, A)
    best = critic(obs_K, actions).amin(0).view(K, B).argmax(0)  # (B,)
    actions = actions.view(K, B, -1)[best, torch.arange(B, device=best.device)]
    return (actions + action_noise * noise[-1, :B]).clamp(-1, 1)


def evaluate(
    score_net: ScoreNet,
    critic: Critic,
    envs,
    schedule: Schedule,
    args: Args,
    seed: int,
    candidates: int = 1,
    stopped=lambda: False,
) -> list[tuple[float, int]] | None:
    """(return, length) of one episode in each environment: actions sampled, without action noise (SML:306-320).

    Environments and random numbers are its own and start from `seed`: the training run is the same with and
    without evaluation, and all evaluations of a run start from the same states.
    """
    device = schedule.betas.device
    generator = torch.Generator(device).manual_seed(seed)
    noise_shape = (len(schedule.betas) + 1, candidates * envs.num_envs, envs.single_action_space.shape[0])
    episodes: dict[int, tuple[float, int]] = {}
    obs, _ = envs.reset(seed=seed)
    while len(episodes) < envs.num_envs:
        if stopped():
            return None
        noise = torch.randn(noise_shape, device=device, generator=generator)
        actions = best_of(score_net, critic, to_tensor(obs, device), noise, schedule, args)
        obs, _, terminations, truncations, infos = envs.step(actions.cpu().numpy())
        for i, episode_return, length in finished_episodes(terminations | truncations, infos):
            episodes.setdefault(i, (episode_return, length))  # one of each: short episodes do not count more often
    return [episodes[i] for i in range(envs.num_envs)]


def policy_statistics(score_net: ScoreNet, obs: torch.Tensor, noise: torch.Tensor, schedule: Schedule, args: Args):
    """Stuck on the bounds, or collapsed? From K samples at each of B states; noise is (T + 1, K B, A)."""
    obs_K = obs.repeat(noise.shape[1] // len(obs), 1)  # (K B, O)
    actions = sample_actions(score_net, obs_K, noise, schedule, args.score_target)  # (K B, A)
    return {
        "diffusion/bound_share": (actions.abs() == 1).float().mean(),  # share of coordinates at +-1
        "diffusion/action_std": actions.view(-1, len(obs), actions.shape[1]).std(0).mean(),
    }


# ------------------------------------------------------------------------------------------------------------- run


def to_tensor(x: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """float32 on the device; cast first, so that half the bytes travel."""
    return torch.from_numpy(x.astype(np.float32)).to(device)


def args_of(saved: dict) -> Args:
    """The arguments in a checkpoint or model."""
    try:
        return Args(**saved)
    except TypeError as error:
        raise CheckpointError(f"saved by another version of qsm.py: {error}") from None


def evaluate_saved(args: Args) -> Path:
    """--evaluate: print the returns of a saved policy and add them to evaluate.csv in its folder."""
    runs.name_ignored(args, {"evaluate", "eval_episodes", "candidates", "seed", "device", "capture_video", "env_id"})
    model = runs.load_model(args.evaluate / "model.pt")
    trained, global_step, seed = args_of(model["args"]), model["global_step"], args.seed + 1_000_000
    if ":" in trained.env_id and args.env_id != trained.env_id:  # gym.make would import, and so run, that module
        raise CheckpointError(f"the model names code to import; if you trust it, add --env-id {trained.env_id}")
    video = args.evaluate / "videos" / f"step-{global_step}-seed-{args.seed}" if args.capture_video else None
    device = runs.get_device(args.device)
    try:
        envs = make_envs(trained.env_id, args.eval_episodes, asynchronous=False, video=video)
        learner = make_learner(trained, *dimensions(envs), device)
        learner.score_net.load_state_dict(model["score_net"])
        learner.critic.load_state_dict(model["critic"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot evaluate {args.evaluate}: {runs.one_line(error)}") from None
    schedule = make_schedule(trained.beta_schedule, trained.diffusion_steps, device)
    episodes = evaluate(learner.score_net, learner.critic, envs, schedule, trained, seed, args.candidates)
    envs.close()
    protocol = {"seed": seed, "candidates": args.candidates, "action_noise": 0}
    runs.write_evaluation(args.evaluate / "evaluate.csv", trained.env_id, global_step, protocol, episodes)
    return args.evaluate


def dimensions(envs) -> tuple[int, int]:
    """Sizes O and A of one observation and one action."""
    return envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def train(args: Args) -> Path:
    """Train, from the start or from a checkpoint, and return the folder of the run."""
    saved, run_path = None, args.resume
    if run_path:
        runs.name_ignored(args, {"resume"})
        saved = runs.load_checkpoint(run_path / "checkpoint.zip")
        args = args_of(saved["loop"]["args"])
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    device = runs.get_device(args.device)
    given = dict(vars(args))  # as they are saved: what `resolve_flags` fills in depends on the machine
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    try:
        resolve_flags(args, device)
        envs = make_envs(args.env_id, args.num_envs, args.async_envs)  # worker processes are forked before CUDA starts
        eval_envs = make_envs(args.env_id, args.eval_episodes, asynchronous=False) if args.eval_every else None
        obs_dim, act_dim = dimensions(envs)
        buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    except (ValueError, MemoryError) as error:
        stop(error)
    atexit.register(envs.close)  # worker processes end first, however this one ends
    envs.action_space.seed(args.seed)
    learner = make_learner(args, obs_dim, act_dim, device)
    T = args.diffusion_steps
    schedule = make_schedule(args.beta_schedule, T, device)
    rng = torch.Generator(device).manual_seed(args.seed)  # acting and updates
    log_rng = torch.Generator(device).manual_seed(args.seed)  # diagnostics, which must not disturb training

    global_step = num_updates = 0
    metrics: dict[str, torch.Tensor] = {}
    last_returns: deque[float] = deque(maxlen=10)
    obs, _ = envs.reset(seed=args.seed)  # env i gets seed + i
    if saved:
        restored = runs.restore_checkpoint(run_path / "checkpoint.zip", saved, learner, buffer, envs, (rng, log_rng))
        global_step, num_updates, saved_obs, numbers, last_returns = saved["loop"]["state"]
        metrics = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
        obs = saved_obs if restored else obs  # without the simulators' state, new episodes are started
    else:
        name = f"{re.sub('[/:]', '-', args.env_id)}__qsm__{args.seed}__{int(time.time())}"
        tries = (args.run_dir / (f"{name}-{n}" if n else name) for n in itertools.count())
        run_path = next(path for path in tries if not path.exists())
    run = RunFolder(run_path, given, resumed_at=global_step if saved else None)

    def save(with_simulators: bool = True) -> bool:
        numbers = {name: value.item() for name, value in metrics.items()}
        state = (global_step, num_updates, obs, numbers, last_returns)
        return run.save(global_step, state, learner, buffer, envs, (rng, log_rng), with_simulators)

    def give_up(reason: object) -> NoReturn:
        saved_now = save(with_simulators=False)  # those may be what is broken
        where = f"step {global_step} with new episodes" if saved_now else "the last checkpoint, if there is one"
        stop(f"{reason}. To go on from {where}: --resume {run_path}")

    def run_evaluation() -> None:
        seed = args.seed + 1_000_000  # apart from the training environments' seed .. seed + num_envs - 1
        policy = learner.score_net, learner.critic
        try:
            episodes = evaluate(
                *policy, eval_envs, schedule, args, seed, args.candidates, lambda: bool(stop_request.signum)
            )
        except Exception as error:  # a simulator's own, of any kind; what is trained is not lost for it
            tqdm.write(f"step {global_step}: no evaluation, {type(error).__name__}: {runs.one_line(error)}")
            return
        if episodes:
            run.log_evaluation(global_step, args.candidates, episodes)

    stop_request = StopRequest()
    act, update_once = accelerate(best_of, update, args, device)  # without it only the speed differs
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, mininterval=1.0)
    evaluation_due = args.eval_every and global_step % args.eval_every < args.num_envs
    if evaluation_due and not run.has_evaluation(global_step):  # the first, or one that a signal broke off
        run_evaluation()
    log_time, log_step = time.perf_counter(), global_step

    while global_step < args.total_timesteps and not stop_request.signum:
        # 1. Act (Algorithm 1 line 2): uniformly at random at first, then with the policy plus action noise.
        obs_tensor = to_tensor(obs, device)  # (N, O)
        if global_step < args.learning_starts:
            actions = to_tensor(envs.action_space.sample(), device)  # (N, A)
        else:
            noise = torch.randn(T + 1, args.candidates * args.num_envs, act_dim, device=device, generator=rng)
            actions = act(learner.score_net, learner.critic, obs_tensor, noise, schedule, args, args.action_noise)
        actions_cpu = actions.cpu().numpy()
        if not np.isfinite(actions_cpu).all():
            give_up("the policy's actions are not finite: try a lower --actor-lr or --alpha")
        envs.step_async(actions_cpu)

        # 2. Update while the environments step. Batches lag by one vector step: the transitions under way are not in
        # the buffer yet. The count is exact: floor(utd * environment steps since learning_starts).
        updates_due = math.floor((global_step - args.learning_starts) * args.utd + 1e-9)
        while num_updates < updates_due:
            learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(num_updates, args))
            batch = buffer.gather(buffer.sample_indices(args.batch_size, rng))
            metrics = update_once(learner, batch, draw_noise(T, args.batch_size, act_dim, rng), schedule, args)
            num_updates += 1

        # 3. Store, in float32.
        try:
            next_obs, rewards, terminations, truncations, infos = envs.step_wait()
            dones = terminations | truncations
            rewards, next_obs, final_obs = finite_float32(rewards, next_obs, true_next_obs(next_obs, dones, infos))
        except (ChildProcessError, FloatingPointError) as error:
            give_up(error)
        except Exception as error:  # a simulator's own, of any kind
            give_up(f"an environment failed, {type(error).__name__}: {runs.one_line(error)}")
        buffer.add(Batch(obs_tensor, actions, *(to_tensor(x, device) for x in (rewards, final_obs, terminations))))
        obs = next_obs
        global_step += args.num_envs
        progress.update(args.num_envs)

        # 4. Log, evaluate, save.
        for episode in finished_episodes(dones, infos):
            last_returns.append(episode[1])
            run.log_episode(global_step, *episode)
        if global_step % args.log_every < args.num_envs or global_step >= args.total_timesteps:
            if metrics:
                states = buffer.gather(buffer.sample_indices(64, log_rng)).obs
                noise = torch.randn(T + 1, 16 * 64, act_dim, device=device, generator=log_rng)
                metrics |= policy_statistics(learner.score_net, states, noise, schedule, args)
                values = torch.stack(list(metrics.values())).tolist()  # one transfer for all of them
                run.log_scalars(global_step, dict(zip(metrics, values, strict=True)))
                if learner.skipped:
                    skipped = f"{learner.skipped.item():.0f} optimizer steps with a non-finite loss were left out"
                    learner.skipped.zero_()
                    give_up(f"{skipped}: try a lower --critic-lr, --actor-lr or --alpha")
            sps = (global_step - log_step) / (time.perf_counter() - log_time)
            run.log_scalars(global_step, {"charts/SPS": sps})
            mean_return = f"{np.mean(last_returns):.1f}" if last_returns else "-"
            progress.set_postfix_str(f"return {mean_return}, SPS {sps:.0f}", refresh=False)
            log_time, log_step = time.perf_counter(), global_step
        if args.eval_every and global_step % args.eval_every < args.num_envs:
            run_evaluation()
            log_time, log_step = time.perf_counter(), global_step  # SPS is the speed of training alone

        due = args.checkpoint_every and global_step % args.checkpoint_every < args.num_envs
        if due and global_step < args.total_timesteps:
            save()

    save()
    stop_request.restore()
    for closable in (progress, run, envs, eval_envs):
        if closable is not None:
            closable.close()
    if stop_request.signum:
        stop(f"stopped at step {global_step}; to continue: --resume {run_path}", code=128 + stop_request.signum)
    print(f"saved {run_path / 'model.pt'}")
    return run_path


def main(args: Args) -> Path:
    """Train, resume or evaluate; returns the folder of the run."""
    runs.check_args(args)
    with runs.errors_in_one_line():
        return evaluate_saved(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
