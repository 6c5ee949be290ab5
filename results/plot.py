"""Learning curves and the table of results/README.md, from the CSVs in results/.

pip install matplotlib && python results/plot.py
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
COLORS = {
    "posterior": "tab:blue",
    "released": "tab:orange",
    "sac": "tab:green",
    "td3": "tab:red",
    "consistent": "tab:gray",
}
OTHERS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


def read(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """global_step and one column of a CSV, rows without a value left out."""
    rows = [row for row in csv.DictReader(path.open()) if row.get(column)]
    return np.array([int(row["global_step"]) for row in rows]), np.array(
        [float(row[column]) for row in rows]
    )


def bound_share(run: Path) -> str:
    """Mean of the last 10 logged shares of action coordinates on a bound; "-" where none is logged (sac, td3)."""
    path = run / "scalars.csv"
    values = read(path, "diffusion/bound_share")[1] if path.exists() else np.array([])
    return f"{values[-10:].mean():.2f}" if len(values) else "-"


def smooth(values: np.ndarray, width: int = 10) -> np.ndarray:
    """Mean of the last `width` values at each point, fewer at the start."""
    return np.array([values[max(0, i - width + 1) : i + 1].mean() for i in range(len(values))])


def plot(group: Path) -> None:
    """One panel per environment, one line per seed: mean of the last 10 training episodes against steps.

    With a paper.csv in the folder, evaluations and the values in it: the paper's curves are evaluations too.
    """
    paper = (
        list(csv.DictReader((group / "paper.csv").open())) if (group / "paper.csv").exists() else []
    )
    runs, colors = defaultdict(list), dict(COLORS)
    for run in sorted(group.iterdir()):
        if run.is_dir():
            env_id, target, seed = run.name.split("__")
            runs[env_id].append((target, seed, run))
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.6 * len(runs) + 0.6, 3), squeeze=False, layout="constrained"
    )
    for axis, (env_id, seeds) in zip(axes[0], runs.items(), strict=True):
        for target, seed, run in seeds:
            steps, returns = read(run / "episodes.csv", "return")
            first = seed == min(s for t, s, _ in seeds if t == target)
            color = colors.setdefault(target, OTHERS[(len(colors) - len(COLORS)) % len(OTHERS)])
            evaluation_steps, evaluations = read(run / "evaluations.csv", "return")
            curve = steps, smooth(returns)
            if paper:
                at = np.unique(evaluation_steps)
                curve = at, np.array([evaluations[evaluation_steps == step].mean() for step in at])
            axis.plot(
                curve[0] / 1000, curve[1], color=color, lw=1.2, label=target if first else None
            )
            last = evaluations[evaluation_steps == evaluation_steps.max()]
            cells = (
                f"{returns[-10:].mean():.0f}",
                f"{last.mean():.0f} ± {last.std():.0f}",
                bound_share(run),
            )
            print(
                f"| {env_id} | {target} | {seed[4:]} | {evaluation_steps.max():,} | {' | '.join(cells)} |"
            )
        for row in paper:
            if row["env_id"] == env_id:
                axis.plot(
                    float(row["step"]) / 1000,
                    float(row["return"]),
                    "k*",
                    ms=9,
                    label="paper, by eye",
                )
        axis.set(title=env_id.removeprefix("dm_control-"), xlabel="environment steps, thousands")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("return, 10 evaluation episodes" if paper else "return, last 10 episodes")
    for axis in axes[0]:
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(group.with_suffix(".png"), dpi=110)


def ablations() -> None:
    """One panel per task, one column of dots per variant: last 10 training episodes of every seed."""
    groups = {"Pendulum-v1": ["pendulum-10k"], "HalfCheetah-v4": ["ablation-60k", "alpha-60k"]}
    tasks = {}  # variant: last 10 training episodes of every seed
    for env_id, names in groups.items():
        returns = defaultdict(list)
        for run in sorted(path for name in names for path in (HERE / name).glob(f"{env_id}__*")):
            returns[run.name.split("__")[1]].append(
                read(run / "episodes.csv", "return")[1][-10:].mean()
            )
        if returns:
            tasks[env_id] = returns
    if not tasks:
        return
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (env_id, returns) in zip(axes[0], tasks.items(), strict=True):
        for i, (label, values) in enumerate(returns.items()):
            axis.plot(
                [i] * len(values), values, "o", color=COLORS.get(label, "tab:purple"), alpha=0.8
            )
        for default in ("posterior", "consistent"):
            if default in returns:
                axis.axhline(np.mean(returns[default]), color=COLORS[default], lw=0.8)
                break
        axis.set_xticks(range(len(returns)), returns, rotation=40, ha="right")
        axis.set(title=env_id, ylabel="return, last 10 episodes")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "ablations.png", dpi=110)


if __name__ == "__main__":
    print(
        "| task | variant | seed | steps | last 10 training episodes | last evaluation | actions on the bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for group in sorted(
        path for path in HERE.iterdir() if path.is_dir() and not path.name.startswith("pendulum")
    ):
        plot(group)
    ablations()
