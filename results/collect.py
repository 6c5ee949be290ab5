"""Copy finished runs into results/ as plain CSV: the repository alone redraws curves and tables.

    python results/collect.py results/halfcheetah runs/HalfCheetah-v4__qsm__*
    python results/collect.py results/ablation --label "no clip" runs/HalfCheetah-v4__qsm__*

Each run becomes a folder <env>__<label>__seed<N>, the label by default the score target, with
episodes.csv and evaluations.csv as written by qsm.py, scalars.csv (one row per logging step, from
the event file) and args.csv.
"""

import argparse
import csv
import re
import shutil
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def collect(run: Path, destination: Path, label: str | None = None) -> Path:
    """Copy one run below `destination`; returns the new folder."""
    args = torch.load(run / "model.pt", weights_only=True)["args"]
    label = label or args["score_target"]
    name = f"{re.sub('[/:]', '-', args['env_id'])}__{label}__seed{args['seed']}"
    folder = destination / name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("episodes.csv", "evaluations.csv"):
        shutil.copy(run / name, folder / name)
    events = EventAccumulator(str(run), {"scalars": 0})  # 0: all of them
    events.Reload()
    kept = "losses/", "diffusion/", "charts/SPS"
    names = [name for name in events.Tags()["scalars"] if name.startswith(kept)]
    columns = {name: {e.step: f"{e.value:.5g}" for e in events.Scalars(name)} for name in names}
    with (folder / "scalars.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", *columns])
        for step in columns.get("charts/SPS", ()):
            writer.writerow([step, *(column.get(step, "") for column in columns.values())])
    with (folder / "args.tmp").open("w", newline="") as file:
        rows = (item for item in args.items() if item[0] != "run_dir")
        csv.writer(file, lineterminator="\n").writerows(rows)
    (folder / "args.tmp").replace(folder / "args.csv")  # last, and at once: the run is whole
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("destination", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--label")
    args = parser.parse_args()
    for run in args.runs:
        print(collect(run, args.destination, args.label))
