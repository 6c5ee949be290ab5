"""Why a run with the released target stays where it is: what it samples from its final critic.

    python results/same_critic.py runs/HalfCheetah-v4__qsm__*      # a minute or two a run

The same critic is sampled with the trained score network and with a network that is exactly at the
released target: the fit cannot then explain what is seen. 128 states of the trained policy, 16
samples at each: share of action coordinates on a bound, standard deviation at one state (uniform:
0.58, a fair coin between -1 and 1: 1), mean Q of the samples.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from envs import make_envs
from networks import Critic
from qsm import Args, make_schedule, q_gradient, sample_actions
from results.evaluate import load_policy

SAMPLES = 16


class ExactScore:
    """Stands in for ScoreNet: its prediction is the released target for this critic, at every t."""

    def __init__(self, critic: Critic, obs: torch.Tensor, args: Args):
        self.critic, self.obs, self.args = critic, obs, args

    def time_features(self) -> torch.Tensor:
        return torch.zeros(self.args.diffusion_steps, 1)

    def obs_features(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(obs), 1)

    def denoise(self, features: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return -self.args.alpha * q_gradient(self.critic, self.obs, actions)


def sample(score, obs: torch.Tensor, args: Args, act_dim: int) -> torch.Tensor:
    noise = torch.randn(args.diffusion_steps + 1, len(obs), act_dim)
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    return sample_actions(score, obs, noise, schedule, args)


def report(run: Path) -> None:
    """Print the rows of one run."""
    torch.manual_seed(0)
    args, learner, _ = load_policy(run)
    score_net, critic = learner.score_net, learner.critic
    envs = make_envs(args.env_id, 8)
    act_dim = envs.single_action_space.shape[0]

    states, obs = [], envs.reset(seed=0)[0]
    for _ in range(64):
        states.append(torch.as_tensor(obs, dtype=torch.float32))
        obs, *_ = envs.step(sample(score_net, states[-1], args, act_dim).numpy())
    envs.close()
    obs = torch.cat(states[::4]).repeat(SAMPLES, 1)
    uniform = torch.rand(len(obs), act_dim) * 2 - 1
    samples = {
        "policy of the run": sample(score_net, obs, args, act_dim),
        "uniform": uniform,
    }
    exact = Args(score_target="released")
    samples["exactly the released target"] = sample(
        ExactScore(critic, obs, exact), obs, exact, act_dim
    )
    for name, actions in samples.items():
        bound = (actions.abs() == 1).float().mean()
        std = actions.view(SAMPLES, -1, act_dim).std(0).mean()
        q = critic(obs, actions).mean()
        print(f"| {args.seed} | {name} | {bound:.2f} | {std:.2f} | {q:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python results/same_critic.py RUN [RUN ...]")
    print(
        "| seed | actions from | on a bound | standard deviation | mean Q |\n|---|---|---|---|---|"
    )
    for path in sys.argv[1:]:
        report(Path(path))
