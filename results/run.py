"""Make a table of runs: what is missing, nothing twice, and go on where it was stopped or killed.

    python results/run.py results/mujoco-1m.json -P 2          # 2 runs at a time on this machine
    python results/run.py results/mujoco-1m.json --ray auto    # on a Ray cluster (pip install ray)

A table is a JSON file with lists "env_ids" and "seeds" and a dict "variants" from a label to a
command, to which --env-id, --seed and the task's "flags" are added; a label may have a "last_seed".
A run works in runs/<table>/<run>, which is on a shared disk for a cluster, and ends in
results/<table>/<run>. Killed and started again, this makes the same data: qsm.py goes on bit for
bit, peers.py anew. A run has one thread, or OMP_NUM_THREADS.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
processes: set[subprocess.Popen] = set()
stopping: list[int] = []  # signals that came


class Run(NamedTuple):
    table: str
    label: str
    env_id: str
    seed: int
    command: str

    @property
    def name(self) -> str:
        return f"{re.sub('[/:]', '-', self.env_id)}__{self.label}__seed{self.seed}"

    @property
    def work(self) -> Path:
        return HERE.parent / "runs" / self.table / self.name

    @property
    def data(self) -> Path:
        return HERE / self.table / self.name

    @property
    def done(self) -> bool:
        return (self.data / "args.csv").exists()  # written last

    @property
    def folder(self) -> Path | None:
        """The folder that qsm.py made, if there is one already."""
        return next(iter(sorted(self.work.glob("*__qsm__*"))), None)

    @property
    def total_steps(self) -> int:
        found = re.search(r"--total-timesteps[ =]([\d_]+)", self.command)
        return int((found or sys.exit(f"--total-timesteps is missing: {self.command}"))[1])


def read_table(path: Path) -> list[Run]:
    table = json.loads(path.read_text())
    return [
        Run(path.stem, label, env_id, seed, f"{command} {table.get('flags', {}).get(env_id, '')}")
        for seed in table["seeds"]
        for env_id in table["env_ids"]
        for label, command in table["variants"].items()
        if seed <= table.get("last_seed", {}).get(label, seed)
    ]


def make(run: Run) -> str:
    """Start or continue a run, wait for it, and collect its data; returns "done" or why not."""
    run.work.mkdir(parents=True, exist_ok=True)
    with (run.work / "lock").open("w") as lock:
        held = False  # it may be held by a run that outlived a killed run.py
        while not (held or stopping):
            with contextlib.suppress(BlockingIOError):
                held = fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
            time.sleep(0.1)
        if run.done or stopping:
            return "done" if run.done else "stopped"
        folder = run.folder
        script, *flags = shlex.split(run.command)
        command = [sys.executable, str(HERE.parent / script), *flags]
        command += ["--env-id", run.env_id, "--seed", str(run.seed)]
        command += ["--run-dir" if script == "qsm.py" else "--out", str(run.work)]
        if folder and (folder / "checkpoint.npz").exists():
            command = [*command[:2], "--resume", str(folder)]
        elif folder:
            shutil.rmtree(folder)  # killed before its first checkpoint
        options = {"cwd": HERE.parent, "env": {"OMP_NUM_THREADS": "1", **os.environ}}
        options |= {"start_new_session": True, "pass_fds": [lock.fileno()]}  # held by the child
        with (run.work / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, **options)
            processes.add(process)
            if stopping:  # while it was started
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            processes.discard(process)
        if code != 0:
            return "stopped" if stopping else f"failed, see {run.work / 'log.txt'}"
        collect(run)
        return "done"


def collect(run: Run) -> None:
    """Copy CSVs to results/<table>, args.csv last."""
    if run.folder:
        arguments = [sys.executable, HERE / "collect.py", HERE / run.table, run.folder]
        subprocess.run([*arguments, "--label", run.label], check=True, stdout=subprocess.DEVNULL)
    else:
        source = next(path.parent for path in run.work.glob("*/args.csv"))
        run.data.mkdir(parents=True, exist_ok=True)
        for name in ("episodes.csv", "evaluations.csv", "args.csv"):
            shutil.copy(source / name, run.data / "copy.tmp")
            (run.data / "copy.tmp").replace(run.data / name)


def progress(run: Run) -> tuple[int, str]:
    """Steps so far, and the mean return of the last 10 training episodes."""
    paths = [run.data / "episodes.csv", *run.work.glob("*/episodes.csv")]
    rows = next((path.read_text().splitlines()[1:] for path in paths if path.exists()), [])
    rows = [row.split(",") for row in rows if row.count(",") == 3]
    returns = [float(row[2]) for row in rows[-10:] if row[2]]
    mean = f"{sum(returns) / len(returns):.0f}" if returns else "-"
    return (run.total_steps if run.done else int(rows[-1][0]) if rows else 0), mean


def show(runs: list[Run], states: dict, first_steps: dict, start: float) -> None:
    """One line per run: steps, return, time left at the speed since `start`, state."""
    print(time.strftime("\n%H:%M:%S"), f"{sum(run.done for run in runs)} of {len(runs)} done")
    for run in runs:
        steps, mean = progress(run)
        made = steps - first_steps.setdefault(run.name, steps)
        left = (run.total_steps - steps) * (time.monotonic() - start) / 60 / made if made else 0
        left = f"{left:.0f} min left" if left and not run.done else ""
        line = f"{run.name:50} {steps:>10,} of {run.total_steps:,}  return {mean:>7}"
        print(line, f"{left:>14}", "done" if run.done else states.get(run.name, ""), flush=True)


def on_ray(runs: list[Run], args: Namespace) -> list:
    """One Ray task per run: another node takes it over when its own dies."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray needs: pip install ray") from None
    local = {"num_cpus": args.P or None}  # a cluster has its own number
    ray.init(**local if args.ray == "local" else {"address": args.ray})
    task = ray.remote(num_cpus=1, num_gpus=args.gpu, max_retries=-1)(make)
    return [task.remote(run) for run in runs]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-P", type=int, default=0, help="runs at a time; default: one per core")
    parser.add_argument("--ray", help="auto, the address of a cluster, or local")
    parser.add_argument("--gpu", type=float, default=0, help="with --ray: of a GPU for each run")
    parser.add_argument("--every", type=float, default=60, help="seconds between tables")
    args = parser.parse_args()
    runs = read_table(args.table)
    todo, states, first_steps = [run for run in runs if not run.done], {}, {}
    start = shown = time.monotonic()
    show(runs, states, first_steps, start)

    def stop(signum, frame) -> None:  # runs of this machine end their step and write a checkpoint
        stopping.append(signum)
        for process in list(processes):
            process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if args.ray:
        futures = [reference.future() for reference in on_ray(todo, args)]
    else:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        pool = ThreadPoolExecutor(args.P or cores)
        futures = [pool.submit(make, run) for run in todo]
    while not all(future.done() for future in futures) and not (args.ray and stopping):
        if time.monotonic() - shown > args.every:
            show(runs, states, first_steps, start)
            shown = time.monotonic()
        time.sleep(0.2)
        ended = ((run, future) for run, future in zip(todo, futures) if future.done())
        states |= {run.name: future.exception() or future.result() for run, future in ended}
    show(runs, states, first_steps, start)
    if not all(run.done for run in runs):
        raise SystemExit("not all runs are done; the same command goes on")


if __name__ == "__main__":
    main()
