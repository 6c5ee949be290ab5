"""Copy finished runs into results/ as plain CSV, so that curves and tables can be redrawn from the repository alone.

    python results/collect.py results/halfcheetah runs/HalfCheetah-v4__qsm__*
    python results/collect.py results/ablation --label "no clip" runs/HalfCheetah-v4__qsm__*

Each run becomes a folder <env>__<label>__seed<N>, the label by default the score target, with episodes.csv and
evaluations.csv as written by qsm.py, scalars.csv (one row per logging step, from the event file) and args.csv.
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
    folder = (
        destination
        / f"{re.sub('[/:]', '-', args['env_id'])}__{label or args['score_target']}__seed{args['seed']}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("episodes.csv", "evaluations.csv"):
        shutil.copy(run / name, folder / name)
    with (folder / "args.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            item for item in args.items() if item[0] != "run_dir"
        )

    events = EventAccumulator(str(run))
    events.Reload()
    names = [
        name for name in events.Tags()["scalars"] if name.split("/")[0] in ("losses", "diffusion")
    ]
    columns = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in [*names, "charts/SPS"]
    }
    with (folder / "scalars.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["global_step", *columns])
        for step in columns["charts/SPS"]:
            writer.writerow(
                [
                    step,
                    *(
                        f"{column[step]:.5g}" if step in column else ""
                        for column in columns.values()
                    ),
                ]
            )
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
