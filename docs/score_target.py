"""The picture of docs/score_target.md: what the two score targets sample, and what they should.

    pip install matplotlib && python docs/score_target.py

The network is taken to be exactly at its regression target, with dQ/da in closed form: only the
target and the sampler show. 200,000 samples of each policy at alpha = 10, and the density
proportional to exp(alpha Q).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from qsm import Args
from test_qsm import Q_FUNCTIONS, oracle_samples

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharex=True, layout="constrained")
titles = {"quadratic": "Q = -(a - 0.3)²", "bimodal": "Q = -4 (a² - 0.25)²", "flat": "Q = 0"}
grid = torch.linspace(-1, 1, 1001, dtype=torch.float64)
for axis, (name, title) in zip(axes, titles.items(), strict=True):
    q, q_grad = Q_FUNCTIONS[name]
    for target, color in (("released", "tab:orange"), ("posterior", "tab:blue")):
        samples = oracle_samples(q_grad, Args(score_target=target, alpha=10.0), n=200_000)
        density, edges = torch.histogram(samples, bins=50, range=(-1.0, 1.0), density=True)
        axis.stairs(density.clamp(max=3), edges, color=color, fill=True, alpha=0.5, label=target)
        on_bound = (samples.abs() == 1).double().mean()
        print(f"{name}, {target}: {on_bound:.0%} of the samples at -1 or 1")
    exact = (10 * q(grid)).exp()
    axis.plot(grid, exact / exact.mean() / 2, "k", lw=1.5, label="exp(alpha Q), exact")
    axis.set(title=title, xlabel="action", ylim=(0, 3), yticks=[])
    axis.spines[["top", "right", "left"]].set_visible(False)
axes[0].legend(frameon=False, loc="upper left", fontsize=8)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
