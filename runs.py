"""What surrounds a run: logs, exact resume, saved policies. Apart from qsm.py because none of it is the algorithm.

A checkpoint is one zip archive, uncompressed, with a checksum per member: `run.pkl` (arguments, counters, random
states, simulators), `tensors.pt` (networks, optimizers) and `buffer/<field>` (the filled rows). `run.pkl` is a Python
pickle, which can run code when it is read: resume only runs that you made yourself. To pass a policy on to others use
model.pt.
"""

import contextlib
import csv
import errno
import fcntl
import io
import os
import pickle
import platform
import random
import signal
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from buffer import ReplayBuffer

OF_THE_DISK = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM]
OF_THE_DISK += [errno.EEXIST, errno.ENOENT, errno.ENOTDIR]
CHUNK = 1 << 16  # rows of the buffer that are copied at a time: a checkpoint needs no second copy of it in memory


class CheckpointError(Exception):
    """A checkpoint or model that cannot be used; the text is one line to show to a user."""


def one_line(error: Exception, length: int = 200) -> str:
    """The start of what an exception says."""
    return " ".join(str(error).split())[:length]


def stop(message: object, code: int = 1) -> NoReturn:
    """End the program with one line on stderr."""
    tqdm.write(f"qsm.py: {message}", file=sys.stderr)  # not into a progress bar
    raise SystemExit(code)


def get_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (index or "0").isdecimal()):
        stop(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        stop(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices on this machine")
    return torch.device(name)


def check_args(args) -> None:
    """Refuse impossible values before anything is built."""
    ranges = {
        (1, 10**12): "total_timesteps num_envs eval_episodes log_every buffer_size batch_size diffusion_steps "
        "candidates",
        (0, 10**12): "learning_starts eval_every checkpoint_every actor_lr_decay action_noise alpha",
        (1e-9, 10**6): "utd actor_lr critic_lr",
        (0, 1): "gamma tau",
        (0, 2**32 - 1): "seed",
    }
    for (low, high), names in ranges.items():
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                stop(f"--{name.replace('_', '-')} must be in [{low}, {high}], got {getattr(args, name)}")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        stop(f"--hidden-dims must be one or more positive widths, got {args.hidden_dims}")
    if args.buffer_size < args.num_envs:
        stop(f"--buffer-size {args.buffer_size} cannot hold one step of --num-envs {args.num_envs}")
    if args.capture_video and not args.evaluate:
        stop("--capture-video goes with --evaluate")
    if args.evaluate and args.resume:
        stop("--evaluate and --resume exclude each other")
    if args.learning_starts >= args.total_timesteps and not (args.evaluate or args.resume):
        print(f"nothing will be learned: --learning-starts {args.learning_starts} random steps are all there are")


def name_ignored(args, read: set[str]) -> None:
    """Print which arguments were given on the command line and are not among those that are read."""
    defaults = vars(type(args)())
    ignored = [name for name, value in vars(args).items() if value != defaults[name] and name not in read]
    if ignored:
        print(f"ignoring {', '.join(ignored)}: a saved run keeps its arguments")


@contextlib.contextmanager
def errors_in_one_line():
    """Errors that a user can fix end the program with one line."""
    try:
        yield
    except Exception as error:
        if StopRequest.signum:  # Ctrl-C ends the compiler's processes too
            where = f"stopped in the middle of a step, as when it compiles ({one_line(error, 80)})"
            stop(f"{where}; older checkpoints are as they were", code=128 + StopRequest.signum)
        if isinstance(error, CheckpointError):
            stop(error, code=2)
        if isinstance(error, torch.OutOfMemoryError):
            advice = "try a lower --batch-size, --hidden-dims or --buffer-size, or --device cpu"
            stop(f"out of GPU memory, {advice}: {one_line(error)}")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's is a RuntimeError
            stop("out of memory, try a lower --batch-size, --hidden-dims, --diffusion-steps or --candidates")
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            stop(f"{error.filename or 'the folder of the run'}: {error.strerror or error}")
        raise
    except KeyboardInterrupt:  # outside the loop of a training run, which ends its step first
        stop("stopped", code=130)
    finally:
        StopRequest.restore()
        StopRequest.signum = 0


def start_tracking(path: Path, args: dict) -> None:
    """Mirror the event file, which must not be open yet, to Weights & Biases."""
    import wandb

    try:  # a resumed run goes on under its id
        wandb.init(id=path.name, config=args, resume="allow", sync_tensorboard=True)
    except wandb.Error as error:
        stop(f"--track: {one_line(error)}")


class RunFolder:
    """Event file and CSVs of a run, new or continued after `resumed_at` environment steps.

    Args:
        path: the folder; made when the run is new.
        args: of the run, shown in TensorBoard and kept in model.pt.
        resumed_at: drop what was written after this step, since a resumed run writes it again; None: a new run.

    Raises:
        OSError: the folder exists already, cannot be made or cannot be written to.
    """

    def __init__(self, path: Path, args: dict, resumed_at: int | None = None):
        self.path, self.args = path, {k: str(v) if isinstance(v, Path) else v for k, v in args.items()}
        if args["track"]:  # before the folder is made
            try:
                import wandb  # noqa: F401
            except ImportError:
                stop("--track needs: pip install wandb")
        if resumed_at is None:
            path.mkdir(parents=True)
        self.files = [(path / "lock").open("w")]
        try:
            fcntl.flock(self.files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
        except BlockingIOError:
            stop(f"{path} is in use by another process")
        if args["track"]:
            start_tracking(path, self.args)
        self.events = SummaryWriter(path, purge_step=None if resumed_at is None else resumed_at + 1)
        if resumed_at is None:
            rows = "\n".join(f"|{name}|{value}|" for name, value in self.args.items())
            self.events.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.episodes = self._csv("episodes.csv", ["global_step", "env", "return", "length"], resumed_at)
        header = ["global_step", "candidates", "episode", "return", "length"]
        self.evaluations = self._csv("evaluations.csv", header, resumed_at)

    def has_evaluation(self, global_step: int) -> bool:
        """Is one of this step in evaluations.csv?"""
        rows = (self.path / "evaluations.csv").read_text().splitlines()
        return any(row.startswith(f"{global_step},") for row in rows)

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

    def log_scalars(self, global_step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(name, value, global_step)

    def log_episode(self, global_step: int, env: int, episode_return: float, length: int) -> None:
        self.episodes.writerow((global_step, env, episode_return, length))
        self.log_scalars(global_step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})

    def log_evaluation(self, global_step: int, candidates: int, episodes: list[tuple[float, int]]) -> None:
        """Episodes as (return, length), each drawn with the best of `candidates` actions."""
        self.evaluations.writerows((global_step, candidates, i, *episode) for i, episode in enumerate(episodes))
        returns = np.array([episode_return for episode_return, _ in episodes])
        mean, std = float(returns.mean()), float(returns.std())
        self.log_scalars(global_step, {"eval/return_mean": mean, "eval/return_std": std})
        protocol = f"{len(returns)} episodes, best of {candidates}"
        tqdm.write(f"step {global_step}: evaluation return {mean:.1f} +- {std:.1f} ({protocol})")

    def save(self, global_step: int, state, learner, buffer, envs, generators, with_simulators: bool = True) -> bool:
        """checkpoint.zip (see `save_checkpoint`) and model.pt; where that fails, False, and the older ones stay."""
        loop = {"args": self.args, "state": state}
        model = {"score_net": learner.score_net.state_dict(), "critic": learner.critic.state_dict()}
        model |= {"args": self.args, "global_step": global_step}
        what = learner, buffer, envs, generators, with_simulators
        self.events.flush()  # or a killed run would lack events from before its checkpoint
        try:
            save_checkpoint(self.path / "checkpoint.zip", loop, *what)
            with whole_file(self.path / "model.pt") as file:
                torch.save(model, file)
        except (OSError, FloatingPointError) as error:
            tqdm.write(f"nothing saved at step {global_step}: {error}")
            return False
        return True

    def close(self) -> None:
        for file in (self.events, *self.files):
            file.close()


def write_evaluation(path: Path, policy: str, global_step: int, protocol: dict, episodes: list) -> None:
    """Print and append to the CSV at `path` what --evaluate found: `protocol` is in every row."""
    described = ", ".join(f"{name} {value}" for name, value in protocol.items())
    print(f"{policy} after {global_step:,} steps: {len(episodes)} episodes, {described}")
    for i, (episode_return, length) in enumerate(episodes):
        print(f"episode {i}: return {episode_return:.2f}, length {length}")
    returns = np.array([episode_return for episode_return, _ in episodes])
    print(f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f}")
    header = [] if path.exists() else [["global_step", *protocol, "episode", "return", "length"]]
    with path.open("a", newline="") as file:
        rows = [(global_step, *protocol.values(), i, *episode) for i, episode in enumerate(episodes)]
        csv.writer(file).writerows(header + rows)


class StopRequest:
    """`signum` becomes that of SIGTERM or Ctrl-C, so that a loop can end its step first; a second signal kills."""

    signum = 0  # of the class: there is one signal handler in a process

    def __init__(self):
        StopRequest.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame) -> None:
        StopRequest.signum = signum
        self.restore()

    @staticmethod
    def restore() -> None:
        """Give both signals their usual effect again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _random_states(envs, generators) -> list:
    """Every random state of this process; those of the environments are in their snapshots."""
    libraries = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # nothing draws from CUDA's own
    own = [(g.device.type, g.get_state()) for g in generators]
    return [*libraries, envs.action_space.np_random.bit_generator.state, own]


def _set_random_states(states: list, envs, generators) -> None:
    python, numpy, cpu, actions, own = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    envs.action_space.np_random.bit_generator.state = actions
    for generator, (device, state) in zip(generators, own, strict=True):
        if device == generator.device.type:
            generator.set_state(state)
        else:  # states of CPU and CUDA generators differ; the generator goes on from its seed
            print(f"not bit for bit: saved on {device}, resumed on {generator.device.type}")


@contextlib.contextmanager
def whole_file(path: Path):
    """A binary file that appears at `path` complete, on the disk and by a rename, or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    loaded = {name: sys.modules[name] for name in ("torch", "numpy", "gymnasium", "mujoco") if name in sys.modules}
    return {"python": platform.python_version()} | {name: str(x.__version__) for name, x in loaded.items()}


def save_checkpoint(
    path: Path,
    loop: dict,
    learner,
    buffer: ReplayBuffer,
    envs,
    generators,
    with_simulators: bool = True,
) -> None:
    """Write a checkpoint, whole or not at all: to a temporary file, flushed to the disk, then renamed.

    Args:
        loop: arguments, counters and whatever else the loop continues from.
        learner: NamedTuple of modules and tensors.
        generators: the random generators of the run.
        with_simulators: without their state, a resumed run starts with new episodes.

    Raises:
        OSError: no space, no permission; an older checkpoint at `path` is as it was.
        FloatingPointError: a network has weights that are not finite; likewise.
    """
    parts = learner._asdict().items()
    tensors = {name: part if isinstance(part, torch.Tensor) else part.state_dict() for name, part in parts}
    for part in learner:
        if isinstance(part, torch.nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
            raise FloatingPointError("the networks have non-finite weights")
    rows = buffer.size, buffer.position
    simulators = envs.get_attr("snapshot") if with_simulators else (None,) * envs.num_envs
    run = {"loop": loop, "rows": rows, "envs": simulators, "random": _random_states(envs, generators)}
    run["versions"] = versions()
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("run.pkl", pickle.dumps(run))
        memory = io.BytesIO()
        torch.save(tensors, memory)
        archive.writestr("tensors.pt", memory.getvalue())
        for name, stored in buffer.storage._asdict().items():
            with archive.open(f"buffer/{name}", "w", force_zip64=True) as member:
                for piece in stored[: rows[0]].split(CHUNK):
                    member.write(piece.cpu().numpy().data)


def load_model(path: Path) -> dict:
    """model.pt, on the CPU. Safe for files of others: only plain data is unpickled.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        return {name: model[name] for name in ("score_net", "critic", "args", "global_step")}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch raises many kinds
        raise CheckpointError(f"{path} is damaged, or not a model of qsm.py: {type(error).__name__}") from None


def load_checkpoint(path: Path) -> dict:
    """What `restore_checkpoint` takes; its key "loop" is the `loop` that was saved.

    Raises:
        CheckpointError: not a checkpoint, or one that was cut short or changed on the disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            run = pickle.loads(archive.read("run.pkl"))
            return {**run, "tensors": torch.load(io.BytesIO(archive.read("tensors.pt")), "cpu", weights_only=True)}
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
            lr = part.param_groups[0]["lr"] if isinstance(part, torch.optim.Optimizer) else None
            part.copy_(state) if isinstance(part, torch.Tensor) else part.load_state_dict(state)
            if lr is not None:  # keep the tensor itself: torch puts another one in its place, on the CPU
                part.param_groups[0]["lr"] = lr.copy_(part.param_groups[0]["lr"])
        buffer.size, buffer.position = saved["rows"]
        with zipfile.ZipFile(path) as archive:
            for name, stored in buffer.storage._asdict().items():
                with archive.open(f"buffer/{name}") as member:
                    for piece in stored[: buffer.size].split(CHUNK):
                        data = member.read(piece.nbytes)
                        piece.copy_(torch.from_numpy(np.frombuffer(data, np.float32).reshape(piece.shape).copy()))
                    member.read(1)  # nothing is left, but the checksum is compared here
        _set_random_states(saved["random"], envs, generators)
        if saved["versions"] != versions():
            print(f"not bit for bit: saved with {saved['versions']}, resumed with {versions()}")
        if None in saved["envs"]:
            print("the checkpoint holds no simulators: new episodes are started")
            return False
        envs.set_attr("snapshot", list(saved["envs"]))
        return True
    except (KeyError, ValueError, RuntimeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or does not fit: {one_line(error)}") from None
