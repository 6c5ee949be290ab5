"""Is the last policy a lucky one? Go on updating from a run's last checkpoint, and evaluate.

    python results/last_policy.py runs/<run> ...        # 3 to 10 minutes a run; your own runs only

No new data are collected. Every 500 updates: mean and least return of ten episodes, without action
noise, of the score network and of its running average (tau = 0.005). The buffer, the critics' and
the score network's learning rates are the run's.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from buffer import ReplayBuffer
from envs import make_envs, reset
from fast import accelerate
from qsm import Args, actor_lr_at, draw_noise, evaluate, make_learner, make_schedule, update

EVERY, TIMES = 500, 10


@runfiles.errors_in_one_line()
def main(run: Path) -> None:
    args, saved = runfiles.load_checkpoint(Args(resume=run))
    device = runfiles.prepare(args)
    envs, eval_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, 10)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    learner = make_learner(args, obs_dim, act_dim, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, act_dim, device)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps, device)
    rng, update_fast = torch.Generator(device), accelerate(update, args, device)
    reset(envs, args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is a CSV
        runfiles.restore(saved, learner, buffer, envs, rng)
    args.policy_tau = 0.005  # also where the run evaluates the network itself
    learner.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(saved["loop"][1], args))

    def returns(score_net) -> str:
        episodes = evaluate(learner._replace(score_net=score_net), eval_envs, schedule, args)
        totals = np.array(episodes)[:, 0]
        return f"{totals.mean():.0f},{totals.min():.0f}"

    for k in range(1, EVERY * TIMES + 1):
        batch = buffer.sample(args.batch_size, rng)
        update_fast(learner, batch, draw_noise(args, act_dim, rng), schedule, args)
        if k % EVERY == 0:
            row = returns(learner.score_net), returns(learner.policy)
            print(f"{args.env_id},{args.seed},{k},{','.join(row)}", flush=True)


if __name__ == "__main__":
    print("env_id,seed,updates,network_mean,network_least,average_mean,average_least")
    for path in sys.argv[1:]:
        main(Path(path))
