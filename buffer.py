"""Replay buffer: preallocated float32 tensors on the training device."""

from typing import NamedTuple

import psutil
import torch


class Batch(NamedTuple):
    """B transitions."""

    obs: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, A), in [-1, 1]
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O), the true final observation where an episode ended
    terminations: torch.Tensor  # (B,), 1 at a terminal state, else 0, also at a time limit


class ReplayBuffer:
    """The last `capacity` transitions on `device`, sampled uniformly with replacement.

    Raises:
        MemoryError: on a CPU, if it is larger than the free memory. Pages are handed out only as
            it fills: without this check a run would be killed after hours. A container's limit is
            not seen.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device="cpu"):
        self.capacity, self.device = capacity, torch.device(device)
        free = psutil.virtual_memory().available
        needed = capacity * 4 * (2 * obs_dim + act_dim + 2)  # bytes
        if self.device.type == "cpu" and needed > free:  # on CUDA empty() raises
            sizes = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            raise MemoryError(f"the replay buffer needs {sizes}: lower --buffer-size")
        shapes = ((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.storage = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.position = 0  # next row to write
        self.size = 0  # rows that hold data

    def add(self, transitions: Batch) -> None:
        """Store N <= capacity transitions over the oldest ones; ValueError on a wrong shape."""
        n = len(transitions.rewards)
        rows = torch.arange(self.position, self.position + n, device=self.device) % self.capacity
        for name, stored, new in zip(Batch._fields, self.storage, transitions, strict=True):
            if new.shape != (n, *stored.shape[1:]):  # (N, 1) would broadcast
                raise ValueError(f"{name} must be {(n, *stored.shape[1:])}, not {tuple(new.shape)}")
            stored[rows] = new
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """A batch of uniformly drawn transitions, with replacement."""
        rows = torch.randint(self.size, (batch_size,), device=self.device, generator=generator)
        return Batch(*(x.index_select(0, rows) for x in self.storage))  # faster than x[rows]
