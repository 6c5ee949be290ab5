"""Why a run with the released target stays where it is: what each target samples from the run's own final critic.

    python results/same_critic.py runs/HalfCheetah-v4__qsm__*      # a minute or two a run

The same critic is sampled with the trained score network and with a network that is exactly at its target, released or
posterior. Neither the fit nor the critic can then explain a difference. 128 states of the trained policy, 16 samples at
each: share of action coordinates on a bound, standard deviation at one state (uniform: 0.58, a fair coin between -1 and
1: 1), mean Q of the samples.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from envs import make_envs
from networks import Critic, ScoreNet
from qsm import Args, make_schedule, posterior_mean, q_gradient, sample_actions

SAMPLES = 16


class ExactScore:
    """Stands in for ScoreNet: its prediction equal to its regression target for this critic, at every t.

    The posterior target depends on the prediction. Training moves a prediction to it in small steps, and so does this:
    100 steps of 0.05, from 0.
    """

    def __init__(self, critic: Critic, obs: torch.Tensor, args: Args, scale: torch.Tensor):
        self.critic, self.obs, self.args, self.scale = critic, obs, args, scale
        self.schedule = make_schedule(args.beta_schedule, args.diffusion_steps)

    def time_features(self) -> torch.Tensor:
        return self.schedule.alphas_cumprod[:, None]

    def obs_features(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(obs), 1)

    def drift(self, actions: torch.Tensor) -> torch.Tensor:
        return self.args.alpha * q_gradient(self.critic, self.obs, actions) / self.scale

    def denoise(self, alphas_cumprod: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        if self.args.score_target == "released":
            return -self.drift(actions)
        clean = torch.zeros_like(actions)
        for _ in range(100):
            clean = clean.lerp(
                posterior_mean(self.drift(clean), actions, alphas_cumprod, self.schedule), 0.05
            )
        return clean


def sample(score, obs: torch.Tensor, args: Args, act_dim: int, noisy: bool = False) -> torch.Tensor:
    noise = torch.randn(args.diffusion_steps + 1, len(obs), act_dim)
    noise[-1] *= noisy
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    return sample_actions(score, obs, noise, schedule, args)


def report(run: Path) -> None:
    """Print the rows of one run."""
    torch.manual_seed(0)
    saved = torch.load(run / "model.pt", weights_only=True)
    args = Args(
        **{name: value for name, value in saved["args"].items() if name in Args.__annotations__}
    )
    envs = make_envs(args.env_id, 8, asynchronous=False)
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    score_net = ScoreNet(obs_dim, act_dim, args.hidden_dims, args.diffusion_steps)
    score_net.load_state_dict(saved["score_net"])
    critic = Critic(obs_dim, act_dim, args.hidden_dims).requires_grad_(False)
    critic.load_state_dict(saved["critic"])

    states, obs = [], envs.reset(seed=0)[0]
    for _ in range(64):
        states.append(torch.as_tensor(obs, dtype=torch.float32))
        obs, *_ = envs.step(sample(score_net, states[-1], args, act_dim, noisy=True).numpy())
    envs.close()
    obs = torch.cat(states[::4]).repeat(SAMPLES, 1)
    uniform = torch.rand(len(obs), act_dim) * 2 - 1
    scale = q_gradient(critic, obs, uniform).abs().mean()
    samples = {
        "score network of the run": sample(score_net, obs, args, act_dim),
        "uniform": uniform,
    }
    for target in ("released", "posterior"):
        exact = Args(score_target=target)
        score = ExactScore(critic, obs, exact, scale if exact.normalize_q_grad else torch.ones(()))
        samples[f"exactly the {target} target"] = sample(score, obs, exact, act_dim)
    for name, actions in samples.items():
        bound = (actions.abs() == 1).float().mean()
        std = actions.view(SAMPLES, -1, act_dim).std(0).mean()
        print(
            f"| {saved['args']['seed']} | {name} | {bound:.2f} | {std:.2f} | {critic(obs, actions).mean():.2f} |"
        )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python results/same_critic.py RUN [RUN ...]")
    print(
        "| seed | actions from | on a bound | standard deviation | mean Q |\n|---|---|---|---|---|"
    )
    for path in sys.argv[1:]:
        report(Path(path))
