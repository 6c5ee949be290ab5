"""How many units of the critics' last hidden layer are 0 on replayed transitions?

    python results/dead_units.py runs/<run> [runs/<run> ...]       # your own runs only

The runs may be copies of one, with checkpoints of different steps. On 20,000 transitions of each
run's buffer: their mean reward; mean Q and mean |dQ/da| (smaller critic); of each critic the units
that no transition activates; and of both the median number active on a transition, the share of
transitions with none active, and the mean of a unit's input.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from results.early_ends import load

SAMPLED = 20_000


@runfiles.errors_in_one_line()
def main(runs: list[Path]) -> None:
    print("env_id,seed,step,reward,q,q_grad,unused_1,unused_2,active,none_active,input")
    for run in runs:
        args, learner, global_step = load(run)
        with np.load(run / "checkpoint.npz") as archive:
            names = "obs", "actions", "rewards"
            obs, actions, rewards = (torch.from_numpy(archive[name]) for name in names)
        rows = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        obs, actions = obs[rows], actions[rows].requires_grad_()
        *hidden, (out, out_bias) = zip(learner.critic.weights, learner.critic.biases)
        x = torch.cat([obs, actions], dim=1)
        for k, (weight, bias) in enumerate(hidden):
            x = (x if k == 0 else x.relu()) @ weight + bias
        q = (x.relu() @ out + out_bias)[..., 0].amin(0)  # (N,)
        slope = torch.autograd.grad(q.sum(), actions)[0].abs().mean()
        active = x > 0  # (2, N, H)
        unused = (~active.any(1)).sum(1).tolist()
        count = active.sum(2)  # (2, N)
        columns = args.env_id, args.seed, global_step, f"{rewards[rows].mean():.4f}"
        numbers = f"{q.mean():.3f}", f"{slope:.4f}", *unused, int(count.median())
        print(*columns, *numbers, f"{(count == 0).float().mean():.4f}", f"{x.mean():.3f}", sep=",")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
