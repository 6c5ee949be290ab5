"""The paper's Figure 1, and the policy in training, with both score targets and the exact density.

    pip install matplotlib && python docs/matching.py     # a minute or two on a CPU

A 2-D action, one state, Q known in closed form: four hills of equal height. The score network, the
update and the sampler are those of qsm.py. The critic is the given Q, and no gradient changes it:
what shows is the matching alone.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from buffer import Batch
from networks import ScoreNet
from qsm import Args, draw_noise, make_schedule, q_gradient, sample_actions, update
from test_qsm import Fixed, learner_of

HERE, STEPS, B = Path(__file__).parent, (0, 100, 400, 2000), 256
HILLS = [(right, top) for right in (False, True) for top in (False, True)]


def Q(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """log of four Gaussian bumps at (+-0.5, +-0.5), for both critics, (2, B)."""
    centers = torch.tensor([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)])
    return (-((actions[:, None] - centers) ** 2).sum(-1) / (2 * 0.2**2)).logsumexp(1).expand(2, -1)


class Recorder:
    """A score network that keeps the actions that it is asked about: the denoising path."""

    def __init__(self, score_net):
        self.score_net, self.path = score_net, []
        self.time_features, self.obs_features = score_net.time_features, score_net.obs_features

    def denoise(self, features: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        self.path.append(actions)
        return self.score_net.denoise(features, actions)


def score_at_0(score_net, actions: torch.Tensor, schedule, target: str) -> torch.Tensor:
    """The score at the least noisy level, from the network's prediction: clean action or eps."""
    prediction = score_net(
        torch.zeros(len(actions), 1), actions, torch.zeros(len(actions), dtype=torch.long)
    )
    variance = 1 - schedule.alphas_cumprod[0]
    if target == "posterior":
        return (schedule.alphas_cumprod[0].sqrt() * prediction - actions) / variance
    return -prediction / variance.sqrt()


def train(target: str):
    """Samples, denoising paths and scores after each number of STEPS, and alpha relative to Q."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    args = Args(score_target=target, hidden_dims=(128, 128))
    T, schedule = args.diffusion_steps, make_schedule(args.beta_schedule, args.diffusion_steps)
    learner, obs = learner_of(ScoreNet(1, 2, args.hidden_dims, T), Fixed(Q)), torch.zeros(B, 1)
    snapshots = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            noise = torch.randn(T + 1, 4000, 2, generator=torch.Generator().manual_seed(1))
            recorder = Recorder(learner.score_net)
            samples = sample_actions(recorder, torch.zeros(4000, 1), noise, schedule, args)
            axis = torch.linspace(-1, 1, 12)
            grid = torch.cartesian_prod(axis, axis)
            with torch.no_grad():
                score = score_at_0(learner.score_net, grid, schedule, target)
            snapshots.append((samples, torch.stack([*recorder.path, samples]), grid, score))
        actions = 2 * torch.rand(B, 2, generator=rng) - 1
        batch = Batch(
            obs, actions, torch.zeros(B), obs, torch.ones(B)
        )  # every step ends an episode: no TD target
        learner.actor_optimizer.param_groups[0]["lr"].fill_(3e-3 * (1 - step / (STEPS[-1] + 1)))
        update(learner, batch, draw_noise(args, 2, rng), schedule, args)
    scale = (learner.q_scale[0] / learner.q_scale[1]).item() if args.normalize_q_grad else 1.0
    return snapshots, args.alpha / scale


def figure_1(snapshots) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.3), layout="constrained")
    line = torch.linspace(-1, 1, 101)
    hills = Q(None, torch.cartesian_prod(line, line))[0].exp().reshape(101, 101).T
    grid = snapshots[0][2]
    panels = (
        ("dQ/da", q_gradient(Q, None, grid), None),
        *(
            (f"score, {name} matching", score, path)
            for name, (_, path, _, score) in (("before", snapshots[0]), ("after", snapshots[-1]))
        ),
    )
    for axis, (title, field, path) in zip(axes, panels, strict=True):
        axis.contour(line, line, hills, levels=5, colors="0.8", linewidths=0.8)
        axis.quiver(
            *grid.T,
            *field.T,
            color="tab:blue" if path is None else "tab:orange",
            angles="xy",
            width=0.004,
        )
        if path is not None:
            for i in range(6):
                axis.plot(*path[-5:, i].T, "k.:", lw=0.8, ms=3)  # the last four of T steps
                axis.plot(*path[-1, i], "ko", ms=4)
        axis.set(
            title=title, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[]
        )
    figure.savefig(HERE / "matching.png", dpi=90)


def strip(results: dict) -> None:
    figure, axes = plt.subplots(2, len(STEPS) + 1, figsize=(9.6, 4.1), layout="constrained")
    line = torch.linspace(-1, 1, 201)
    for row, (target, (snapshots, alpha)) in zip(axes, results.items(), strict=True):
        for axis, steps, (samples, *_) in zip(row, STEPS, snapshots, strict=False):
            axis.plot(
                *samples.T,
                ".",
                ms=1,
                alpha=0.3,
                color="tab:blue" if target == "posterior" else "tab:orange",
            )
            on_bound = (samples.abs() == 1).float().mean()
            shares = [((samples > 0) == torch.tensor(hill)).all(1).float().mean() for hill in HILLS]
            shares = ", ".join(f"{share:.2f}" for share in shares)
            print(f"{target}, {steps} steps: shares of the hills {shares}")
            axis.set(title=f"{steps} steps, {on_bound:.0%} on a bound")
            axis.title.set_size(8)
        density = (alpha * (Q(None, torch.cartesian_prod(line, line))[0])).reshape(201, 201).T
        row[-1].imshow(
            (density - density.max()).exp(), extent=(-1, 1, -1, 1), origin="lower", cmap="Greys"
        )
        row[-1].set_title(f"exact, alpha {alpha:.2g}", size=8)
        row[0].set_ylabel(target)
        for axis in row:
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[], yticks=[])
    figure.savefig(HERE / "training.png", dpi=90)


if __name__ == "__main__":
    results = {target: train(target) for target in ("posterior", "released")}
    figure_1(results["posterior"][0])
    strip(results)
