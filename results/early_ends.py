"""Where episodes end early: what do critics say of the way there? Q and the return that came.

    python results/early_ends.py runs/<run> [runs/<run> ...]       # your own runs only

Forty episodes of the first run's score network, with action noise as in training, from its last
checkpoint; those that end within 300 steps count. Along them the mean Q of each run's critics, and
how far the two are apart. The runs may be copies of one, with checkpoints of different steps.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import make_envs, reset, step
from fast import tensors_in
from qsm import Args, Learner, act, make_learner, make_schedule

EPISODES, EARLY, BEFORE_END = 40, 300, (0, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100)


def load(run: Path) -> tuple[Args, Learner, int]:
    """Arguments, learner and step of a checkpoint."""
    args, saved = runfiles.load_checkpoint(Args(resume=run, device="cpu"))
    _, obs_dim = saved["buffer"]["obs"].shape
    _, act_dim = saved["buffer"]["actions"].shape
    learner = make_learner(args, obs_dim, act_dim, runfiles.prepare(args))
    for tensor, stored in zip(tensors_in(learner), saved["learner"], strict=True):
        tensor.detach().copy_(stored)
    return args, learner, saved["loop"][0]


@runfiles.errors_in_one_line()
def main(runs: list[Path]) -> None:
    (args, learner, policy_step), *_ = loaded = [load(run) for run in runs]
    envs = make_envs(args.env_id, EPISODES)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    noise_shape = args.diffusion_steps + 1, EPISODES, *envs.single_action_space.shape
    rng = torch.Generator().manual_seed(0)
    obs, steps, lengths = reset(envs, 1_000_001), [], {}
    while len(steps) < EARLY:
        obs_tensor = torch.from_numpy(obs)
        actions = act(learner, obs_tensor, torch.randn(noise_shape, generator=rng), schedule, args)
        rewards, _, _, obs, episodes = step(envs, actions.numpy())
        steps.append((obs_tensor, actions, rewards))
        for i, _, length in episodes:
            lengths.setdefault(i, length)  # of the first episode in each environment

    before_end = {k: [] for k in BEFORE_END}  # observation, action, return to come
    for i, length in lengths.items():
        to_come = 0.0
        for k in range(length):  # from the last step back
            obs, actions, rewards = steps[length - 1 - k]
            to_come = rewards[i] + args.gamma * to_come
            if k in before_end:
                before_end[k].append((obs[i], actions[i], to_come))
    print("env_id,seed,policy_step,critic_step,steps_before_end,episodes,q,q_gap,return_to_come")
    for _, learner, critic_step in loaded:
        for k, rows in before_end.items():
            if len(rows) >= 5:
                obs, actions, to_come = zip(*rows)
                with torch.no_grad():
                    q = learner.critic(torch.stack(obs), torch.stack(actions))  # (2, episodes)
                columns = args.env_id, args.seed, policy_step, critic_step, k, len(rows)
                numbers = q.mean(), (q[0] - q[1]).abs().mean(), np.mean(to_come)
                print(*columns, *(f"{x:.1f}" for x in numbers), sep=",")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
