"""Which way do runs of Ant walk, and what do the critics of each say of the others' gaits?

    python results/ant_gait.py runs/<run> [runs/<run> ...]         # your own runs only

Ant's reward is its speed along x, whichever way it faces. For each run, as `seed,what,of,value`:
- per tenth of the buffer, of the upright rows: the mean heading in radians (0: as it starts), the
  shares of headings below -0.3 and above 0.7, and the mean speed along x;
- along ten episodes of each run's policy, steps 100 to 300, without action noise: the standard
  deviations of the four hips' angles, the discounted return that came, and Q of these actions by
  the critics of each run (the smaller of the two).
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import make_envs, reset, step
from qsm import make_schedule, sample_actions
from results.early_ends import load

EPISODES, FIRST, LAST, AFTER = 10, 100, 300, 400
UPRIGHT = 0.5  # cosine of the torso's tilt


def headings(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heading (N,) in radians and cosine of the tilt (N,), from the quaternion in obs (N, O)."""
    w, x, y, z = obs[:, 1:5].T
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2)), 1 - 2 * (x**2 + y**2)


def walk(args, learner) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Observations and actions of episodes that have not ended, and their mean return to come."""
    envs = make_envs(args.env_id, EPISODES)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    noise_shape = args.diffusion_steps, EPISODES, *envs.single_action_space.shape
    rng = torch.Generator().manual_seed(0)
    obs, steps, standing = reset(envs, 1_000_001), [], np.ones(EPISODES, bool)
    for _ in range(LAST + AFTER):
        noise = torch.randn(noise_shape, generator=rng)
        actions = sample_actions(learner.policy, torch.from_numpy(obs), noise, schedule, args)
        rewards, _, _, after, episodes = step(envs, actions.numpy())
        steps.append((torch.from_numpy(obs), actions, rewards))
        obs = after
        standing[[i for i, *_ in episodes]] = False
    envs.close()
    to_come, returns = np.zeros(EPISODES), []
    for _, _, rewards in reversed(steps):
        to_come = rewards + args.gamma * to_come
        returns.append(to_come[standing])
    obs, actions = (torch.cat([s[k][standing] for s in steps[FIRST:LAST]]) for k in (0, 1))
    return obs, actions, float(np.mean(returns[::-1][FIRST:LAST]))


@runfiles.errors_in_one_line()
def main(runs: list[Path]) -> None:
    loaded = [load(run) for run in runs]
    print("seed,what,of,value")
    for run, (args, _, _) in zip(runs, loaded):
        with np.load(run / "checkpoint.npz") as archive:
            stored = archive["obs"]
        for k, rows in enumerate(np.array_split(stored, 10)):
            heading, upright = headings(rows)
            heading, speed = heading[upright > UPRIGHT], rows[upright > UPRIGHT, 13]
            shares = (heading < -0.3).mean(), (heading > 0.7).mean()
            names = "heading", "share below -0.3", "share above 0.7", "speed"
            for name, value in zip(names, (heading.mean(), *shares, speed.mean())):
                print(f"{args.seed},{name},tenth {k + 1},{value:.3f}")
    for args, learner, _ in loaded:
        obs, actions, to_come = walk(args, learner)
        for hip in range(4):
            print(f"{args.seed},swing in radians,hip {hip + 1},{obs[:, 5 + 2 * hip].std():.3f}")
        print(f"{args.seed},return to come,its own policy,{to_come:.1f}")
        for judge, judging, _ in loaded:
            with torch.no_grad():
                q = judging.critic(obs, actions).amin(0).mean()
            print(f"{judge.seed},q,the policy of seed {args.seed},{q:.1f}")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
