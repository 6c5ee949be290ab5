"""What do the critics say where episodes end early? Q and the return to come, before the end.

    python results/early_ends.py runs/<run> ...        # half a minute a run; your own runs only

Forty episodes from the last checkpoint, as in training: of the score network, with action noise.
Those that end within 300 steps count. Q is the mean of the two critics.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import make_envs, reset, step
from fast import tensors_in
from qsm import Args, act, make_learner, make_schedule

EPISODES, EARLY, BEFORE_END = 40, 300, (0, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100)


@runfiles.errors_in_one_line()
def main(run: Path) -> None:
    args, saved = runfiles.load_checkpoint(Args(resume=run, device="cpu"))
    device, envs = runfiles.prepare(args), make_envs(args.env_id, EPISODES)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    learner = make_learner(args, obs_dim, act_dim, device)
    for tensor, stored in zip(tensors_in(learner), saved["learner"], strict=True):
        tensor.detach().copy_(stored)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps, device)
    rng = torch.Generator().manual_seed(0)

    obs, qs, rewards, lengths = reset(envs, 1_000_001), [], [], {}
    while len(qs) < EARLY:
        obs_tensor = torch.from_numpy(obs)
        noise = torch.randn(args.diffusion_steps + 1, EPISODES, act_dim, generator=rng)
        actions = act(learner, obs_tensor, noise, schedule, args)
        with torch.no_grad():
            qs.append(learner.critic(obs_tensor, actions).mean(0).numpy())
        reward, _, _, obs, episodes = step(envs, actions.numpy())
        rewards.append(reward)
        for i, _, length in episodes:
            lengths.setdefault(i, length)  # of the first episode in each environment

    before_end = {k: [] for k in BEFORE_END}  # (Q, return to come) of the early episodes
    for i, length in lengths.items():
        to_come = 0.0
        for k in range(length):  # from the last step back
            t = length - 1 - k
            to_come = rewards[t][i] + args.gamma * to_come
            if k in before_end:
                before_end[k].append((qs[t][i], to_come))
    for k, pairs in before_end.items():
        if len(pairs) >= 5:
            q, to_come = np.mean(pairs, 0)
            run_columns = f"{args.env_id},{args.seed},{args.tau},{saved['loop'][0]}"
            print(
                f"{run_columns},{len(lengths)},{k},{len(pairs)},{q:.1f},{to_come:.1f}", flush=True
            )


if __name__ == "__main__":
    print("env_id,seed,tau,global_step,early_of_40,steps_before_end,episodes,q,return_to_come")
    for path in sys.argv[1:]:
        main(Path(path))
