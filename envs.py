"""Vectorized Gymnasium environments: actions in [-1, 1], no transition crosses an episode's end."""

import contextlib
import pickle
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class UserError(Exception):
    """An error that a user can fix; the text is one line."""


def one_line(error: Exception) -> str:
    """Type and start of the text of an exception."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:250]


@contextlib.contextmanager
def user_errors(what: str):
    """Any exception becomes a UserError: simulators and damaged files may raise any."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error)}") from error


class Snapshot(gym.Wrapper):
    """`snapshot` is the state of an environment, mid-episode, as bytes to set on another copy.

    It holds the attributes of every layer: the simulator (pickled MjData; MuJoCo's own mj_setState
    loses what the next reward is computed from), the count of the time limit, the running return,
    the random state. It is None where a simulator cannot be pickled.
    """

    def layers(self) -> list[gym.Env]:
        layers = [self.env]
        while layers[-1] is not self.unwrapped:
            layers.append(layers[-1].env)
        return layers

    @property
    def snapshot(self) -> bytes | None:
        wrapping = ["env", "func", "_saved_kwargs"]
        constant = ["spec", "action_space", "observation_space"]
        if hasattr(self.unwrapped, "mujoco_renderer"):
            constant += ["mujoco_renderer", "model"]  # megabytes; changes of it are lost
        states = []
        for layer in self.layers():
            shared = constant + (wrapping if isinstance(layer, gym.Wrapper) else [])
            states.append({k: v for k, v in vars(layer).items() if k not in shared})
        try:
            return pickle.dumps(states)
        except Exception:  # each simulator fails in its own way
            return None

    @snapshot.setter
    def snapshot(self, value: bytes) -> None:
        for layer, state in zip(self.layers(), pickle.loads(value), strict=True):
            vars(layer).update(state)


def make_env(env_id: str, **options) -> gym.Env:
    """One environment: flat float observations, actions rescaled from [-1, 1], episode statistics.

    `options` are gym.make's. UserError: an unknown id, a missing package, observations that cannot
    be flattened to a Box, or actions that are not a 1-D, bounded, continuous Box.
    """
    hint = ""
    if env_id.startswith("dm_control/"):  # gym.make imports what is before a colon
        env_id, hint = f"shimmy:{env_id}", " (pip install 'shimmy[dm-control]')"
    with user_errors(f"cannot make {env_id}{hint}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is out of date")  # v4: published tables use it
        env = gym.make(env_id, **options)
    space = env.action_space
    box = isinstance(space, gym.spaces.Box) and space.is_bounded() and len(space.shape) == 1
    if not (box and space.dtype.kind == "f" and (space.low < space.high).all()):
        raise UserError(f"QSM needs actions in a continuous 1-D Box with bounds, not {space}")
    env = gym.wrappers.FlattenObservation(env)  # images, dicts; and copies: some reuse their array
    if not isinstance(env.observation_space, gym.spaces.Box):
        raise UserError(f"QSM needs a Box of observations; {env_id} has {env.observation_space}")
    # Bounds differ between tasks (Humanoid +-0.4). RescaleAction does not clip; the sampler does.
    env = gym.wrappers.RescaleAction(env, *np.array([-1, 1], space.dtype))
    return Snapshot(gym.wrappers.RecordEpisodeStatistics(env))


def make_envs(env_id: str, num_envs: int) -> SyncVectorEnv:
    """`num_envs` copies of `make_env(env_id)`, stepped one after the other."""
    # Worker processes are slower: on 2 cores, 0.4 times the speed for 4 HalfCheetah-v4.
    # Gymnasium's default, NEXT_STEP, would put one bogus transition per episode into the buffer.
    mode = AutoresetMode.SAME_STEP
    return SyncVectorEnv([partial(make_env, env_id)] * num_envs, autoreset_mode=mode)


def reset(envs: SyncVectorEnv, seed: int) -> np.ndarray:
    """First observations (N, O) of new episodes in float32; environment i gets seed + i."""
    with user_errors("an environment failed"), np.errstate(over="ignore"):
        obs = envs.reset(seed=seed)[0].astype(np.float32)
    if not np.isfinite(obs).all():
        raise UserError("an environment began with a value that is not finite")
    return obs


def step(envs: SyncVectorEnv, actions: np.ndarray) -> tuple:
    """Step all environments with actions (N, A).

    Returns in float32: rewards (N,); next_obs (N, O), what the step led to, the final observation
    of an ended episode; terminations (N,), 0 or 1, and 0 for a time limit; obs (N, O), what to act
    on next, the first observation of the next episode. And (environment, return, length) of each
    episode that ended. UserError: an environment failed, or a value is not finite in float32.
    """
    with user_errors("an environment failed"):
        obs, rewards, terminations, truncations, infos = envs.step(actions)
    next_obs, episodes = obs.copy(), []
    for i in np.flatnonzero(terminations | truncations):
        next_obs[i], episode = infos["final_obs"][i], infos["final_info"]["episode"]
        episodes.append((int(i), float(episode["r"][i]), int(episode["l"][i])))
    with np.errstate(over="ignore"):  # 1e39 is finite in float64 only
        arrays = [x.astype(np.float32) for x in (rewards, next_obs, terminations, obs)]
    finite = np.isfinite(np.column_stack(arrays)).all(1)  # (N,)
    if not finite.all():
        raise UserError(f"environment {finite.argmin()} diverged: a value is not finite")
    return *arrays, episodes
