"""The paper's Figure 4: actions of policies where the pole hangs and both sides are equally good.

    pip install matplotlib 'shimmy[dm-control]'
    python qsm.py --env-id docs.swingup:CartpoleSwingup-v0 --seed 1 --hidden-dims 256 256 \
        --learning-starts 2000 --total-timesteps 10000 --compile True --policy-tau 1
    python docs/two_modes.py runs/docs.swingup-CartpoleSwingup-v0__qsm__1__*

One panel per run: 4,000 actions in that state, the mean of the two critics, and the density
exp(alpha Q) that this critic asks for, with the run's own scale of dQ/da.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from qsm import make_schedule, sample_actions
from results.evaluate import load_policy

HANGING = {  # observations
    "Pendulum-v1": [-1.0, 0.0, 0.0],  # cos, sin, speed
    "dm_control/cartpole-swingup-v0": [0.0, -1.0, 0.0, 0.0, 0.0],  # cart, cos, sin, speeds
    "docs.swingup:CartpoleSwingup-v0": [0.0, -1.0, 0.0, 0.0, 0.0],
}


def panel(axis, run: Path) -> None:
    args, learner, _ = load_policy(run)
    obs = torch.tensor([HANGING[args.env_id]])
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(args.diffusion_steps + 1, 4000, 1, generator=generator)
    actions = sample_actions(learner.score_net, obs.expand(4000, -1), noise, schedule, args)[:, 0]
    grid = torch.linspace(-1, 1, 101)[:, None]
    q = learner.critic(obs.expand(101, -1), grid).mean(0).detach()
    scale = learner.q_scale[0] / learner.q_scale[1] if args.normalize_q_grad else 1.0
    wanted = (args.alpha * q / scale).softmax(0)  # probability of each grid point

    for side, place in (-1, "below -0.5"), (1, "above 0.5"):
        share = (side * actions > 0.5).float().mean()
        wanted_share = wanted[side * grid[:, 0] > 0.5].sum()
        print(f"{run}: {place} {share:.2f} of the actions, {wanted_share:.2f} of the density")
    axis.hist(actions.numpy(), bins=40, range=(-1, 1), density=True, color="tab:blue", alpha=0.7)
    axis.plot(grid[:, 0], wanted / 0.02, color="black", linewidth=1)
    name = args.env_id.split("/")[-1].split(":")[-1].removesuffix("-v0")
    title = f"{name}\n{args.score_target}, alpha {args.alpha:.0f}\nseed {args.seed}"
    axis.set(title=title, xlabel="action", yticks=[])
    values = axis.twinx()
    values.plot(grid[:, 0], q, color="tab:orange")
    values.set_yticks([])


if __name__ == "__main__":
    runs = [Path(path) for path in sys.argv[1:]]
    figure, axes = plt.subplots(
        1, len(runs), figsize=(1.9 * len(runs), 2.6), squeeze=False, layout="constrained"
    )
    for axis, run in zip(axes[0], runs, strict=True):
        panel(axis, run)
    axes[0, 0].set_ylabel("samples (blue), exp(alpha Q)\n(black), Q (orange)")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
