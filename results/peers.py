"""SAC and TD3 of Stable-Baselines3 under the protocol of our runs, written as data beside them.

    pip install 'stable-baselines3>=2.9,<3' 'gymnasium[mujoco]' tyro
    OMP_NUM_THREADS=1 python results/peers.py --algo sac --env-id Hopper-v4 --seed 1

Environments, batch, networks and number of updates (one more) are ours. The learning rate is 3e-4
(ours: 1e-3). TD3 explores with Gaussian noise of 0.1, as published; all else is Stable-Baselines3's
default. At the end it evaluates 10 episodes of the mean action.
"""

import csv
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor


@dataclass
class Args:
    algo: Literal["sac", "td3"] = "sac"
    env_id: str = "HalfCheetah-v4"
    seed: int = 1
    num_envs: int = 4
    total_timesteps: int = 120_000  # environment steps; one update per step of all environments
    learning_starts: int = 5_000
    hidden_dims: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    lr: float = 3e-4
    out: Path = Path("results/cpu-120k")
    label: str = ""  # of the run's folder; empty: the algorithm


class WriteEpisodes(BaseCallback):
    """Append (global_step, env, return, length) of every finished training episode to a CSV."""

    def __init__(self, path: Path):
        super().__init__()
        self.file = path.open("w", newline="", buffering=1)
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.rows.writerow(["global_step", "env", "return", "length"])

    def _on_step(self) -> bool:
        for i, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                self.rows.writerow(
                    [self.num_timesteps, i, info["episode"]["r"], info["episode"]["l"]]
                )
        return True


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", message=".*is out of date")
    name = f"{re.sub('[/:]', '-', args.env_id)}__{args.label or args.algo}__seed{args.seed}"
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    envs = VecMonitor(DummyVecEnv([lambda: gym.make(args.env_id)] * args.num_envs))
    common = {
        "learning_rate": args.lr,
        "learning_starts": args.learning_starts,
        "batch_size": args.batch_size,
        "train_freq": 1,
        "gradient_steps": 1,
        "policy_kwargs": {"net_arch": list(args.hidden_dims)},
        "seed": args.seed,
        "device": "cpu",
    }
    if args.algo == "sac":
        model = stable_baselines3.SAC("MlpPolicy", envs, **common)
    else:
        act_dim = envs.action_space.shape[0]
        noise = NormalActionNoise(np.zeros(act_dim), 0.1 * np.ones(act_dim))
        model = stable_baselines3.TD3("MlpPolicy", envs, action_noise=noise, **common)
    model.learn(args.total_timesteps, callback=WriteEpisodes(folder / "episodes.csv"))

    eval_env = VecMonitor(DummyVecEnv([lambda: gym.make(args.env_id)]))
    eval_env.seed(args.seed + 1_000_000)
    returns, lengths = evaluate_policy(
        model, eval_env, 10, deterministic=True, return_episode_rewards=True
    )
    with (folder / "evaluations.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["global_step", "candidates", "episode", "return", "length"])
        rows.writerows(
            (model.num_timesteps, 1, i, *e)
            for i, e in enumerate(zip(returns, lengths, strict=True))
        )
    settings = {k: value for k, value in asdict(args).items() if k not in ("out", "label")}
    versions = {"stable_baselines3": stable_baselines3.__version__, "torch": torch.__version__}
    with (folder / "args.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            ((settings | versions) | {"updates": model._n_updates}).items()
        )
    print(name, model._n_updates, "updates, last evaluation", np.mean(returns))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
