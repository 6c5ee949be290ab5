"""Vectorized Gymnasium environments with actions in [-1, 1] and transitions that never cross an episode.

Beside the standard library only gymnasium and numpy are imported, so the file can be copied on its own.
"""

import multiprocessing.connection
import os
import pickle
import signal
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState


class SyncEnvs(SyncVectorEnv):
    """SyncVectorEnv with the `step_async` and `step_wait` of AsyncVectorEnv, so that a loop needs one path only."""

    def step_async(self, actions: np.ndarray) -> None:
        self._pending_actions = actions

    def step_wait(self):
        return self.step(self._pending_actions)


class AsyncEnvs(AsyncVectorEnv):
    """AsyncVectorEnv whose `step_wait` raises ChildProcessError, with one line to show, when a worker died."""

    def step_async(self, actions: np.ndarray) -> None:
        try:
            super().step_async(actions)
        except (BrokenPipeError, ConnectionResetError):
            self._state = AsyncState.WAITING_STEP  # `step_wait` finds the same end of the pipe

    def step_wait(self, timeout: float | None = None):
        try:
            return super().step_wait(timeout)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            dead = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=1)
            codes = {}
            for i, process in enumerate(self.processes):
                if process.sentinel in dead:
                    process.join(timeout=1)
                    codes[i] = process.exitcode
            self._state = AsyncState.DEFAULT  # or closing would wait for this step again
            self.close(terminate=True)
            message = f"the worker process of environment {next(iter(codes), '?')} died (exit codes {codes})"
            raise ChildProcessError(message) from None


class Snapshot(gym.Wrapper):
    """`snapshot` is the state of an environment, mid-episode, as bytes to be set on another copy of it.

    The attributes of every layer: the simulator (pickled MjData; MuJoCo's own mj_setState would lose what the next
    reward is computed from), the time limit's count, the running return, the random state. Without what is the same in
    every copy. None where a simulator cannot be pickled.
    """

    SHARED = ("env", "func", "model", "mujoco_renderer", "spec", "action_space", "observation_space", "_saved_kwargs")

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
        except Exception:  # TypeError, AttributeError, ValueError, ...: each simulator fails in its own way
            return None

    @snapshot.setter
    def snapshot(self, value: bytes) -> None:
        for layer, state in zip(self.layers(), pickle.loads(value), strict=True):
            vars(layer).update(state)


def record(env_id: str, video: Path) -> gym.Env:
    """An environment that writes its first episode to `video`; raises ImportError with what to install."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # else MuJoCo tries to open a window
    env = gym.make(env_id, render_mode="rgb_array")
    try:
        env.reset(seed=0)
        env.render()
    except Exception as error:  # each backend fails in its own way
        raise ImportError(f"it cannot be rendered: {error!r}") from None
    return gym.wrappers.RecordVideo(env, str(video.parent), lambda n: n == 0, name_prefix=video.name)


def make_env(env_id: str, video: Path | None = None) -> gym.Env:
    """One environment: flat float observations, actions rescaled from [-1, 1], episode statistics.

    Any Gymnasium id with a Box (or dict of Box) observation and a bounded Box action space; `dm_control/...` ids
    need the package shimmy.

    Args:
        video: record the first episode as this file, whose name gets "-episode-0.mp4"; needs the package moviepy.

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
            warnings.filterwarnings("ignore", message=".*Overwriting existing videos")
            env = record(env_id, video) if video else gym.make(env_id)
    except Exception as error:  # of an environment's constructor, or when MUJOCO_GL names a missing library
        hint = " (MUJOCO_GL=egl needs libegl1, MUJOCO_GL=osmesa needs libosmesa6)" if "MUJOCO_GL" in os.environ else ""
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ValueError(f"cannot make the environment {env_id}: {reason}{hint}") from None

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
    return Snapshot(gym.wrappers.RecordEpisodeStatistics(env))  # the vector form of the latter would hide step_async


def make_envs(
    env_id: str, num_envs: int, asynchronous: bool | None = None, video: Path | None = None
) -> SyncEnvs | AsyncEnvs:
    """`num_envs` copies of `env_id`, restarted within the step that ends an episode (SAME_STEP).

    Args:
        asynchronous: one worker process per environment, stepping while the caller computes; None: when there
            are several environments and more cores than that. On 2 cores workers do not pay: 4 HalfCheetah-v4 step
            0.4 times as fast as in one process, 4 Humanoid-v4 0.8 times.
        video: record the first episode of the first environment, see `make_env`.

    Raises:
        ValueError: as `make_env`.
    """
    make_env(env_id).close()  # a bad id fails here, in one line, and not inside worker processes
    if asynchronous is None:
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        asynchronous = 1 < num_envs < len(cores)  # the cores that a scheduler lets this process use
    # Gymnasium's default, NEXT_STEP, would put one bogus transition per episode into the buffer.
    main_process = os.getpid()

    def make(video: Path | None = None) -> gym.Env:
        if os.getpid() != main_process:  # a worker, to which Ctrl-C and a scheduler's SIGTERM come as to the main
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # process, which still needs it to end its step and to
            signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(60))  # write a checkpoint
        return make_env(env_id, video)

    makers = [lambda: make(video)] + [make] * (num_envs - 1)
    return (AsyncEnvs if asynchronous else SyncEnvs)(makers, autoreset_mode=AutoresetMode.SAME_STEP)


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


def finite_float32(*arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays of one row per environment, in float32.

    Raises:
        FloatingPointError: with one line to show, if a value is not finite there: 1e39 is so in float64 only.
    """
    with np.errstate(over="ignore"):
        arrays = [x.astype(np.float32) for x in arrays]
    finite = np.isfinite(np.column_stack(arrays)).all(1)  # (N,)
    if not finite.all():
        raise FloatingPointError(f"environment {finite.argmin()} diverged: its reward or observation is not finite")
    return arrays


def finished_episodes(dones: np.ndarray, infos: dict) -> list[tuple[int, float, int]]:
    """(environment index, return, length) of each episode that ended in this step."""
    if not dones.any():
        return []
    episode = infos["final_info"]["episode"]
    return [(int(i), float(episode["r"][i]), int(episode["l"][i])) for i in np.flatnonzero(dones)]
