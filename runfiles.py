"""What surrounds a run: checks, logs, exact resume. Kept out of qsm.py: it is not the algorithm."""

import contextlib
import errno
import fcntl
import importlib
import io
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import UserError, one_line, user_errors
from fast import tensors_in, tune

DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR
COUNTS = "total_timesteps num_envs eval_episodes log_every buffer_size batch_size diffusion_steps"
RANGES = {
    f"{COUNTS} candidates hidden_dims": (1, 10**12),
    "learning_starts eval_every checkpoint_every actor_lr_decay action_noise alpha": (0, 10**12),
    "utd actor_lr critic_lr": (1e-9, 10**6),
    "gamma tau policy_tau": (0, 1),
    "seed": (0, 2**31),
}


@contextlib.contextmanager
def errors_in_one_line():
    """Errors that a user can fix end the program with one line; others keep their traceback."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)) or getattr(error, "errno", 0) in DISK:
            raise SystemExit(f"error: {error}") from None
        if not re.search("(out of|allocate) memory", str(error)):
            raise
        hint = "lower --buffer-size, --batch-size, --hidden-dims or --candidates"
        raise SystemExit(f"error: {hint}: {one_line(error)}") from None


def prepare(args) -> torch.device:
    """Refuse impossible values, seed, and return the device."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            values = np.atleast_1d(getattr(args, name))  # of --hidden-dims several, or none
            if not (values.size and low <= values.min() and values.max() <= high):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} must be in [{low}, {high}], got {getattr(args, name)}")
    if args.buffer_size < args.num_envs:
        raise UserError(f"--buffer-size must be at least --num-envs, got {args.buffer_size}")
    name = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    with user_errors(f"--device must be auto, cpu, cuda or cuda:N of this machine, got {name}"):
        device = torch.zeros(1, device=name).device  # cuda as cuda:0
        if device.type not in ("cpu", "cuda"):
            raise ValueError("not tested")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    tune(device, args.tf32)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # an environment may use any
        seed(args.seed)
    return device


class StopRequest:
    """Calling it gives the number of the SIGTERM or Ctrl-C that came, or 0. A second one kills."""

    def __init__(self):
        self.signum, both = 0, (signal.SIGTERM, signal.SIGINT)
        self.usual = {signum: signal.signal(signum, self.close) for signum in both}

    def __call__(self) -> int:
        return self.signum

    def close(self, signum: int = 0, frame=None) -> None:  # also the handler of both
        self.signum = signum or self.signum
        for number, handler in self.usual.items():
            signal.signal(number, handler)


class RunFiles:
    """The folder of a run: event file, episodes.csv, evaluations.csv, checkpoint.npz, model.pt.

    A new folder is made in args.run_dir, or args.resume is continued from the checkpoint `saved`:
    what was written after it is dropped, since a resumed run writes it again.
    """

    def __init__(self, args, saved: dict | None = None):
        name = re.sub("[/:]", "-", f"{args.env_id}__qsm__{args.seed}__{time.time_ns()}")
        self.path = args.resume or args.run_dir / name
        self.args = vars(args) | {"run_dir": str(args.run_dir), "resume": None}
        if args.track:
            with user_errors("--track needs wandb (pip install wandb; wandb login)"):
                wandb = importlib.import_module("wandb")
                run_id = self.path.resolve().name  # a resumed run goes on under its id
                wandb.init(id=run_id, config=self.args, resume="allow", sync_tensorboard=True)
        self.path.mkdir(parents=True, exist_ok=bool(args.resume))
        self.time, self.step = time.perf_counter(), saved["loop"][0] if saved else 0
        self.events = SummaryWriter(self.path, purge_step=self.step + 1 if saved else None)
        sizes, self.last_evaluation = saved["files"] if saved else ((0, 0), -1)
        self.files = [saved["lock"] if saved else locked(self.path)]
        for name, size in zip(("episodes.csv", "evaluations.csv"), sizes):
            self.files.append((self.path / name).open("a", buffering=1))  # line by line
            self.files[-1].truncate(min(size, self.files[-1].tell()))
        if not saved:
            self.files[1].write("global_step,env,return,length\n")
            table = "\n".join(f"|{name}|{value}|" for name, value in self.args.items())
            self.events.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def log_scalars(self, global_step: int, values: dict) -> None:
        speed = (global_step - self.step) / (time.perf_counter() - self.time)
        self.time, self.step = time.perf_counter(), global_step
        numbers = torch.stack(list(values.values())).tolist()  # one transfer for all of them
        for name, value in [*zip(values, numbers, strict=True), ("charts/SPS", speed)]:
            self.events.add_scalar(name, value, global_step)

    def log_episode(self, global_step: int, env: int, episode_return: float, length: int) -> None:
        self.files[1].write(f"{global_step},{env},{episode_return},{length}\n")
        self.events.add_scalar("charts/episodic_return", episode_return, global_step)
        self.events.add_scalar("charts/episodic_length", length, global_step)

    def log_evaluation(self, global_step: int, args, episodes: list) -> None:
        mean = write_evaluation(self.files[2], global_step, args, episodes)
        self.events.add_scalar("eval/return_mean", mean, global_step)
        self.last_evaluation = global_step

    def save(self, loop: tuple, learner, buffer, envs, rng: torch.Generator) -> bool:
        """Write checkpoint.npz and model.pt. Where one fails, say so; its older one stays.

        Without `envs` a resumed run starts with new episodes.
        """
        saved = dict(args=self.args, loop=loop, device=rng.device.type, rng=rng.get_state())
        saved |= dict(learner=[x.detach().cpu() for x in tensors_in(learner)])
        sizes = [os.fstat(file.fileno()).st_size for file in self.files[1:]]
        saved |= dict(files=(sizes, self.last_evaluation), size=buffer.size)
        saved |= dict(envs=envs.get_attr("snapshot") if envs else (None,), position=buffer.position)
        model = dict(args=self.args, global_step=loop[0], q_scale=learner.q_scale)
        model |= dict(score_net=learner.policy.state_dict(), critic=learner.critic.state_dict())
        model = tree_map_only(torch.Tensor, torch.Tensor.cpu, model)
        rows = {k: x[: buffer.size].cpu().numpy() for k, x in buffer.storage._asdict().items()}
        try:
            self.events.flush()  # else a killed run lacks events from before its checkpoint
            if not all(p.isfinite().all() for net in learner[:4] for p in net.parameters()):
                raise UserError("the networks have non-finite weights")
            torch.save(saved, pickled := io.BytesIO())
            torch.save(model, policy := io.BytesIO())  # torch.save to a full disk raises no OSError
            with whole_file(self.path / "checkpoint.npz") as file:
                np.savez(file, saved=np.frombuffer(pickled.getvalue(), np.uint8), **rows)
            with whole_file(self.path / "model.pt") as file:
                file.write(policy.getvalue())
            return True
        except (OSError, UserError) as error:
            tqdm.write(f"step {loop[0]} is not saved whole: {error}")
            return False

    def close(self) -> None:
        for file in (self.events, *self.files):
            file.close()


def write_evaluation(file, global_step: int, args, episodes: list[tuple]) -> float:
    """Append (return, length) of episodes to a CSV; print and return the mean return."""
    if os.fstat(file.fileno()).st_size == 0:  # tell() is wrong after truncate()
        file.write("global_step,seed,candidates,episode,return,length\n")
    for i, (episode_return, length) in enumerate(episodes):
        file.write(f"{global_step},{args.seed},{args.candidates},{i},{episode_return},{length}\n")
    mean, std = np.mean(episodes, 0)[0], np.std(episodes, 0)[0]
    how = f"{len(episodes)} episodes, seed {args.seed}, best of {args.candidates}, no action noise"
    tqdm.write(f"step {global_step}: mean return {mean:.2f}, standard deviation {std:.2f} ({how})")
    return mean


@contextlib.contextmanager
def whole_file(path: Path):
    """A binary file that appears at `path` whole, synced and renamed, or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def locked(folder: Path):
    """A file that locks this folder until it is closed or the process ends."""
    file = (folder / "lock").open("w")
    with user_errors(f"{folder} is in use by another process"):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def load_checkpoint(args) -> tuple:
    """Lock the run args.resume; return its arguments and what `restore` takes, on the CPU."""
    path = args.resume / "checkpoint.npz"
    if not path.exists():
        raise UserError(f"{args.resume} has no checkpoint.npz")
    lock = locked(args.resume)
    with user_errors(f"{path} is damaged, or of another version of qsm.py"):
        archive = np.load(path)  # arrays are read when asked for
        pickled = io.BytesIO(archive["saved"])  # it can run code: resume only runs of your own
        saved = torch.load(pickled, map_location="cpu", weights_only=False)
        saved |= {"buffer": archive, "lock": lock}
        moved = {} if args.device == "auto" else {"device": args.device}
        return type(args)(**saved["args"] | moved | {"resume": args.resume}), saved


def restore(saved: dict, learner, buffer, envs, rng: torch.Generator) -> bool:
    """Put back what `RunFiles.save` wrote; False if the simulators could not be saved."""
    print(f"resuming at step {saved['loop'][0]} with the run's flags, but for --device")
    with user_errors("checkpoint.npz is damaged, or of another version of qsm.py"):
        for tensor, stored in zip(tensors_in(learner), saved["learner"], strict=True):
            tensor.detach().copy_(stored)
        buffer.size, buffer.position = saved["size"], saved["position"]
        for name, stored in buffer.storage._asdict().items():
            stored[: buffer.size] = torch.from_numpy(saved["buffer"][name])
        saved["buffer"].close()  # else a replaced checkpoint keeps its place on the disk
        if saved["device"] == rng.device.type:
            rng.set_state(saved["rng"])
        else:
            print(f"not bit for bit: saved on {saved['device']}")
        if None in saved["envs"]:
            print("the checkpoint holds no simulators: new episodes start")
            return False
        envs.set_attr("snapshot", list(saved["envs"]))
        return True
