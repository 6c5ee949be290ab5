"""Q-Score Matching (QSM): off-policy reinforcement learning with a diffusion-model policy.

Psenka, Escontrela, Abbeel, Ma: "Learning a Diffusion Model Policy from Rewards via Q-Score
Matching", ICML 2024, arXiv 2312.11752. A policy pi(a|s) proportional to exp(alpha Q(s, a)) has the
score grad_a log pi = alpha dQ/da. QSM regresses the network of a diffusion policy onto that action
gradient, instead of back-propagating through the denoising chain. The paper's Algorithm 1, with Psi
the score network (from the ICLR 2024 submission; we did not have the ICML text):

    1  initialise critics Q_1, Q_2, score network Psi, targets Q' = Q, an empty replay buffer
    2  act with a sample of the diffusion policy, store the transition
    3  draw a batch (s, a, r, s')
    4  y = r + gamma min_i Q'_i(s', a'),  a' ~ the diffusion policy at s'
    5  critics: minimise mean (Q_i(s, a) - y)^2
    6  score network: minimise mean |Psi(s, a) - dQ/da(s, a)|^2
    7  Q' <- tau Q + (1 - tau) Q'

--score-target released does line 6 as the authors' code does: it noises a to a_t and regresses
eps(s, a_t, t) onto -alpha dQ/da(s, a_t). The default, posterior, is ours (docs/score_target.md).
The network predicts x(s, a_t, t), the mean clean action given a_t. Its target is the mean of
exp(alpha g a) N(a_t; sqrt(abar_t) a, 1 - abar_t) on [-1, 1], exact where Q is linear. Here abar is
alphas_cumprod and g the slope of Q over its running mean size, limited as `update` describes.

"Released" below is the authors' JAX code, github.com/Alescontrela/score_matching_rl at 2e77893; SML
is its jaxrl5/agents/score_matching/score_matching_learner.py, DIF its jaxrl5/networks/diffusion.py.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import runfiles
from buffer import Batch, ReplayBuffer
from envs import UserError, make_envs, reset, step
from fast import accelerate
from networks import Critic, ScoreNet

# Flags that depend on the score target: (posterior, released).
PRESETS = dict(alpha=(10.0, 50.0), diffusion_steps=(10, 5), beta_schedule=("log-snr", "vp"))
PRESETS |= dict(normalize_q_grad=(True, False), actor_lr=(1e-3, 3e-4), critic_lr=(1e-3, 3e-4))
PRESETS |= dict(policy_tau=(0.005, 1.0))


@dataclass
class Args:
    env_id: str = "Humanoid-v4"  # with bounded actions; module:id imports the module first
    seed: int = 1  # of Python, NumPy, torch, the environments and all random draws
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda or cuda:N
    deterministic: bool = False  # on CUDA too, the same bits in every run; slower
    tf32: bool = False  # on CUDA: matrix products in TensorFloat-32
    compile: bool | None = None  # None: if more than 20,000 updates are to be made
    cuda_graph: bool = True  # on CUDA: replay acting and updates as CUDA graphs
    run_dir: Path = Path("runs")  # where the folder of this run is made
    track: bool = False  # mirror the event file to Weights & Biases (WANDB_PROJECT, WANDB_ENTITY)
    total_timesteps: int = 1_000_000  # environment steps, counted over all environments
    num_envs: int = 1  # environments stepped together, in this process
    eval_every: int = 10_000  # environment steps between evaluations, the first at step 0; 0: never
    eval_episodes: int = 10  # episodes per evaluation, each in its own environment
    log_every: int = 1_000  # environment steps between scalars in the event file
    checkpoint_every: int = 100_000  # environment steps between checkpoints; one is made at the end
    resume: Path | None = None  # folder of a run: continue it, with its own flags but for --device

    buffer_size: int = 1_000_000  # transitions kept, on the training device
    learning_starts: int = 10_000  # first environment steps: uniform random actions, no updates
    batch_size: int = 256  # transitions in an update
    utd: float = 1.0  # update-to-data ratio: updates per environment step, fractions included
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target critics towards the critics in each update
    actor_lr_decay: float = 2.0  # actor_lr falls to 0 as a cosine over this many runs; 0: constant
    hidden_dims: tuple[int, ...] = (512, 512)  # of score network and critics (paper: 256 256)
    action_noise: float = 0.1  # std of Gaussian noise on behaviour and target actions
    candidates: int = 1  # actions drawn to act; the one with the highest min-Q is taken (paper: 1)

    score_target: Literal["posterior", "released"] = "posterior"  # what the network learns
    # None: its value in PRESETS; "10 or 5" is 10 with posterior, 5 with released
    alpha: float | None = None  # inverse temperature (released: M_q); 10 on the scaled dQ/da, or 50
    diffusion_steps: int | None = None  # denoising steps T; 10 or 5
    beta_schedule: Literal["log-snr", "vp"] | None = None  # noise schedule; log-snr or vp
    normalize_q_grad: bool | None = None  # divide dQ/da by its running mean size; True or False
    actor_lr: float | None = None  # Adam learning rate of the score network; 1e-3 or 3e-4
    critic_lr: float | None = None  # of the critics; 1e-3 or 3e-4
    policy_tau: float | None = None  # of the running average that is evaluated; 0.005 or 1 (none)

    def __post_init__(self):
        target = ("posterior", "released").index(self.score_target)
        for name, values in PRESETS.items():
            if getattr(self, name) is None:
                setattr(self, name, values[target])


class Schedule(NamedTuple):
    """Noise schedule of the diffusion, least noisy step first, and a quadrature on [-1, 1]."""

    betas: Tensor  # (T,)
    alphas: Tensor  # (T,) 1 - betas
    alphas_cumprod: Tensor  # (T,) products of alphas up to and including t
    clean_scale: Tensor  # (T,) DDPM's mean of a_{t-1} is clean_scale a + noisy_scale a_t
    noisy_scale: Tensor  # (T,)
    nodes: Tensor  # (G,) for posterior_mean
    log_weights: Tensor  # (G,)


def make_schedule(name: str, T: int, device: torch.device | str = "cpu") -> Schedule:
    """vp, the default of the released code (DIF:25-32), or log-snr; computed in float64.

    log-snr is ours: equal steps in log(abar / (1 - abar)), sqrt(1 - abar) from 0.1 to 0.995.
    """
    if name == "vp":
        t = torch.arange(1, T + 1, dtype=torch.float64)
        abar = torch.exp(-0.1 / T - 0.5 * (10 - 0.1) * (2 * t - 1) / T**2).cumprod(0)
    elif name == "log-snr":  # the log of the ratio, at the least and the most noise
        least, most = torch.tensor([0.1, 0.995], dtype=torch.float64).square().logit().neg()
        abar = torch.linspace(most, least, T, dtype=torch.float64).flip(0).sigmoid()
    else:
        raise UserError(f"--beta-schedule must be log-snr or vp, got {name}")
    abar_before = torch.cat([torch.ones(1), abar[:-1]])  # of t - 1
    betas = 1 - abar / abar_before
    clean_scale = abar_before.sqrt() * betas / (1 - abar)
    noisy_scale = (1 - betas).sqrt() * (1 - abar_before) / (1 - abar)
    # Gauss-Legendre nodes are at most pi / G apart: here half the narrowest Gaussian's width.
    G = max(64, math.ceil(2 * math.pi / ((1 - abar[0]) / abar[0]).sqrt()))
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(G))
    parts = betas, 1 - betas, abar, clean_scale, noisy_scale, nodes, weights.log()
    return Schedule(*(x.float().to(device) for x in parts))


@torch.no_grad()
def sample_actions(score_net, obs: Tensor, noise: Tensor, schedule: Schedule, args: Args) -> Tensor:
    """Actions of the policy by DDPM ancestral sampling, (B, O) -> (B, A) in [-1, 1].

    `noise` is standard normal, (T or more, B, A): the start and T - 1 step noises; the last step
    adds none. It is an argument, so that a CUDA graph never replays the same noise.
    """
    betas, alphas, abar, clean_scale, noisy_scale, *_ = schedule
    T = len(betas)
    # Noise of variance beta_t, as released: with DDPM's smaller one, few steps sample too narrowly.
    eps_scale, rescale, noise_scale = betas * (1 - abar).rsqrt(), alphas.rsqrt(), betas.sqrt()
    time_features = score_net.time_features()  # (T, H)
    obs_features = score_net.obs_features(obs)  # (B, H)
    a_t = noise[0]  # (B, A), not clamped
    for t in reversed(range(T)):
        prediction = score_net.denoise(obs_features + time_features[t], a_t)  # at (obs, a_t, t)
        step_noise = noise_scale[t] * noise[T - t] if t > 0 else 0
        if args.score_target == "posterior":  # predicts a: to the mean of a_{t-1} given a and a_t
            a_t = clean_scale[t] * prediction.clamp(-1, 1) + noisy_scale[t] * a_t + step_noise
        else:  # predicts eps; a_t is clamped after every step (DIF:85-94)
            a_t = (rescale[t] * (a_t - eps_scale[t] * prediction) + step_noise).clamp(-1, 1)
    return a_t.clamp(-1, 1)


class Noise(NamedTuple):
    """All random draws of one update, made beforehand: `update` itself is deterministic."""

    next_actions: Tensor  # (T + 1, B, A) standard normal, for sample_actions at s', action noise
    actions: Tensor  # (B, A) standard normal, for the forward diffusion of the replayed actions
    t: Tensor  # (B,) integers, uniform on 0 .. T-1 (SML:250)


def draw_noise(args: Args, act_dim: int, generator: torch.Generator) -> Noise:
    """Fresh randomness for one update, on the generator's device."""
    T, B = args.diffusion_steps, args.batch_size
    on = dict(device=generator.device, generator=generator)
    normal = torch.randn(T + 2, B, act_dim, **on)
    return Noise(normal[:-1], normal[-1], torch.randint(T, (B,), **on))


def q_gradient(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """dQ/da, mean of the online critics after line 5 (SML:263-271), (B, O), (B, A) -> (B, A)."""
    with torch.no_grad():  # torch.func.grad still differentiates inside; its result is a constant
        return torch.func.grad(lambda a: critic(obs, a).mean(0).sum())(actions)


def posterior_mean(drift: Tensor | float, a_t: Tensor, abar: Tensor, schedule: Schedule) -> Tensor:
    """E[a | a_t] for Q with the slope drift / alpha, (B, A) in [-1, 1]; docs/score_target.md.

    p(a | a_t) ~ exp(drift a) N(a_t; sqrt(abar) a, 1 - abar) on [-1, 1] is a product over
    coordinates. The mean of each is a softmax over quadrature nodes: finite for all drifts and t.
    """
    slope = drift + a_t * abar.sqrt() / (1 - abar)  # (B, A); abar is (B, 1)
    curvature = (abar / (1 - abar))[..., None]  # (B, 1, 1)
    nodes, log_weights = schedule.nodes, schedule.log_weights  # (G,)
    logits = slope[..., None] * nodes - 0.5 * curvature * nodes.square()  # (B, A, G)
    return (logits + log_weights).softmax(-1) @ nodes


class Learner(NamedTuple):
    """Everything that an update changes: networks, optimizers, tensors (fast.py slices it)."""

    score_net: ScoreNet
    critic: Critic
    critic_target: Critic
    policy: ScoreNet  # ours: running average of score_net, for evaluations and model.pt only
    actor_optimizer: torch.optim.Adam
    critic_optimizer: torch.optim.Adam
    q_scale: Tensor  # (2,), averages from 0 on of |q_grad| and of 1; their ratio is a running mean
    skipped: Tensor  # (), number of optimizer steps left out because their loss was not finite


def make_learner(args: Args, obs_dim: int, act_dim: int, device: torch.device | str) -> Learner:
    """Networks with targets Q' = Q (Algorithm 1 line 1), and their optimizers."""
    score_net = ScoreNet(obs_dim, act_dim, args.hidden_dims, args.diffusion_steps).to(device)
    critic = Critic(obs_dim, act_dim, args.hidden_dims).to(device)
    averages = (copy.deepcopy(net).requires_grad_(False) for net in (critic, score_net))
    flags, adams = dict(fused=True, capturable=torch.device(device).type == "cuda"), []
    for net, lr in (score_net, args.actor_lr), (critic, args.critic_lr):
        lr = torch.tensor(lr, device=device)  # a tensor, to be changed in place
        adams.append(torch.optim.Adam(net.parameters(), lr, **flags))
        minimise(adams[-1], math.nan * sum(x.sum() for x in net.parameters()))  # makes its state
    q_scale, skipped = torch.zeros(2, device=device), torch.zeros((), device=device)
    return Learner(score_net, critic, *averages, *adams, q_scale, skipped)


def minimise(optimizer: torch.optim.Adam, loss: Tensor) -> Tensor:
    """One step down `loss`. Returns 1.0 if it is not finite, else 0.0.

    Where `found_inf`, an attribute that torch's GradScaler sets, is 1, a fused Adam (no other one)
    leaves weights, moments and step count as they are. The device decides: the host does not wait.
    """
    optimizer.zero_grad()
    loss.backward()
    optimizer.found_inf = (~loss.detach().isfinite()).float()
    optimizer.step()
    return optimizer.found_inf


def update(learner: Learner, batch: Batch, noise: Noise, schedule: Schedule, args: Args) -> dict:
    """Algorithm 1 lines 4 to 7, once, without host synchronisation; returns metrics as tensors."""
    score_net, critic, critic_target, policy, *_, q_scale, skipped = learner
    posterior = args.score_target == "posterior"

    # Line 4: TD target (SML:180-210). A termination stops bootstrapping, a time limit does not.
    with torch.no_grad():  # no target actor; a' has action noise, as released (SML:193-195)
        next_actions = sample_actions(score_net, batch.next_obs, noise.next_actions, schedule, args)
        next_actions = (next_actions + args.action_noise * noise.next_actions[-1]).clamp(-1, 1)
        next_q = critic_target(batch.next_obs, next_actions).amin(0)  # (B,), clipped double Q
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # (B,)

    # Line 5: critics (SML:214-222).
    q = critic(batch.obs, batch.actions)  # (2, B)
    critic_loss = (q - y).square().mean(1).sum()
    skipped += minimise(learner.critic_optimizer, critic_loss)

    # Line 6: score network. The replayed action is noised to level t (SML:250-259).
    abar = schedule.alphas_cumprod[noise.t, None]  # (B, 1)
    noisy_actions = abar.sqrt() * batch.actions + (1 - abar).sqrt() * noise.actions  # (B, A)
    prediction = score_net(batch.obs, noisy_actions, noise.t)  # (B, A), clean action; released: eps
    if posterior:
        # The slope in a coordinate is the smaller in size of dQ/da at the clamped prediction and at
        # the mean for a flat Q, and 0 where their signs differ, as over a hill or valley (minmod).
        flat = posterior_mean(0.0, noisy_actions, abar, schedule)  # (B, A)
        points = torch.cat([prediction.detach().clamp(-1, 1), flat])  # (2B, A)
        at_clean, at_flat = q_gradient(critic, batch.obs.repeat(2, 1), points).chunk(2)  # (B, A)
        q_grad = at_clean.clamp(at_flat.clamp_max(0), at_flat.clamp_min(0))  # (B, A)
    else:
        q_grad = q_gradient(critic, batch.obs, noisy_actions)  # (B, A)
    q_grad_abs = q_grad.abs().mean()
    new_q_scale = q_scale.lerp(torch.stack([q_grad_abs, torch.ones_like(q_grad_abs)]), 0.001)
    if args.normalize_q_grad:
        q_grad = q_grad / (new_q_scale[0] / new_q_scale[1]).clamp_min(1e-12)
    drift = args.alpha * q_grad  # (B, A), the score of exp(alpha Q), if not limited and scaled
    # Released: minus, since eps points against the score (SML:279; its README has a plus).
    target = posterior_mean(drift, noisy_actions, abar, schedule) if posterior else -drift
    actor_loss = (prediction - target).square().mean()
    skipped += minimise(learner.actor_optimizer, actor_loss)
    q_scale.copy_(torch.where(actor_loss.isfinite(), new_q_scale, q_scale))

    # Line 7: target networks; and the average that is evaluated.
    with torch.no_grad():
        torch._foreach_lerp_([*critic_target.parameters()], [*critic.parameters()], args.tau)
        torch._foreach_lerp_([*policy.parameters()], [*score_net.parameters()], args.policy_tau)

    return {
        "losses/critic_loss": critic_loss.detach(),
        "losses/actor_loss": actor_loss.detach(),
        "losses/q_values": q.detach().mean(),
        "diffusion/q_grad_abs": q_grad_abs,
        "diffusion/bound_share": (next_actions.abs() == 1).float().mean(),  # after action noise
    }


def actor_lr_at(num_updates: int, args: Args) -> float:
    """Learning rate of the score network: cosine decay (SML:96)."""
    decay = args.actor_lr_decay * args.utd * args.total_timesteps or math.inf  # updates
    return args.actor_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, num_updates / decay)))


@torch.no_grad()
def act(learner: Learner, obs: Tensor, noise: Tensor, schedule: Schedule, args: Args) -> Tensor:
    """Draw K actions per state and return the one with the highest min-Q, (B, O) -> (B, A).

    `noise` is standard normal, (T + 1, K B, A), which sets K: that of `sample_actions`, and the
    action noise (SML:299-301; zeros for none). K = 1 is the paper's policy.
    """
    K, B = noise.shape[1] // len(obs), len(obs)
    obs_K = obs.repeat(K, 1)  # (K B, O)
    actions = sample_actions(learner.score_net, obs_K, noise, schedule, args)  # (K B, A)
    if K > 1:
        best = learner.critic(obs_K, actions).amin(0).view(K, B).argmax(0)  # (B,)
        actions = actions.view(K, B, -1)[best, torch.arange(B, device=best.device)]
    return (actions + args.action_noise * noise[-1, :B]).clamp(-1, 1)


def evaluate(learner, envs, schedule: Schedule, args: Args, stopped=lambda: False, noise_scale=1.0):
    """(return, length) of an episode in each environment, without action noise (SML:306-320).

    It has its own environments and generator, from seed + 1,000,000: training does not notice it.
    Episodes that `stopped()` breaks off are left out. `noise_scale` 0: a deterministic policy.
    """
    device, seed, N = schedule.betas.device, args.seed + 1_000_000, envs.num_envs
    shape = args.diffusion_steps + 1, args.candidates * N, *envs.single_action_space.shape
    generator = torch.Generator(device).manual_seed(seed)
    obs, episodes = reset(envs, seed), {}  # one each: the first N to end would be the short ones
    while len(episodes) < N and not stopped():
        noise = noise_scale * torch.randn(shape, device=device, generator=generator)
        noise[-1] = 0
        actions = act(learner, torch.from_numpy(obs).to(device), noise, schedule, args)
        *_, obs, ended = step(envs, actions.cpu().numpy())
        episodes = {i: tuple(episode) for i, *episode in ended} | episodes
    return [episodes[i] for i in sorted(episodes)]


@runfiles.errors_in_one_line()
def main(args: Args) -> Path:
    """Train, from the start or from a checkpoint, and return the folder of the run."""
    args, saved = runfiles.load_checkpoint(args) if args.resume else (args, None)
    device, T, K = runfiles.prepare(args), args.diffusion_steps, args.candidates
    envs = make_envs(args.env_id, args.num_envs)
    eval_envs = make_envs(args.env_id, args.eval_episodes) if args.eval_every else envs
    global_step, num_updates, saved_obs, metrics = saved["loop"] if saved else (0, 0, None, {})
    first_step = global_step  # added to the seed: new episodes after a resume differ from the first
    obs = reset(envs, args.seed + first_step)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    learner = make_learner(args, obs_dim, act_dim, device)
    evaluated = learner._replace(score_net=learner.policy)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    schedule = make_schedule(args.beta_schedule, T, device)
    act_fast, update_fast = accelerate(act, args, device), accelerate(update, args, device)
    rng = torch.Generator(device).manual_seed(args.seed)
    obs = saved_obs if saved and runfiles.restore(saved, learner, buffer, envs, rng) else obs
    files = runfiles.RunFiles(args, saved)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", mininterval=1.0)
    stop_request = runfiles.StopRequest()

    def save(envs) -> bool:
        return files.save((global_step, num_updates, obs, metrics), learner, buffer, envs, rng)

    try:
        while True:
            # Evaluate and save. A resumed run repeats an evaluation that a signal broke off.
            due = args.eval_every and global_step % args.eval_every < args.num_envs
            if due and files.last_evaluation < global_step:
                try:
                    episodes = evaluate(evaluated, eval_envs, schedule, args, stop_request)
                    if not stop_request():
                        files.log_evaluation(global_step, args, episodes)
                except UserError as error:  # training goes on
                    tqdm.write(f"step {global_step}: no evaluation, {error}")
            if global_step >= args.total_timesteps or stop_request():
                break
            due = args.checkpoint_every and global_step % args.checkpoint_every < args.num_envs
            if due and global_step > first_step:
                save(envs)

            # Act (Algorithm 1 line 2): uniformly at random at first, then with the policy.
            obs_tensor = torch.from_numpy(obs).to(device)  # (N, O)
            if global_step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, act_dim, device=device, generator=rng) - 1
            else:
                noise = torch.randn(T + 1, K * args.num_envs, act_dim, device=device, generator=rng)
                actions = act_fast(learner, obs_tensor, noise, schedule, args)  # (N, A)
            actions_cpu = actions.cpu().numpy()  # waits; reading skipped is then cheap
            if learner.skipped > 0 or not np.isfinite(actions_cpu).all():
                learner.skipped.zero_()
                raise UserError("loss or action not finite: start anew with lower learning rates")

            # Update (lines 3 to 7), utd times per step. A GPU does it while the environments step.
            while num_updates < math.floor((global_step - args.learning_starts) * args.utd + 1e-9):
                learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(num_updates, args))
                noise = draw_noise(args, act_dim, rng)
                batch = buffer.sample(args.batch_size, rng)  # line 3
                metrics = update_fast(learner, batch, noise, schedule, args)
                num_updates += 1

            # Step and store; terminations are 0 at a time limit.
            rewards, next_obs, terminations, obs, episodes = step(envs, actions_cpu)
            new = (torch.from_numpy(x).to(device) for x in (rewards, next_obs, terminations))
            buffer.add(Batch(obs_tensor, actions, *new))
            global_step += args.num_envs
            progress.update(args.num_envs)

            # Log.
            for episode in episodes:
                files.log_episode(global_step, *episode)
                progress.set_postfix_str(f"return {episode[1]:.1f}", refresh=False)
            if metrics and global_step % args.log_every < args.num_envs:
                files.log_scalars(global_step, metrics)
        if not save(envs):
            raise SystemExit(f"error: step {global_step} could not be saved whole")
    except UserError as error:  # of the environments, perhaps: they are not saved
        hint = f". To go on with new episodes: --resume {files.path}" if save(None) else ""
        raise UserError(f"{error}{hint}") from error
    finally:
        for closable in (stop_request, progress, files, envs, eval_envs):
            closable.close()
    if signum := stop_request():
        print(f"stopped at step {global_step}; to continue: --resume {files.path}")
        raise SystemExit(128 + signum)
    return files.path


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
