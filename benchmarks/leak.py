"""Does a long run keep its memory? Samples the resident memory of a training run and its worker processes.

    python benchmarks/leak.py --minutes 20 leak.csv --env-id Hopper-v4 --buffer-size 20000 --eval-every 5000 \
        --checkpoint-every 5000 --utd 0.25 --num-envs 4 --hidden-dims 64 64

Everything after the CSV's name goes to qsm.py. Choose the buffer so small that it is full within a quarter of the time:
memory must be flat from there on. Prints its range over each quarter.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def resident_mb(process: psutil.Process) -> float:
    """Resident memory of a process and its children, MB."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("csv", type=Path)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    start, samples = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "qsm.py"),
            *args.flags,
            "--run-dir",
            folder,
            "--total-timesteps",
            "10000000",
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
            while time.monotonic() - start < 60 * args.minutes and run.poll() is None:
                time.sleep(5)
                samples.append((time.monotonic() - start, resident_mb(psutil.Process(run.pid))))
            run.terminate()
        episodes = next(Path(folder).glob("*/episodes.csv")).read_text().splitlines()
    with args.csv.open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "resident_mb"), *((f"{t:.0f}", f"{mb:.1f}") for t, mb in samples)])
    print(f"{samples[-1][0] / 60:.1f} minutes, {int(episodes[-1].split(',')[0]):,} environment steps")
    for quarter in range(4):
        part = [mb for t, mb in samples if quarter <= 4 * t / samples[-1][0] <= quarter + 1]
        print(f"quarter {quarter + 1}: {min(part):.1f} to {max(part):.1f} MB")


if __name__ == "__main__":
    main()
