"""Replayed transitions whose Q grows: what is it learned from, and what does the policy return?

    python results/replayed.py runs/<run> runs/<run> [...]         # your own runs only

The runs are copies of one, with checkpoints of different steps. Of the first one's buffer three
groups are taken: 150 of the 3,000 transitions whose Q grows most from the first run to the last;
150 of the first tenth; 150 of the last tenth. For each run and group: Q, its target y (Algorithm 1
line 4), Q of the next stored observation with the stored next action and with the policy's, and
the return that really comes: the stored state is put back into the simulator, the stored action
taken, then the policy's with action noise, for 500 steps. Q is the smaller of the two critics.

Only for MuJoCo tasks whose observation is all positions but the first, or the first two, and all
velocities: Walker2d, Hopper, HalfCheetah, Ant, Swimmer (the first two cut them to [-10, 10]).
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import UserError, make_envs, reset, step
from qsm import act, make_schedule
from results.early_ends import load

GROWN, GROUP, STEPS = 3_000, 150, 500


def min_q(critic, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        parts = zip(obs.split(50_000), actions.split(50_000))
        return torch.cat([critic(*part).amin(0) for part in parts])


def returns_to_come(args, choose, obs: np.ndarray, actions: torch.Tensor) -> tuple:
    """Discounted returns (N,) from stored states and first actions, and lengths (N,)."""
    envs = make_envs(args.env_id, len(obs))
    reset(envs, 0)
    for env, row in zip(envs.envs, obs):
        model = env.unwrapped.model
        left_out = model.nq + model.nv - len(row)
        if not 1 <= left_out <= 2:
            raise UserError(f"the state of {args.env_id} cannot be told from its observation")
        positions = np.append(np.zeros(left_out), row[: model.nq - left_out])
        env.unwrapped.set_state(positions, row[model.nq - left_out :].astype(float))
    totals, lengths = np.zeros(len(obs)), {}
    for t in range(STEPS):
        rewards, _, _, obs, episodes = step(envs, actions.numpy())
        alive = [i not in lengths for i in range(len(totals))]
        totals += args.gamma**t * rewards * alive
        for i, _, length in episodes:
            lengths.setdefault(i, length)
        actions = choose(torch.from_numpy(obs))
    envs.close()
    return totals, np.array([lengths.get(i, STEPS) for i in range(len(totals))])


def figures(args, learner, batch: tuple, rng: torch.Generator) -> tuple:
    """Q, y, Q at s' of both actions, return to come, length: (N,) each, of transitions that go on.

    `batch`: obs, actions, rewards, next_obs, and the stored actions that followed.
    """
    obs, actions, rewards, next_obs, next_actions = batch
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)

    def choose(obs: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(args.diffusion_steps + 1, *actions.shape, generator=rng)
        return act(learner, obs, noise, schedule, args)

    policy = choose(next_obs)
    y = rewards + args.gamma * min_q(learner.critic_target, next_obs, policy)
    q_next = min_q(learner.critic, next_obs, next_actions), min_q(learner.critic, next_obs, policy)
    returns, lengths = returns_to_come(args, choose, obs.numpy(), actions)
    return min_q(learner.critic, obs, actions), y, *q_next, returns, lengths


@runfiles.errors_in_one_line()
def main(runs: list[Path]) -> None:
    if len(runs) < 2:
        raise UserError("give at least two runs")
    loaded = [load(run) for run in runs]
    with np.load(runs[0] / "checkpoint.npz") as archive:  # the first run's buffer, in order
        names = "obs", "actions", "rewards", "next_obs"
        stored = [torch.from_numpy(archive[name]) for name in names]
    obs, actions, _, next_obs = stored
    N, num_envs = len(obs), loaded[0][0].num_envs
    # A transition goes on in the row num_envs later, if that is not of the next episode.
    goes_on = torch.zeros(N, dtype=torch.bool)
    goes_on[:-num_envs] = (next_obs[:-num_envs] == obs[num_envs:]).all(1)
    growth = min_q(loaded[-1][1].critic, obs, actions) - min_q(loaded[0][1].critic, obs, actions)
    grown = growth.where(goes_on, -torch.inf).topk(GROWN).indices
    print(f"first tenth of the rows: {(grown < N / 10).float().mean():.3f}", file=sys.stderr)

    rng = torch.Generator().manual_seed(0)
    tenth = goes_on[: N // 10].nonzero()[:, 0], goes_on[-N // 10 :].nonzero()[:, 0] + N - N // 10
    groups = {}
    for name, rows in zip(("grown", "first tenth", "last tenth"), (grown, *tenth)):
        groups[name] = rows[torch.randperm(len(rows), generator=rng)[:GROUP]]
    print("env_id,seed,step,group,q,y,q_next_stored,q_next_policy,return_to_come,median_length")
    for args, learner, global_step in loaded:
        for name, rows in groups.items():
            batch = *(x[rows] for x in stored), actions[rows + num_envs]
            *means, length = figures(args, learner, batch, rng)
            numbers = *(f"{x.mean():.1f}" for x in means), f"{np.median(length):.1f}"
            print(args.env_id, args.seed, global_step, name, *numbers, sep=",")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
