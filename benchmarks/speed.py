"""How fast is it? Comparisons take turns in one run (A B A B ...) and print medians and ratios.

    python benchmarks/speed.py                                  # all parts, on CUDA if there is one
    python benchmarks/speed.py update --released /tmp/released  # beside the authors' JAX learner

update:  one gradient update at four sizes; eager, compiled and, on CUDA, as a CUDA graph
profile: where its time goes: matrix products on a CPU; kernels, their sum and the gaps on CUDA
loop:    training on Humanoid-v4 at one update per step, against updates alone and stepping alone

For --released: git clone https://github.com/Alescontrela/score_matching_rl /tmp/released (2e77893),
pip install jax==0.10.2 flax optax (on a GPU jax[cuda12]). On a CPU let nothing else run. On a
GPU the JAX learner computes in full float32 too. --csv FILE writes the numbers.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fast
import qsm
import runfiles
from buffer import ReplayBuffer
from envs import make_envs

SIZES = ((376, 17, 256), (376, 17, 512), (17, 6, 256), (17, 6, 512))  # O, A, width
rows: list[dict] = []
torch.compiler.config.force_disable_caches = True  # compiling is timed too


def record(part: str, setting: str, variant: str, value: float, unit: str = "ms") -> float:
    row = {"part": part, "setting": setting, "variant": variant, "value": f"{value:.4g}"}
    rows.append(row | {"unit": unit})
    return value


def median_ms(function, seconds: float = 6.0) -> float:
    for _ in range(5):  # compiles and warms up
        function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end and len(times) < 1000:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def one_side(connection, build, *arguments) -> None:
    """A process of `in_turns`: milliseconds of 25 calls for each message."""
    function = build(*arguments)
    while connection.recv():
        times = []
        for _ in range(25):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        connection.send(times)


def in_turns(sides: dict, seconds: float = 12.0) -> dict:
    """Median milliseconds, and seconds of the slowest first call, of each side.

    build(*arguments) makes its functions. Every side has a process of its own, which waits while
    the others have their turn of 25 calls, of which the first 5 are not counted: threads of one
    library that spin for work would take the cores from another in one process.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes, times = {}, [], {name: [] for name in sides}
    for name, (build, *arguments) in sides.items():
        connections[name], other = context.Pipe()
        processes.append(
            context.Process(target=one_side, args=(other, build, *arguments), daemon=True)
        )
        processes[-1].start()
        other.close()  # so that recv() fails if the process dies
    first, end = {}, None
    while end is None or time.perf_counter() < end:
        for name, connection in connections.items():
            connection.send(True)
            turn = connection.recv()
            if end:
                times[name] += turn[5:]
            else:
                first[name] = max(turn) / 1e3
        end = end or time.perf_counter() + seconds * len(sides)
    for process in processes:
        process.kill()
    return {name: (statistics.median(times[name]), first[name]) for name in sides}


def our_update(mode: str, obs_dim: int, act_dim: int, width: int, device: torch.device, **flags):
    """A function that draws a batch and updates; `mode`: eager, compiled or (compiled) graph."""
    flags |= {"compile": "compiled" in mode, "cuda_graph": "graph" in mode}
    args = qsm.Args(hidden_dims=(width, width), **flags)
    learner = qsm.make_learner(args, obs_dim, act_dim, device)
    schedule = qsm.make_schedule(args.beta_schedule, args.diffusion_steps, device)
    rng, buffer = torch.Generator(device), ReplayBuffer(100_000, obs_dim, act_dim, device)
    for stored in buffer.storage:
        stored.normal_()
    buffer.size = buffer.capacity
    fast.tune(device)
    update = fast.accelerate(qsm.update, args, device)

    def function() -> None:
        noise = qsm.draw_noise(args, act_dim, rng)
        update(learner, buffer.sample(args.batch_size, rng), noise, schedule, args)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return function


def our_released_update(mode: str, *size_and_device):
    return our_update(mode, *size_and_device, score_target="released")


def released_update(clone: Path, obs_dim: int, act_dim: int, width: int):
    """The released learner's own jitted update on a batch that is on its device already."""
    import jax
    from released_agreement import load_released

    jax.config.update("jax_default_matmul_precision", "highest")  # torch's default on a GPU

    sizes = obs_dim, act_dim
    spaces = [SimpleNamespace(shape=(n,), sample=lambda n=n: np.zeros(n, "f")) for n in sizes]
    widths = {"critic_hidden_dims": (width, width), "actor_hidden_dims": (width, width)}
    state = [load_released(clone).create(0, *spaces, M_q=50.0, **widths)]
    rng = np.random.default_rng(0)
    shapes = {"observations": obs_dim, "next_observations": obs_dim, "actions": act_dim}
    batch = {name: rng.uniform(-1, 1, (256, n)) for name, n in shapes.items()}
    batch |= {"rewards": rng.uniform(-1, 1, 256), "masks": np.ones(256)}
    batch = {name: jax.device_put(x.astype(np.float32)) for name, x in batch.items()}

    def function() -> None:
        state[0], info = state[0].update(batch)
        jax.block_until_ready((state[0].critic_1.params, state[0].score_model.params, info))

    return function


def part_update(device: torch.device, clone: Path | None) -> None:
    """With the released target on both sides."""
    modes = ("eager", "compiled") + (("graph", "compiled graph") if device.type == "cuda" else ())
    for size in SIZES:
        sides = {"released": (released_update, clone, *size)} if clone else {}
        sides |= {mode: (our_released_update, mode, *size, device) for mode in modes}
        results = in_turns(sides)
        (base, _), *_ = results.values()
        cells = []
        for name, (ms, first) in results.items():
            record("update", "{} {} {}".format(*size), name, ms)
            cells.append(f"{name} {ms:.2f} ({ms / base:.2f})")
            if name == "compiled":
                record("update", "{} {} {}".format(*size), "compiling", first, "s")
        print(f"update, O, A, width {size}: " + ", ".join(cells), flush=True)


def part_profile(device: torch.device, clone: Path | None) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda, updates = device.type == "cuda", 50
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    mode = "compiled graph" if cuda else "compiled"
    torch._inductor.config.cpp.enable_kernel_profile = True  # gives matrix products a name
    print(f"\nO = 17, A = 6, batch 256, {mode}: where the time of an update goes")
    for width in (256, 512):
        for diffusion_steps in (5, 10, 20):
            setting = f"width {width} T {diffusion_steps}"
            function = our_update(mode, 17, 6, width, device, diffusion_steps=diffusion_steps)
            ms = record("profile", setting, mode, median_ms(function))
            with profile(activities=activities) as trace:
                for _ in range(updates):
                    function()
            line = f"{setting}: {ms:.2f} ms, {1e3 / ms:.0f} updates a second; "
            if cuda:
                on_gpu = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
                kernels = [e.time_range.elapsed_us() for e in on_gpu]
                number = record("profile", setting, "kernels", len(kernels) / updates, "per update")
                busy = record("profile", setting, "kernels' time", sum(kernels) / updates / 1e3)
                line += f"{number:.0f} kernels, together {busy:.2f} ms, gaps {ms - busy:.2f} ms"
            else:
                ops = trace.key_averages()
                products = sum(op.self_cpu_time_total for op in ops if "mm_out" in op.key)
                share = products / sum(op.self_cpu_time_total for op in ops)
                record("profile", setting, "matrix products", share, "share")
                line += f"matrix products {share:.2f} of it"
            print(line, flush=True)
    torch._inductor.config.cpp.enable_kernel_profile = False


def loop_ms(device: torch.device) -> float:
    """Milliseconds per step of a training run: median of its log's intervals after compiling."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, starts = (1250, 500) if device.type == "cpu" else (6000, 1000)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"total_timesteps": steps, "learning_starts": starts, "eval_every": 0}
        flags |= {"compile": True, "log_every": 125, "checkpoint_every": 0, "device": str(device)}
        events = EventAccumulator(str(qsm.main(qsm.Args(run_dir=Path(folder), **flags))))
        events.Reload()
        speeds = [e.value for e in events.Scalars("charts/SPS") if e.step > starts + 250]
    return 1e3 / statistics.median(speeds)


def part_loop(device: torch.device, clone: Path | None) -> None:
    mode = "compiled graph" if device.type == "cuda" else "compiled"
    update_alone, envs = our_update(mode, 376, 17, 512, device), make_envs("Humanoid-v4", 1)
    envs.reset(seed=0)
    step = median_ms(lambda: envs.step(envs.action_space.sample()))
    record("loop", "Humanoid-v4", "step alone", step)
    ratios, before = [], median_ms(update_alone)
    for i in range(3):
        loop = record("loop", f"Humanoid-v4 {i}", "loop", loop_ms(device))
        after = median_ms(update_alone)
        update = record("loop", f"Humanoid-v4 {i}", "update alone", (before + after) / 2)
        ratios.append(f"{loop / max(update, step):.2f}")
        before = after
        print(f"\nHumanoid-v4, ms: loop {loop:.2f}, update {update:.2f}, environment {step:.2f}")
    print(f"loop / larger of the two: {', '.join(ratios)}")


def main() -> None:
    parts = {name[5:]: function for name, function in globals().items() if name.startswith("part_")}
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--released", type=Path, help="clone of the authors' repository")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not set(args.parts) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}")
    device = runfiles.prepare(qsm.Args(device=args.device))
    name = f"{os.cpu_count()} cores, {platform.machine()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in args.parts or parts:
        parts[part](device, args.released)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
