"""Look at a policy: does it do what its critics ask, and do they know what it returns?

    python results/look.py runs/<run>       # of your own: an --env-id module:id is imported

Q is the mean of the two critics. Ten episodes each, without action noise: of the policy, of its
actions moved up Q, and of its actions times 1.3 and 2, cut to [-1, 1].
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import UserError, make_envs, step
from qsm import make_schedule, q_gradient, sample_actions
from results.evaluate import load_policy

EPISODES, STATES, K = 10, 500, 64
CUT = 300  # steps before a time limit, where the return to come is not known: 0.99^300 = 0.05


def roll_out(env_id: str, choose, gamma: float) -> tuple[torch.Tensor, np.ndarray, str]:
    """States (M, O), discounted returns from there (M,), and the episodes' returns in words."""
    envs, steps, ends = make_envs(env_id, EPISODES), [], {}
    obs, _ = envs.reset(seed=1_000_001)
    while len(ends) < EPISODES:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        rewards, _, terminations, next_obs, episodes = step(envs, choose(obs).numpy())
        steps.append((obs, rewards))
        for i, total, length in episodes:
            ends.setdefault(i, (total, length, length if terminations[i] else length - CUT))
        obs = next_obs
    envs.close()
    states, returns_to_come = [], []
    for i, (_, length, known) in ends.items():
        to_come = np.zeros(length + 1)
        for t in reversed(range(length)):
            to_come[t] = steps[t][1][i] + gamma * to_come[t + 1]
        states += [obs[i] for obs, _ in steps[: max(known, 0)]]
        returns_to_come += [*to_come[: max(known, 0)]]
    if not states:
        raise UserError(f"no episode of {env_id} terminates or lasts more than {CUT} steps")
    totals = np.array([total for total, *_ in ends.values()])
    return (
        torch.stack(states),
        np.array(returns_to_come),
        f"{totals.mean():.0f} +- {totals.std():.0f}",
    )


@runfiles.errors_in_one_line()
def main(run: Path) -> None:
    args, learner, global_step = load_policy(run)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    act_dim, generator = learner.score_net.columns[0], torch.Generator().manual_seed(0)

    def sample(obs: torch.Tensor, scale: float = 1.0, factor: float = 1.0) -> torch.Tensor:
        noise = torch.randn(args.diffusion_steps, len(obs), act_dim, generator=generator)
        actions = sample_actions(learner.score_net, obs, scale * noise, schedule, args)
        return (factor * actions).clamp(-1, 1)

    def moved(obs: torch.Tensor, steps: int) -> torch.Tensor:
        actions = sample(obs)
        for _ in range(steps):
            gradient = q_gradient(learner.critic, obs, actions)
            actions = (actions + 0.02 * normalize(gradient, dim=-1)).clamp(-1, 1)
        return actions

    def on_bound(actions: torch.Tensor) -> str:
        return f"{(actions.abs() == 1).float().mean():.3f}"

    @torch.no_grad()
    def q(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return learner.critic(obs, actions).mean(0)

    states, to_come, returns = roll_out(args.env_id, sample, args.gamma)
    *_, quiet = roll_out(args.env_id, partial(sample, scale=0.0), args.gamma)
    values = q(states, sample(states)).numpy()
    obs = states[torch.randperm(len(states), generator=generator)[:STATES]]
    obs_K = obs.repeat_interleave(K, 0)
    actions = sample(obs_K)
    uniform = 2 * torch.rand(actions.shape, generator=generator) - 1
    higher = {f"{0.02 * n:.1f}": partial(moved, steps=n) for n in (5, 50)}  # length of the path
    rows = {
        "return": returns,
        "return without the sampler's noise": quiet,
        "discounted return to come": f"{to_come.mean():.1f} +- {to_come.std():.1f}",
        "Q less that": f"{(values - to_come).mean():.1f} +- {(values - to_come).std():.1f}",
        "their correlation": f"{np.corrcoef(values, to_come)[0, 1]:.2f}",
        "standard deviation of an action": f"{actions.view(-1, K, act_dim).std(1).mean():.3f}",
        "share of them on a bound": on_bound(actions),
        "Q of uniform actions": f"{q(obs_K, uniform).mean():.2f}",
        "Q of the policy": f"{q(obs_K, actions).mean():.2f}",
        f"Q of the best of {K}": f"{q(obs_K, actions).view(-1, K).amax(1).mean():.2f}",
    }
    for length, choose in higher.items():
        actions = choose(obs)
        rows[f"Q of actions moved by {length}"] = f"{q(obs, actions).mean():.2f}"
        rows[f"share of them on a bound, moved by {length}"] = on_bound(actions)
        rows[f"return of actions moved by {length}"] = roll_out(args.env_id, choose, args.gamma)[2]
    for factor in (1.3, 2.0):
        scaled = partial(sample, factor=factor)
        rows[f"return of actions times {factor}"] = roll_out(args.env_id, scaled, args.gamma)[2]
    print(f"{args.env_id}, seed {args.seed}, step {global_step}")
    for name, value in rows.items():
        print(f"{name:45} {value}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python results/look.py RUN")
    main(Path(sys.argv[1]))
