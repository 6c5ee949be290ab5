"""Q-Score Matching (QSM): off-policy reinforcement learning with a diffusion-model policy.

Psenka, Escontrela, Abbeel, Ma: "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024,
arXiv 2312.11752. A policy pi(a|s) ~ exp(alpha Q(s, a)) has the score grad_a log pi = alpha dQ/da. QSM regresses the
denoiser of a diffusion policy onto that action gradient of the critic, instead of back-propagating through the
denoising chain. One update (Algorithm 1), on a batch (s, a, r, s'):

    y = r + gamma min_i Q'_i(s', a'),  a' ~ denoise(score_net, s')        critics: mean (Q_i(s, a) - y)^2
    a_t = sqrt(alphas_cumprod_t) a + sqrt(1 - alphas_cumprod_t) noise     forward diffusion of the replayed action
    score_net: mean (eps_theta(s, a_t, t) + alpha dQ/da(s, a_t))^2        eps is minus the score, hence the plus

    python qsm.py --env-id Humanoid-v4
    python qsm.py --env-id HalfCheetah-v4 --num-envs 4 --utd 0.25 --hidden-dims 256 256
    python qsm.py --help

Needs beside it: networks.py, buffer.py, envs.py. "Released" below means the authors' JAX code, github.com/
Alescontrela/score_matching_rl at 2e77893; SML is its jaxrl5/agents/score_matching/score_matching_learner.py and DIF
its jaxrl5/networks/diffusion.py. Where paper and released code differ, the line says which one it follows.
"""

import csv
import dataclasses
import math
import random
import time
from collections import deque
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import psutil
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from buffer import Batch, ReplayBuffer
from envs import finished_episodes, make_envs, true_next_obs
from networks import Critic, ScoreNet


@dataclasses.dataclass
class Args:
    # --- run ---
    env_id: str = "Humanoid-v4"
    """Gymnasium id with continuous, bounded actions; dm_control/walker-walk-v0 and its like need shimmy"""
    seed: int = 1
    """seed of Python, NumPy, torch, the environments and the action space"""
    device: str = "auto"
    """auto (CUDA when there is one), cpu, cuda or cuda:N"""
    run_dir: Path = Path("runs")
    """where the folder of this run is made: event file, CSVs, final networks"""
    total_timesteps: int = 1_000_000
    """environment steps, counted over all environments"""
    num_envs: int = 1
    """environments stepped together"""
    async_envs: bool | None = None
    """a worker process per environment; default: when there are several environments and several cores"""
    eval_every: int = 10_000
    """environment steps between evaluations; the first is before training; 0: never"""
    eval_episodes: int = 10
    """episodes of an evaluation, one per evaluation environment"""
    log_every: int = 1_000
    """environment steps between scalars in the event file (each reads them from the device)"""
    compile: bool = False
    """torch.compile the target and the losses: faster after up to a minute of compilation, needs a C++ compiler"""

    # --- reinforcement learning ---
    buffer_size: int = 1_000_000
    """transitions kept, on the training device"""
    learning_starts: int = 10_000
    """environment steps with uniform random actions before the first update"""
    batch_size: int = 256
    """transitions in an update (N in Algorithm 1)"""
    utd: float = 1.0
    """update-to-data ratio: gradient updates per environment step, fractions included"""
    gamma: float = 0.99
    """discount (gamma)"""
    tau: float = 0.005
    """step of the target critics towards the critics in each update (tau)"""
    actor_lr: float = 3e-4
    """Adam learning rate of the score network (phi)"""
    actor_lr_decay: float = 2.0
    """cosine-decay the actor's learning rate to 0 over this many run lengths (released: 2); 0: constant"""
    critic_lr: float = 3e-4
    """Adam learning rate of the critics (theta)"""
    hidden_dims: tuple[int, ...] = (512, 512)
    """widths of the hidden layers of score network and critics (released: 512 512; paper: 256 256)"""
    action_noise: float = 0.1
    """standard deviation of the Gaussian noise on behaviour and target actions"""

    # --- diffusion ---
    diffusion_steps: int = 5
    """denoising steps (T)"""
    beta_schedule: Literal["vp", "cosine", "linear"] = "vp"
    """noise schedule (beta_t)"""
    score_target: Literal["released"] = "released"
    """what eps_theta is regressed onto; released: -alpha dQ/da"""
    alpha: float = 50.0
    """inverse temperature (alpha in Algorithm 1; M_q in the released code): higher is greedier"""


# ------------------------------------------------------------------------------------------------------- diffusion


class Schedule(NamedTuple):
    """Noise schedule of the diffusion; each entry (T,), index t = 0 is the least noisy step."""

    betas: torch.Tensor
    alphas: torch.Tensor  # 1 - betas
    alphas_cumprod: torch.Tensor  # products of alphas up to and including t


def make_schedule(name: str, diffusion_steps: int, device: torch.device | str = "cpu") -> Schedule:
    """The released schedules (DIF:8-32), computed in float64.

    vp:     alpha_t = exp(-b_min / T - (b_max - b_min) (2t - 1) / (2 T^2)), t = 1 .. T, b_min 0.1, b_max 10
    cosine: alphas_cumprod_t = f(t) / f(0), f(t) = cos^2(pi/2 (t / T + 0.008) / 1.008), betas at most 0.999
    linear: betas from 1e-4 to 2e-2
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
    else:
        raise ValueError(f"unknown beta schedule {name!r}: vp, cosine or linear")
    alphas = 1 - betas
    return Schedule(*(x.to(device, torch.float32) for x in (betas, alphas, alphas.cumprod(0))))


@torch.no_grad()
def sample_actions(
    score_net: ScoreNet, obs: torch.Tensor, noise: torch.Tensor, schedule: Schedule, action_noise: float = 0.0
) -> torch.Tensor:
    """Actions of the policy by DDPM ancestral sampling (DIF:70-102), (B, O) -> (B, A) in [-1, 1].

    Args:
        noise: standard normal, (T + 1, B, A): the start a_T, the T - 1 step noises, the action noise. An argument,
            so that the function is deterministic, compilable, and never replays frozen noise in a CUDA graph.
        action_noise: standard deviation of the noise on the result (SML:193-195 and 299-301), 0 for evaluation.
    """
    betas, alphas, alphas_cumprod = schedule
    T = len(betas)
    rescale = alphas.rsqrt()  # (T,)
    eps_scale = betas * (1 - alphas_cumprod).rsqrt()  # (T,)
    noise_scale = betas.sqrt()  # (T,), the larger of DDPM's two variances, beta_t
    time_features = score_net.time_features()  # (T, H)
    obs_features = score_net.obs_features(obs)  # (B, H)
    actions = noise[0]  # a_T ~ N(0, I), not clamped
    for t in reversed(range(T)):
        eps_pred = score_net.denoise(obs_features + time_features[t], actions)  # (B, A)
        actions = rescale[t] * (actions - eps_scale[t] * eps_pred)
        if t > 0:  # the last step is deterministic
            actions = actions + noise_scale[t] * noise[T - t]
        actions = actions.clamp(-1, 1)  # after every step: the bounds of the action space
    return (actions + action_noise * noise[T]).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------- targets and losses


class Noise(NamedTuple):
    """All randomness of one update, drawn ahead so that the losses are functions of their arguments."""

    next_actions: torch.Tensor  # (T + 1, B, A) standard normal, for sample_actions at s'
    actions: torch.Tensor  # (B, A) standard normal, for the forward diffusion of the replayed actions
    t: torch.Tensor  # (B,) integers, uniform on 0 .. T-1 (SML:250)


def draw_noise(T: int, batch_size: int, act_dim: int, generator: torch.Generator) -> Noise:
    """Fresh randomness for one update, on the generator's device."""
    kwargs = dict(device=generator.device, generator=generator)
    normal = torch.randn(T + 2, batch_size, act_dim, **kwargs)
    return Noise(normal[:-1], normal[-1], torch.randint(T, (batch_size,), **kwargs))


@torch.no_grad()
def td_target(
    score_net: ScoreNet,
    critic_target: Critic,
    batch: Batch,
    noise: torch.Tensor,
    schedule: Schedule,
    gamma: float,
    action_noise: float,
) -> torch.Tensor:
    """y = r + gamma min_i Q'_i(s', a'), a' from the current policy (Algorithm 1 line 4; SML:180-210), (B,).

    Time limits bootstrap: only a termination, never a truncation, ends the sum of rewards.
    """
    next_actions = sample_actions(score_net, batch.next_obs, noise, schedule, action_noise)
    next_q = critic_target(batch.next_obs, next_actions).amin(0)  # (B,), clipped double Q
    check_shapes(next_q.shape, rewards=batch.rewards, terminations=batch.terminations)
    return batch.rewards + gamma * (1 - batch.terminations) * next_q


def critic_loss(critic: Critic, batch: Batch, target_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over both critics of mean (Q_i(s, a) - y)^2 (Algorithm 1 line 5; SML:214-222), and Q, (2, B)."""
    q = critic(batch.obs, batch.actions)  # (2, B)
    check_shapes(q.shape[1:], target_q=target_q)
    return (q - target_q).square().mean(1).sum(), q.detach()


def q_gradient(critic: Critic, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """dQ/da averaged over the two critics, (B, O) and (B, A) -> (B, A), without any gradient to the critics.

    Released: the mean here, although the TD target takes the minimum (SML:271); online critics (SML:263-269).
    """
    with torch.no_grad():  # torch.func.grad still differentiates inside; the result is a constant outside
        return torch.func.grad(lambda a: critic(obs, a).mean(0).sum())(actions)


def diffuse(actions: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """a_t = sqrt(alphas_cumprod_t) a + sqrt(1 - alphas_cumprod_t) noise (SML:255-259), (B, A)."""
    alphas_cumprod = schedule.alphas_cumprod[t, None]  # (B, 1)
    return alphas_cumprod.sqrt() * actions + (1 - alphas_cumprod).sqrt() * noise


def eps_target(q_grad: torch.Tensor, alpha: float) -> torch.Tensor:
    """What eps_theta(s, a_t, t) is regressed onto, (B, A): -alpha dQ/da(s, a_t).

    The score is alpha dQ/da, and eps is minus the score: the sign of the code (SML:279), where its README has a plus.
    Released: no factor sqrt(1 - alphas_cumprod_t), so the temperature varies with t.
    """
    return -alpha * q_grad


def actor_loss(
    score_net: ScoreNet, critic: Critic, batch: Batch, noise: Noise, schedule: Schedule, alpha: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mean (eps_theta(s, a_t, t) - eps_target)^2 (Algorithm 1 line 6; SML:246-288), and health metrics.

    dQ/da is taken at the noised action as in the released code; the paper's algorithm takes the replayed one.
    """
    noisy_actions = diffuse(batch.actions, noise.actions, noise.t, schedule)  # (B, A)
    q_grad = q_gradient(critic, batch.obs, noisy_actions)  # (B, A)
    target = eps_target(q_grad, alpha)  # (B, A)
    eps_pred = score_net(batch.obs, noisy_actions, noise.t)  # (B, A)
    metrics = {
        "diffusion/q_grad_abs": q_grad.abs().mean(),
        "diffusion/target_abs": target.abs().mean(),
        "diffusion/cosine": torch.cosine_similarity(eps_pred.detach(), target, dim=-1).mean(),
    }
    return (eps_pred - target).square().mean(), metrics


def check_shapes(shape: torch.Size, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless every tensor has this shape: (B, 1) against (B,) would broadcast to (B, B)."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


# ---------------------------------------------------------------------------------------------------------- update


class Learner(NamedTuple):
    """Everything that an update changes."""

    score_net: ScoreNet
    critic: Critic
    critic_target: Critic
    actor_optimizer: torch.optim.Adam
    critic_optimizer: torch.optim.Adam


def make_learner(args: Args, obs_dim: int, act_dim: int, device: torch.device | str) -> Learner:
    """Networks with targets theta' = theta (Algorithm 1 line 1), and their optimizers."""
    score_net = ScoreNet(obs_dim, act_dim, args.hidden_dims, args.diffusion_steps).to(device)
    critic, critic_target = (Critic(obs_dim, act_dim, args.hidden_dims).to(device) for _ in range(2))
    critic_target.load_state_dict(critic.state_dict())
    actor_lr = torch.tensor(args.actor_lr, device=device)  # a tensor: changed in place, also under a CUDA graph
    return Learner(
        score_net,
        critic,
        critic_target.requires_grad_(False),
        torch.optim.Adam(score_net.parameters(), lr=actor_lr, fused=True),
        torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True),
    )


def update(learner: Learner, batch: Batch, noise: Noise, schedule: Schedule, args: Args) -> dict[str, torch.Tensor]:
    """One pass of Algorithm 1 lines 4 to 7. No host synchronisation; returns metrics as detached device tensors."""
    score_net, critic, critic_target, actor_optimizer, critic_optimizer = learner

    target_q = td_target(
        score_net, critic_target, batch, noise.next_actions, schedule, args.gamma, args.action_noise
    )  # (B,)
    q_loss, q = critic_loss(critic, batch, target_q)
    critic_optimizer.zero_grad()
    q_loss.backward()
    critic_optimizer.step()
    # theta' <- tau theta + (1 - tau) theta'
    torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)

    eps_loss, metrics = actor_loss(score_net, critic, batch, noise, schedule, args.alpha)
    actor_optimizer.zero_grad()
    eps_loss.backward()
    actor_optimizer.step()
    return metrics | {
        "losses/critic_loss": q_loss.detach(),
        "losses/actor_loss": eps_loss.detach(),
        "losses/q_values": q.mean(),
    }


def actor_lr_at(num_updates: int, args: Args) -> float:
    """Learning rate of the score network: cosine decay over `actor_lr_decay` run lengths (SML:96)."""
    if args.actor_lr_decay == 0:
        return args.actor_lr
    decay_updates = args.actor_lr_decay * args.utd * args.total_timesteps
    return args.actor_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, num_updates / decay_updates)))


# ------------------------------------------------------------------------------------------- evaluation and health


def evaluate(score_net: ScoreNet, envs, schedule: Schedule, seed: int) -> list[tuple[float, int]]:
    """(return, length) of one episode in each environment: actions sampled, no action noise (SML:306-320).

    Environments and random numbers are its own and start from `seed`: the training run is the same with and
    without evaluation, and all evaluations of a run start from the same states.
    """
    device = schedule.betas.device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(schedule.betas) + 1, envs.num_envs, envs.single_action_space.shape[0])
    episodes: dict[int, tuple[float, int]] = {}
    obs, _ = envs.reset(seed=seed)
    while len(episodes) < envs.num_envs:
        noise = torch.randn(shape, device=device, generator=generator)
        actions = sample_actions(score_net, to_tensor(obs, device), noise, schedule)
        obs, _, terminations, truncations, infos = envs.step(actions.cpu().numpy())
        for i, episode_return, length in finished_episodes(terminations | truncations, infos):
            episodes.setdefault(i, (episode_return, length))  # the first of each: long episodes count as much as short
    return [episodes[i] for i in range(envs.num_envs)]


def policy_statistics(score_net: ScoreNet, obs: torch.Tensor, noise: torch.Tensor, schedule: Schedule):
    """Is the policy stuck on the bounds, has it collapsed? Over K samples at each of B states, noise (T + 1, K B, A)."""
    actions = sample_actions(score_net, obs.repeat(noise.shape[1] // len(obs), 1), noise, schedule)  # (K B, A)
    return {
        "diffusion/bound_share": (actions.abs() == 1).float().mean(),  # share of coordinates at +-1
        "diffusion/action_std": actions.view(-1, *obs.shape[:1], actions.shape[-1]).std(0).mean(),
    }


# ------------------------------------------------------------------------------------------------------------- run


def to_tensor(x: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """float32 on the device; cast first, so that half the bytes travel."""
    return torch.from_numpy(x.astype(np.float32)).to(device)


def stop(message: str):
    """End the program with one line and exit code 1."""
    raise SystemExit(f"qsm.py: {message}")


def check_args(args: Args) -> None:
    """Refuse impossible values before anything is built."""
    for name in ("total_timesteps", "num_envs", "eval_episodes", "log_every", "buffer_size", "batch_size"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("learning_starts", "eval_every", "actor_lr_decay", "action_noise", "alpha", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            stop(f"--{name.replace('_', '-')} must be at least 0 and finite, got {getattr(args, name)}")
    for name in ("utd", "actor_lr", "critic_lr"):
        if not 0 < getattr(args, name) < math.inf:
            stop(f"--{name.replace('_', '-')} must be above 0 and finite, got {getattr(args, name)}")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name} must be in [0, 1], got {getattr(args, name)}")
    if args.diffusion_steps < 1:
        stop(f"--diffusion-steps must be at least 1, got {args.diffusion_steps}")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        stop(f"--hidden-dims must be one or more positive widths, got {args.hidden_dims}")
    if args.buffer_size < args.num_envs:
        stop(f"--buffer-size {args.buffer_size} cannot hold one step of --num-envs {args.num_envs}")


def get_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        stop(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        stop(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use")
    return device


def check_buffer_fits(num_bytes: int, device: torch.device) -> None:
    """Say before the run, not after hours of it, that the replay buffer will not fit."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if num_bytes > free:
        stop(
            f"the replay buffer needs {num_bytes / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free: "
            "lower --buffer-size"
        )


def main(args: Args) -> Path:
    """Train, and return the folder of the run."""
    check_args(args)
    device = get_device(args.device)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    try:  # environments first: worker processes are forked before CUDA starts
        envs = make_envs(args.env_id, args.num_envs, args.async_envs)
        eval_envs = make_envs(args.env_id, args.eval_episodes, asynchronous=False) if args.eval_every else None
    except ValueError as error:
        stop(str(error))
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    envs.action_space.seed(args.seed)

    check_buffer_fits(ReplayBuffer.num_bytes(args.buffer_size, obs_dim, act_dim), device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    learner = make_learner(args, obs_dim, act_dim, device)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps, device)
    T = args.diffusion_steps
    rng = torch.Generator(device).manual_seed(args.seed)  # acting and updates
    log_rng = torch.Generator(device).manual_seed(args.seed)  # diagnostics, so that they do not disturb training
    eval_seed = args.seed + 1_000_000  # apart from the training environments' seed .. seed + num_envs - 1

    run_name = f"{args.env_id.replace('/', '-')}__qsm__{args.seed}__{int(time.time())}"
    run_path = args.run_dir / run_name
    writer = SummaryWriter(run_path)
    rows = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    episodes_csv = CsvFile(run_path / "episodes.csv", ("global_step", "env", "return", "length"))
    evaluations_csv = CsvFile(run_path / "evaluations.csv", ("global_step", "episode", "return", "length"))

    def run_evaluation(global_step: int) -> None:
        episodes = evaluate(learner.score_net, eval_envs, schedule, eval_seed)
        evaluations_csv.write([(global_step, i, *episode) for i, episode in enumerate(episodes)])
        returns = np.array([episode_return for episode_return, _ in episodes])
        writer.add_scalar("eval/return_mean", returns.mean(), global_step)
        writer.add_scalar("eval/return_std", returns.std(), global_step)
        progress.write(f"step {global_step}: evaluation return {returns.mean():.1f} +- {returns.std():.1f}")

    if args.compile:  # functions, not modules, so that checkpoints keep their names; deleting this changes only speed
        for function in (td_target, critic_loss, actor_loss):
            globals()[function.__name__] = torch.compile(function, fullgraph=True)

    global_step = num_updates = 0
    metrics: dict[str, torch.Tensor] = {}
    last_returns: deque[float] = deque(maxlen=10)
    progress = tqdm(total=args.total_timesteps, unit="step", dynamic_ncols=True, mininterval=1.0)
    obs, _ = envs.reset(seed=args.seed)  # env i gets seed + i
    if args.eval_every:
        run_evaluation(global_step)
    log_time, log_step = time.perf_counter(), global_step

    while global_step < args.total_timesteps:
        # 1. Act: uniform at first, then a^T ~ N(0, I) denoised to a^0, plus action noise (Algorithm 1 line 2).
        obs_tensor = to_tensor(obs, device)  # (N, O)
        if global_step < args.learning_starts:
            actions = torch.from_numpy(envs.action_space.sample()).to(device)  # (N, A)
        else:
            noise = torch.randn(T + 1, args.num_envs, act_dim, device=device, generator=rng)
            actions = sample_actions(learner.score_net, obs_tensor, noise, schedule, args.action_noise)
        envs.step_async(actions.cpu().numpy())

        # 2. Update while the environments step. The batches lag by one vector step: the transitions under way are
        # not in the buffer yet. The number of updates is exact: floor(utd * steps since learning_starts).
        while num_updates < math.floor((global_step - args.learning_starts) * args.utd + 1e-9):
            learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(num_updates, args))
            batch = buffer.gather(buffer.sample_indices(args.batch_size, rng))
            metrics = update(learner, batch, draw_noise(T, args.batch_size, act_dim, rng), schedule, args)
            num_updates += 1

        # 3. Store. An action with N(0, I) under it never leaves [-1, 1], a broken simulator does leave the reals.
        next_obs, rewards, terminations, truncations, infos = envs.step_wait()
        dones = terminations | truncations
        final_obs = true_next_obs(next_obs, dones, infos)
        if not (np.isfinite(rewards).all() and np.isfinite(final_obs).all()):
            stop(f"the simulator returned a non-finite reward or observation at step {global_step}; nothing was stored")
        transitions = (rewards, final_obs, terminations)
        buffer.add(Batch(obs_tensor, actions, *(to_tensor(x, device) for x in transitions)))
        obs = next_obs
        global_step += args.num_envs
        progress.update(args.num_envs)

        # 4. Log and evaluate.
        for i, episode_return, length in finished_episodes(dones, infos):
            last_returns.append(episode_return)
            episodes_csv.write([(global_step, i, episode_return, length)])
            writer.add_scalar("charts/episodic_return", episode_return, global_step)
            writer.add_scalar("charts/episodic_length", length, global_step)
        if global_step // args.log_every > (global_step - args.num_envs) // args.log_every:
            sps = (global_step - log_step) / (time.perf_counter() - log_time)
            log_time, log_step = time.perf_counter(), global_step
            writer.add_scalar("charts/SPS", sps, global_step)
            if metrics:
                states = buffer.gather(buffer.sample_indices(64, log_rng)).obs
                noise = torch.randn(T + 1, 16 * 64, act_dim, device=device, generator=log_rng)
                metrics |= policy_statistics(learner.score_net, states, noise, schedule)
            for key, value in metrics.items():
                writer.add_scalar(key, value.item(), global_step)
            mean_return = f"{np.mean(last_returns):.1f}" if last_returns else "-"
            progress.set_postfix_str(f"return {mean_return}, SPS {sps:.0f}", refresh=False)
        if args.eval_every and global_step // args.eval_every > (global_step - args.num_envs) // args.eval_every:
            run_evaluation(global_step)
            log_time, log_step = time.perf_counter(), global_step  # evaluation is not counted in SPS

    torch.save(
        {
            "score_net": learner.score_net.state_dict(),
            "critic": learner.critic.state_dict(),
            "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        },
        run_path / "model.pt",
    )
    progress.close()
    writer.close()
    episodes_csv.file.close()
    evaluations_csv.file.close()
    envs.close()
    if eval_envs:
        eval_envs.close()
    print(f"saved {run_path / 'model.pt'}")
    return run_path


class CsvFile:
    """Rows flushed as they are written, so that a killed run keeps its results."""

    def __init__(self, path: Path, header: tuple[str, ...]):
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.write([header])

    def write(self, rows: list[tuple]) -> None:
        self.writer.writerows(rows)
        self.file.flush()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
