"""What a checkpoint with a full Humanoid-v4 replay buffer costs: size, seconds and extra memory of saving and loading.

    python benchmarks/checkpoint.py --transitions 1000000

Needs about 3.1 GB of memory and as much disk in the temporary folder.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from buffer import ReplayBuffer
from envs import make_envs
from qsm import Args, make_learner
from runs import load_checkpoint, restore_checkpoint, save_checkpoint


def measured(name: str, function) -> None:
    """Print the seconds that `function()` takes, and the rise of resident memory while it runs."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(f"{name}: {seconds:.1f} s, peak of resident memory +{max(0, peak - before) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transitions", type=int, default=1_000_000)
    transitions = parser.parse_args().transitions
    args, envs = Args(), make_envs("Humanoid-v4", 1)
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    envs.reset(seed=0)
    learner, buffer = make_learner(args, obs_dim, act_dim, "cpu"), ReplayBuffer(transitions, obs_dim, act_dim)
    for stored in buffer.storage:
        stored.normal_()
    buffer.size = transitions
    generators = (torch.Generator(),)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.zip"
        measured("save", lambda: save_checkpoint(path, {}, learner, buffer, envs, generators))
        arithmetic = ReplayBuffer.num_bytes(transitions, obs_dim, act_dim)
        print(f"size: {path.stat().st_size / 1e9:.3f} GB, {path.stat().st_size / arithmetic:.3f} of the buffer's")
        measured("load", lambda: restore_checkpoint(path, load_checkpoint(path), learner, buffer, envs, generators))


if __name__ == "__main__":
    main()
