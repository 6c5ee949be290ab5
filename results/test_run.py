"""Test of results/run.py: a table that is killed and started again is the table that was not."""

import csv
import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
COMMAND = (
    "qsm.py --learning-starts 400 --hidden-dims 8 8 --batch-size 16 "
    "--eval-every 600 --eval-episodes 2 --checkpoint-every 50 --log-every 200"
)


def copied(folder: Path) -> Path:
    """A new folder with the repository's code and a table of two runs."""
    (folder / "results").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("results/*.py")):
        shutil.copy(path, folder / path.relative_to(ROOT))
    table = {"env_ids": ["Pendulum-v1"], "seeds": [1, 2], "variants": {"quick": COMMAND}}
    table["flags"] = {"Pendulum-v1": "--total-timesteps 1200"}
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "results/run.py", "table.json", *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def data(folder: Path) -> list:
    """What is collected of the runs, but for their speed."""
    runs = sorted((folder / "results/table").iterdir())
    names = "episodes.csv", "evaluations.csv", "args.csv"
    scalars = [list(csv.DictReader((run / "scalars.csv").open())) for run in runs]
    speeds = [row.pop("charts/SPS") for rows in scalars for row in rows]
    assert len(speeds) == 2 * 4  # at steps 600 to 1200
    return [run.name for run in runs], [(r / x).read_text() for r in runs for x in names], scalars


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = copied(tmp_path_factory.mktemp("whole") / "copy")
    assert start(folder).wait(200) == 0
    return data(folder)


@pytest.mark.parametrize("flags", [("-P", "2"), ("--ray", "local", "-P", "2")])
def test_killed_table_started_again_is_the_whole_one(flags, whole, tmp_path):
    if "--ray" in flags:
        pytest.importorskip("ray", reason="a cluster needs ray, which is optional")
    folder = copied(tmp_path / "copy")
    for victim in ("qsm.py", "run.py"):
        table, checkpoints = start(folder, *flags), set(folder.glob("runs/*/*/*/checkpoint.npz"))
        before = {path: path.stat().st_mtime_ns for path in checkpoints}
        while {x: x.stat().st_mtime_ns for x in folder.glob("runs/*/*/*/checkpoint.npz")} == before:
            assert table.poll() is None
            time.sleep(0.01)
        if victim == "qsm.py":  # a run alone: the other one ends, and the table says so
            children = psutil.Process(table.pid).children(recursive=True)
            runs = [x for x in children if any("qsm.py" in word for word in x.cmdline())]
            runs[0].kill()
            printed = table.communicate(timeout=200)[0]
            assert table.returncode != 0
            assert "1 of 2 done" in printed and "failed, see" in printed
        else:  # run.py: its runs live on, and a new one waits for them
            table.kill()
            table.wait()
    assert start(folder, *flags).wait(200) == 0
    assert data(folder) == whole


def test_table_that_waits_for_runs_of_a_killed_one_can_be_stopped(tmp_path):
    folder = copied(tmp_path / "copy")
    locks = []
    for seed in (1, 2):
        work = folder / f"runs/table/Pendulum-v1__quick__seed{seed}"
        work.mkdir(parents=True)
        locks.append((work / "lock").open("w"))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    table = start(folder)
    assert "0 of 2 done" in table.stdout.readline() + table.stdout.readline()
    time.sleep(0.5)
    table.terminate()
    assert table.wait(20) != 0
    assert not list(folder.glob("runs/table/*/*/episodes.csv"))  # neither was started
