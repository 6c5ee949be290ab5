"""The folder of a run: logs and exact resume. Apart from qsm.py because nothing here is part of the algorithm.

A checkpoint is one zip archive, uncompressed, with a checksum per member: `run.pkl` (arguments, counters, random
states, simulators), `tensors.pt` (networks, optimizers) and `buffer/<field>` (the filled rows). `run.pkl` is a Python
pickle, which can run code when it is read: resume only runs that you made yourself. To pass a policy on to others use
model.pt.
"""

import csv
import io
import os
import pickle
import random
import signal
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from buffer import ReplayBuffer

CHUNK = 1 << 16  # rows of the buffer that are copied at a time: a checkpoint needs no second copy of it in memory


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the text is one line to show to a user."""


class RunFolder:
    """Event file and CSVs of a run, new or continued after `resumed_at` environment steps.

    Args:
        path: the folder; made when the run is new.
        hyperparameters: shown in TensorBoard.
        resumed_at: drop what was written after this step, since a resumed run writes it again; None: a new run.

    Raises:
        OSError: the folder exists already, cannot be made or cannot be written to.
    """

    def __init__(self, path: Path, hyperparameters: dict, resumed_at: int | None = None):
        self.path, self.checkpoint = path, path / "checkpoint.zip"
        if resumed_at is None:
            path.mkdir(parents=True)
        self.events = SummaryWriter(path, purge_step=None if resumed_at is None else resumed_at + 1)
        if resumed_at is None:
            rows = "\n".join(f"|{name}|{value}|" for name, value in hyperparameters.items())
            self.events.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.files = []
        self.episodes = self._csv("episodes.csv", ["global_step", "env", "return", "length"], resumed_at)
        self.evaluations = self._csv("evaluations.csv", ["global_step", "episode", "return", "length"], resumed_at)

    def _csv(self, name: str, header: list[str], resumed_at: int | None):
        rows, path = [], self.path / name
        if resumed_at is not None:
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(header) and row[0].isdecimal()]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= resumed_at)])
        os.replace(temporary, path)
        self.files.append(path.open("a", newline="", buffering=1))  # by line: a killed run keeps what it wrote
        return csv.writer(self.files[-1])

    def close(self) -> None:
        for file in (self.events, *self.files):
            file.close()


class StopRequest:
    """`signum` becomes that of SIGTERM or Ctrl-C, so that a loop can end its step first; a second signal kills."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame) -> None:
        self.signum = signum
        self.restore()

    def restore(self) -> None:
        """Give both signals their usual effect again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _random_states(envs, generators) -> list:
    """Every random state of this process; those of the environments are in their snapshots."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    libraries = [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]
    return [*libraries, envs.action_space.np_random.bit_generator.state, [g.get_state() for g in generators]]


def _set_random_states(states: list, envs, generators) -> None:
    python, numpy, cpu, cuda, actions, own = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)
    envs.action_space.np_random.bit_generator.state = actions
    for generator, state in zip(generators, own, strict=True):
        generator.set_state(state)


def save_checkpoint(path: Path, loop: dict, learner, buffer: ReplayBuffer, envs, generators, with_buffer: bool) -> None:
    """Write a checkpoint, whole or not at all: to a temporary file, flushed to the disk, then renamed.

    Args:
        loop: arguments, counters and whatever else the loop continues from.
        learner: NamedTuple of modules, optimizers and tensors.
        generators: the random generators of the run.
        with_buffer: without the replay buffer the file is small, and a resumed run is not the same run.

    Raises:
        OSError: no space, no permission; an older checkpoint at `path` is as it was.
    """
    parts = learner._asdict().items()
    tensors = {name: part if isinstance(part, torch.Tensor) else part.state_dict() for name, part in parts}
    rows = (buffer.size, buffer.position) if with_buffer else (0, 0)
    run = {"loop": loop, "rows": rows, "envs": envs.get_attr("snapshot"), "random": _random_states(envs, generators)}
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("run.pkl", pickle.dumps(run))
                memory = io.BytesIO()
                torch.save(tensors, memory)
                archive.writestr("tensors.pt", memory.getvalue())
                for name, stored in buffer.storage._asdict().items():
                    with archive.open(f"buffer/{name}", "w", force_zip64=True) as member:
                        for piece in stored[: rows[0]].split(CHUNK):
                            member.write(piece.cpu().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """What `restore_checkpoint` takes; its key "loop" is the `loop` that was saved.

    Raises:
        CheckpointError: not a checkpoint, or one that was cut short or changed on the disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            run = pickle.loads(archive.read("run.pkl"))
            return {**run, "tensors": torch.load(io.BytesIO(archive.read("tensors.pt")), weights_only=True)}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a foreign or damaged pickle can fail in any way
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of qsm.py: {error!r}") from None


def restore_checkpoint(path: Path, saved: dict, learner, buffer: ReplayBuffer, envs, generators) -> bool:
    """Put everything back in place that `save_checkpoint` wrote; False if the simulators could not be saved.

    Raises:
        CheckpointError: it does not fit this learner, this buffer or these environments, or it is damaged.
    """
    try:
        for name, part in learner._asdict().items():
            state = saved["tensors"][name]
            part.copy_(state) if isinstance(part, torch.Tensor) else part.load_state_dict(state)
        buffer.size, buffer.position = saved["rows"]
        if not buffer.size:
            print("the checkpoint holds no replay buffer: a new one is filled first, without updates")
        with zipfile.ZipFile(path) as archive:
            for name, stored in buffer.storage._asdict().items():
                with archive.open(f"buffer/{name}") as member:
                    for piece in stored[: buffer.size].split(CHUNK):
                        data = member.read(piece.nbytes)
                        piece.copy_(torch.from_numpy(np.frombuffer(data, np.float32).reshape(piece.shape).copy()))
                    member.read(1)  # nothing is left, but the checksum is compared here
        _set_random_states(saved["random"], envs, generators)
        if None in saved["envs"]:
            print("the checkpoint holds no simulators, since these cannot be saved: new episodes are started")
            return False
        envs.set_attr("snapshot", list(saved["envs"]))
        return True
    except (KeyError, ValueError, RuntimeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or does not fit: {str(error).splitlines()[0]}") from None
