"""Evaluate the policy of a run, also while it trains: print the returns, append to evaluate.csv.

    python results/evaluate.py runs/<run> --episodes 20 --candidates 16
    python results/evaluate.py runs/<run> --video    # the first episode; pip install moviepy
    python results/evaluate.py runs/<run> --deterministic      # no noise in the sampler

Only model.pt is read, which holds no code. If it names code (an --env-id module:id), repeat its id:
--env-id module:id.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv

sys.path.insert(0, str(Path(__file__).parents[1]))
import runfiles
from envs import UserError, make_env, user_errors
from fast import tune
from qsm import Args, Learner, evaluate, make_learner, make_schedule


@dataclass
class Evaluation:
    run: tyro.conf.Positional[Path]  # the folder of a run
    episodes: int = 10  # one in each of as many environments
    seed: int = 1  # environment i has 1,000,000 + seed + i: seeds 1 and 2 share all but one of them
    candidates: int | None = None  # actions drawn; the best by min-Q acts; None: as many as the run
    deterministic: bool = False  # no noise in the sampler; into evaluate-deterministic.csv
    env_id: str = ""  # to allow the import of a module
    video: bool = False  # record the first episode; needs libegl1, or libosmesa6, MUJOCO_GL=osmesa


def load_policy(run: Path) -> tuple[Args, Learner, int]:
    """Arguments, learner (the saved policy, critic and q_scale; on the CPU), and steps made."""
    path = run / "model.pt"
    with user_errors(f"{path} is damaged, or of another version of qsm.py"):
        model = torch.load(path, map_location="cpu", weights_only=True)
        args = Args(**model["args"])
        act_dim = len(model["score_net"]["out.bias"])
        obs_dim = model["critic"]["weights.0"].shape[1] - act_dim
        learner = make_learner(args, obs_dim, act_dim, "cpu")
        learner.score_net.load_state_dict(model["score_net"])
        learner.critic.load_state_dict(model["critic"])
        learner.q_scale.copy_(model["q_scale"])
    return args, learner, model["global_step"]


def make_video_env(env_id: str, path: Path) -> gym.Env:
    needs = "moviepy, and libegl1 or, with MUJOCO_GL=osmesa, libosmesa6"
    with user_errors(f"cannot record, which needs {needs}"):
        env = make_env(env_id, render_mode="rgb_array")
        env.reset(seed=0)
        env.render()  # a missing OpenGL library shows here
        options = {"episode_trigger": lambda episode: episode == 0, "name_prefix": path.name}
        return gym.wrappers.RecordVideo(env, str(path.parent), **options)


@runfiles.errors_in_one_line()
def main(flags: Evaluation) -> None:
    args, learner, global_step = load_policy(flags.run)
    if ":" in args.env_id and flags.env_id != args.env_id:  # gym.make imports, and so runs, it
        raise UserError(f"the model names code; if you trust it, add --env-id {args.env_id}")
    if min(flags.episodes, 1 if flags.candidates is None else flags.candidates) < 1:
        raise UserError("--episodes and --candidates must be at least 1")
    args = replace(args, seed=flags.seed, candidates=flags.candidates or args.candidates)
    makers = [partial(make_env, args.env_id)] * flags.episodes
    if flags.video:
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
        path = flags.run / f"videos/step-{global_step}-seed-{args.seed}"
        makers[0] = partial(make_video_env, args.env_id, path)
    envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    tune(torch.device("cpu"))  # as in training: products round alike
    schedule = make_schedule(args.beta_schedule, args.diffusion_steps)
    noise_scale = 0.0 if flags.deterministic else 1.0
    episodes = evaluate(learner, envs, schedule, args, noise_scale=noise_scale)
    envs.close()
    name = "evaluate-deterministic.csv" if flags.deterministic else "evaluate.csv"
    with (flags.run / name).open("a") as file:
        runfiles.write_evaluation(file, global_step, args, episodes)


if __name__ == "__main__":
    main(tyro.cli(Evaluation, description=__doc__))
