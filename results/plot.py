"""Curves and tables of results/README.md, from the CSVs in results/.

pip install matplotlib && python results/plot.py
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
COLORS = dict(released="tab:orange", sac="tab:green", td3="tab:red")
COLORS |= dict(posterior="tab:blue", average="navy")  # they train alike
OTHERS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray")


def read(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """global_step and one column of a CSV, rows without a value left out."""
    rows = [row for row in csv.DictReader(path.open()) if row.get(column)]
    steps = np.array([int(row["global_step"]) for row in rows])
    return steps, np.array([float(row[column]) for row in rows])


def by_step(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the evaluations of a run, and their mean returns."""
    steps, returns = read(path, "return")
    return np.unique(steps), np.array([returns[steps == s].mean() for s in np.unique(steps)])


def in_parts(steps: np.ndarray, returns: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle of each of 25 equal parts of a run, and the mean return of the episodes in it."""
    part = np.minimum(25 * steps // total, 24)
    with np.errstate(invalid="ignore"):  # a part without an episode is NaN, a gap in the line
        means = np.bincount(part, returns, 25) / np.bincount(part, minlength=25)
    return (np.arange(25) + 0.5) * total / 25, means


def spread(path: Path, total: int) -> str:
    """Evaluations of the second half of a run: mean, and the standard deviations between policies
    and within one, from the one-way analysis of variance (each policy has the same episodes)."""
    steps, returns = read(path, "return")
    policies = [returns[steps == s] for s in np.unique(steps) if 2 * s >= total]
    if len(policies) < 5 or min(map(len, policies)) < 2:
        return "-"
    within = np.mean([x.var(ddof=1) for x in policies])
    between = np.var([x.mean() for x in policies], ddof=1) - within / len(policies[0])
    mean = np.mean([x.mean() for x in policies])
    return f"{mean:.0f} ({max(between, 0) ** 0.5:.0f}, {within**0.5:.0f})"


def interval(values: list[float]) -> str:
    """Each value, their mean, and its 95 % interval (percentile bootstrap, 10,000 resamples)."""
    each = " ".join(f"{value:.0f}" for value in values)
    mean = f"{each}: {np.mean(values):.0f}" if len(values) > 1 else each
    if len(values) < 3:
        return mean
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{mean} [{low:.0f}, {high:.0f}]"


def plot(group: Path) -> None:
    """One panel per task: training returns against steps, thin for a seed, thick for their mean.

    With a paper.csv in the folder, evaluations and the values in it: the paper's curves are those.
    """
    tasks = defaultdict(lambda: defaultdict(list))  # task: variant: folders
    for run in sorted(path for path in group.iterdir() if path.is_dir()):
        env_id, variant, _ = run.name.split("__")
        tasks[env_id][variant].append(run)
    paper = group / "paper.csv"
    paper = list(csv.DictReader(paper.open())) if paper.exists() else []
    size = (2.2 * len(tasks) + 0.8, 2.8)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    colors, ratios, labels = dict(COLORS), defaultdict(list), {}
    print(
        f"\n{group.name}, each seed: mean [interval]\n| task | variant | last 10 training episodes "
        "| last evaluation | training episodes of the last tenth of the steps "
        "| evaluations of the second half (deviation between, within policies) |\n"
        "|---|---|---|---|---|---|"
    )
    for axis, (env_id, variants) in zip(axes[0], tasks.items()):
        means = {}
        for variant, runs in variants.items():
            color = colors.setdefault(variant, OTHERS[(len(colors) - len(COLORS)) % len(OTHERS)])
            last, evaluations, late, spreads, curves = [], [], [], [], []
            for run in runs:
                steps, returns = read(run / "episodes.csv", "return")
                last.append(returns[-10:].mean())
                total = int(dict(csv.reader((run / "args.csv").open()))["total_timesteps"])
                at, curve = (
                    by_step(run / "evaluations.csv") if paper else in_parts(steps, returns, total)
                )
                curves.append(curve)
                late.append(returns[steps > 0.9 * total].mean())
                spreads.append(spread(run / "evaluations.csv", total))
                evaluations += [*by_step(run / "evaluations.csv")[1][-1:]]
            if variant != "posterior" or "average" not in variants:  # else it would hide that
                for curve in curves:
                    axis.plot(at / 1000, curve, color=color, lw=0.8, alpha=0.5)
                mean, label = np.mean(curves, 0), "default" if variant == "average" else variant
                axis.plot(at / 1000, mean, color=color, lw=2, label=label)
            means[variant] = np.mean(last)
            cells = [*map(interval, (last, evaluations, late)), ", ".join(spreads)]
            print(f"| {env_id} | {variant} | {' | '.join(cells)} |")
        for variant, mean in means.items():
            if "sac" in means:
                ratios[variant].append(mean / means["sac"])
        for row in paper:
            if row["env_id"] == env_id:
                point = float(row["step"]) / 1000, float(row["return"])
                axis.plot(*point, "k*", ms=9, label="paper, by eye")
        axis.set(title=re.sub("^(dm_control|docs.swingup)-", "", env_id), xlabel="thousand steps")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        labels |= {
            line.get_label(): line for line in axis.get_lines() if line.get_label()[0] != "_"
        }
    for variant, values in ratios.items():
        each = ", ".join(f"{x:.2f}" for x in values)
        print(f"{variant}: over SAC's mean {each}; {np.mean(values):.2f}")
    axes[0, 0].set_ylabel("return, 10 evaluation episodes" if paper else "training return")
    columns, place = min(len(labels), 2 * len(tasks)), "outside lower center"
    figure.legend(labels.values(), labels, loc=place, ncols=columns, frameon=False)
    if max(map(len, tasks.values())) <= 8:  # else nothing can be told apart
        figure.savefig(group.with_suffix(".png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    for group in sorted(path for path in HERE.iterdir() if path.is_dir() and path.name[0] != "_"):
        plot(group)
