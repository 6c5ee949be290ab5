"""Replay buffer: preallocated float32 tensors on the training device.

Only torch and psutil are imported, so the file can be copied on its own.
"""

from typing import NamedTuple

import psutil
import torch


class Batch(NamedTuple):
    """B transitions. `terminations` is 1 where the episode ended in a terminal state, never for a time limit."""

    obs: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, A), in [-1, 1]
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O), the true final observation where an episode ended
    terminations: torch.Tensor  # (B,), 0.0 or 1.0


class ReplayBuffer:
    """The last `capacity` transitions, sampled uniformly with replacement.

    Args:
        capacity: number of transitions kept; older ones are overwritten.
        obs_dim, act_dim: sizes O and A of one observation and one action.
        device: where the storage lives and batches are gathered; transitions never travel twice.

    Raises:
        MemoryError: it will not fit. Memory is taken page by page as the buffer fills, so that without this check a
            run would end after hours of training. The machine's memory counts: limits of a container are not seen.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device | str = "cpu"):
        self.capacity, self.device = capacity, torch.device(device)
        num_bytes = self.num_bytes(capacity, obs_dim, act_dim)
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else psutil.virtual_memory().available
        if num_bytes > free:
            sizes = f"needs {num_bytes / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free"
            raise MemoryError(f"a replay buffer of {capacity:,} transitions {sizes}: lower --buffer-size")
        shapes = ((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.storage = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        self.position = 0  # next row to write
        self.size = 0  # rows that hold data

    @staticmethod
    def num_bytes(capacity: int, obs_dim: int, act_dim: int) -> int:
        """Memory that a buffer of this capacity takes, in bytes."""
        return capacity * 4 * (2 * obs_dim + act_dim + 2)

    def add(self, transitions: Batch) -> None:
        """Store N transitions (N <= capacity), overwriting the oldest.

        Raises:
            ValueError: a field's shape is not (N, ...) as in `Batch`; (N, 1) rewards would otherwise broadcast.
        """
        n = transitions.rewards.shape[0]
        for name, stored, new in zip(Batch._fields, self.storage, transitions, strict=True):
            if new.shape != (n, *stored.shape[1:]):
                raise ValueError(f"{name} must have shape {(n, *stored.shape[1:])}, got {tuple(new.shape)}")
        head = min(n, self.capacity - self.position)  # rows before the end of the ring; the rest start again at 0
        for stored, new in zip(self.storage, transitions, strict=True):
            stored[self.position : self.position + head] = new[:head]
            stored[: n - head] = new[head:]
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample_indices(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Uniform row numbers with replacement, (B,). Apart from `gather` so that a caller can fix them."""
        return torch.randint(self.size, (batch_size,), device=self.device, generator=generator)

    def gather(self, indices: torch.Tensor) -> Batch:
        """The transitions at these rows, (B,) -> Batch."""
        return Batch(*(stored.index_select(0, indices) for stored in self.storage))  # faster than stored[indices]
