"""The paper's Figure 2: tabular QSM on a 3 x 3 grid, where it means pi(a|s) ~ exp(alpha Q(s, a)).

    pip install matplotlib && python docs/gridworld.py

The goal is the upper right corner; entering it pays 1 and ends the episode. Walking into a wall
leaves the state as it is. The paper's discount is not known to us: gamma = 0.9 here. Each iteration
evaluates the policy exactly, by solving its linear equations, then sets pi to exp(alpha Q),
normalised.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

N, GAMMA = 3, 0.9
MOVES = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # right, up, left, down
GOAL, START = (N - 1, N - 1), (0, 0)
STATES = [(x, y) for y in range(N) for x in range(N)]


def q_values(policy: np.ndarray) -> np.ndarray:
    """Q of a policy (S, 4), exactly: Q = r + gamma P V, V = sum_a pi Q; (S, 4)."""
    S = len(STATES)
    transition, reward = np.zeros((S, 4, S)), np.zeros((S, 4))
    for s, state in enumerate(STATES):
        if state == GOAL:
            continue  # the end: Q = 0
        for a, move in enumerate(MOVES):
            target = tuple(np.clip(np.array(state) + move, 0, N - 1))
            transition[s, a, STATES.index(target)] = 1
            reward[s, a] = target == GOAL
    V = np.linalg.solve(
        np.eye(S) - GAMMA * np.einsum("sa,sat->st", policy, transition), (policy * reward).sum(1)
    )
    return reward + GAMMA * transition @ V


def matched(q: np.ndarray, alpha: float) -> np.ndarray:
    """pi(a|s) ~ exp(alpha Q(s, a))."""
    weights = np.exp(alpha * (q - q.max(1, keepdims=True)))
    return weights / weights.sum(1, keepdims=True)


def iterate(alpha: float, iterations: int) -> list[np.ndarray]:
    """The uniform policy and those after each iteration."""
    policies = [np.full((len(STATES), 4), 0.25)]
    for _ in range(iterations):
        policies.append(matched(q_values(policies[-1]), alpha))
    return policies


def entropy_at_start(alpha: float) -> float:
    """Of the converged policy, in nats."""
    p = iterate(alpha, 200)[-1][STATES.index(START)]
    return float(-(p * np.log(p.clip(1e-300))).sum())


if __name__ == "__main__":
    figure, axes = plt.subplots(
        1, 5, figsize=(12, 2.6), layout="constrained", width_ratios=[1, 1, 1, 1, 1.5]
    )
    policies = iterate(20.0, 200)
    for axis, i in zip(axes, (0, 1, 2, 200), strict=False):
        for s, state in enumerate(STATES):
            for a, (dx, dy) in enumerate(MOVES):
                if state != GOAL and policies[i][s, a] > 0.02:
                    length = 0.45 * policies[i][s, a] ** 0.5
                    axis.arrow(
                        *state, length * dx, length * dy, head_width=0.09, color="tab:blue", lw=0.8
                    )
        axis.plot(*GOAL, "*", color="tab:orange", ms=14)
        axis.set(
            title=f"iteration {i}" if i < 200 else "converged", xticks=[], yticks=[], aspect="equal"
        )
        axis.set(xlim=(-0.6, N - 0.4), ylim=(-0.6, N - 0.4))
    alphas = np.logspace(-1, 3, 60)
    axes[-1].semilogx(alphas, [entropy_at_start(alpha) for alpha in alphas])
    for value, name in ((np.log(4), "ln 4"), (np.log(2), "ln 2")):
        axes[-1].axhline(value, color="gray", lw=0.8, ls="--")
        axes[-1].text(0.1, value + 0.01, name, fontsize=8)
    axes[-1].set(xlabel="alpha", title="entropy at the lower left")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
    print(
        f"entropy: alpha 0.1 {entropy_at_start(0.1):.4f}, alpha 1000 {entropy_at_start(1000):.4f}"
    )
