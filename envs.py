"""Vectorized Gymnasium environments with actions in [-1, 1] and transitions that never cross an episode.

Beside the standard library only gymnasium and numpy are imported, so the file can be copied on its own.
"""

import multiprocessing
import os
import pickle
import signal
import warnings

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv


class SyncEnvs(SyncVectorEnv):
    """SyncVectorEnv with the `step_async` and `step_wait` of AsyncVectorEnv, so that a loop needs one path only."""

    def step_async(self, actions: np.ndarray) -> None:
        self._pending_actions = actions

    def step_wait(self):
        return self.step(self._pending_actions)


class Snapshot(gym.Wrapper):
    """`snapshot` is the state of an environment, mid-episode, as bytes to be set on another copy of it.

    The attributes of every layer: the simulator (pickled MjData; MuJoCo's own mj_setState would lose what the next
    reward is computed from), the time limit's count, the running return, the random state. Without what is the same in
    every copy. None where a simulator cannot be pickled (dm_control).
    """

    SHARED = ("env", "func", "model", "mujoco_renderer", "spec", "action_space", "observation_space")

    def layers(self) -> list[gym.Env]:
        layers = [self.env]
        while layers[-1] is not self.unwrapped:
            layers.append(layers[-1].env)
        return layers

    @property
    def snapshot(self) -> bytes | None:
        states = [{k: v for k, v in vars(layer).items() if k not in self.SHARED} for layer in self.layers()]
        try:
            return pickle.dumps(states)
        except (TypeError, AttributeError, pickle.PicklingError):
            return None

    @snapshot.setter
    def snapshot(self, value: bytes) -> None:
        for layer, state in zip(self.layers(), pickle.loads(value), strict=True):
            vars(layer).update(state)


def make_env(env_id: str) -> gym.Env:
    """One environment: flat float observations, actions rescaled from [-1, 1], episode statistics.

    Any Gymnasium id with a Box (or dict of Box) observation and a bounded Box action space; `dm_control/...` ids
    need the package shimmy.

    Raises:
        ValueError: with one line to show to a user, when the id is unknown, a package is missing, or the spaces
            are not continuous and bounded.
    """
    if env_id.startswith("dm_control/"):
        try:
            import shimmy
        except ImportError:
            raise ValueError(f"{env_id} needs: pip install 'shimmy[dm-control]'") from None
        gym.register_envs(shimmy)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is what the published tables use
            env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"cannot make the environment {env_id}: {str(error).splitlines()[0]}") from None

    if not isinstance(env.action_space, gym.spaces.Box):
        raise ValueError(f"{env_id} has the action space {env.action_space}; QSM needs a continuous one (Box)")
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        raise ValueError(f"{env_id} has an unbounded action space; QSM needs finite bounds, as RescaleAction does")
    if isinstance(env.observation_space, gym.spaces.Dict) or len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        raise ValueError(
            f"{env_id} has the observation space {env.observation_space}; QSM needs a Box or a dict of Box"
        )
    # The only place where action bounds are known (Humanoid +-0.4, InvertedPendulum +-3, ...): dQ/da, the sampler's
    # clamp and alpha then mean the same on every task. RescaleAction does not clip, the sampler's clamp does.
    one = env.action_space.dtype.type(1)
    env = gym.wrappers.RescaleAction(env, -one, one)
    if multiprocessing.parent_process():  # a worker: Ctrl-C and a scheduler's SIGTERM reach it with the main process,
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which still needs it to end its step and write a checkpoint
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(60))
    return Snapshot(gym.wrappers.RecordEpisodeStatistics(env))  # the vector form of the latter would hide step_async


def make_envs(env_id: str, num_envs: int, asynchronous: bool | None = None) -> SyncEnvs | AsyncVectorEnv:
    """`num_envs` copies of `env_id`, restarted within the step that ends an episode (SAME_STEP).

    Args:
        asynchronous: one worker process per environment, stepping while the caller computes; None: when there
            are several environments and more cores than that. On 2 cores workers do not pay: 4 HalfCheetah-v4 step
            0.4 times as fast as in one process, 4 Humanoid-v4 0.9 times.

    Raises:
        ValueError: as `make_env`.
    """
    make_env(env_id).close()  # a bad id fails here, in one line, and not inside worker processes
    if asynchronous is None:
        asynchronous = 1 < num_envs < (os.cpu_count() or 1)
    # Gymnasium's default, NEXT_STEP, would put one bogus transition per episode into the buffer.
    return (AsyncVectorEnv if asynchronous else SyncEnvs)(
        [lambda: make_env(env_id)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP
    )


def true_next_obs(next_obs: np.ndarray, dones: np.ndarray, infos: dict) -> np.ndarray:
    """The observations that the steps led to, (N, O).

    In SAME_STEP mode `next_obs` holds, where an episode ended, the first observation of the next episode. That is
    what the policy acts on, but not what the transition led to. `next_obs` itself is left as it is.
    """
    if not dones.any():
        return next_obs
    next_obs = next_obs.copy()
    next_obs[dones] = np.stack(infos["final_obs"][dones])
    return next_obs


def finished_episodes(dones: np.ndarray, infos: dict) -> list[tuple[int, float, int]]:
    """(environment index, return, length) of each episode that ended in this step."""
    if not dones.any():
        return []
    episode = infos["final_info"]["episode"]
    return [(int(i), float(episode["r"][i]), int(episode["l"][i])) for i in np.flatnonzero(dones)]
