"""How fast is it? Every comparison takes turns in one run (A B A B ...) and prints medians and ratios.

    python benchmarks/speed.py                                  # all parts below, on CUDA when there is one
    python benchmarks/speed.py update --released /tmp/released   # beside the authors' JAX learner, jitted, float32
    python benchmarks/speed.py update scaling profile loop envs startup

update:  one gradient update (critics and actor) at four sizes; eager, compiled and, on CUDA, as a CUDA graph
scaling: time per update against batch size, width of the networks and denoising steps
profile: where the time of an update goes: matrix products on a CPU; kernels, their sum and the gaps on CUDA
loop:    wall time of training on Humanoid-v4 at one update per step, against updates alone and stepping alone
envs:    environment steps per second against the number of environments, in one process and with workers
startup: seconds from imports to environments, networks and buffer; memory of the buffer against its arithmetic size

For --released: git clone https://github.com/Alescontrela/score_matching_rl /tmp/released (2e77893), and
pip install jax==0.10.2 flax optax (on a GPU jax[cuda12]). On a CPU let nothing else run: the machine is the measure.
With --csv FILE the numbers are also written there; with matplotlib installed, scaling and envs draw FILE.png.
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
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fast
import qsm
from buffer import ReplayBuffer
from envs import make_envs

SIZES = ((376, 17, 256), (376, 17, 512), (17, 6, 256), (17, 6, 512))  # O, A, width
rows: list[dict] = []
torch.compiler.config.force_disable_caches = True  # compiling is timed too


def record(part: str, setting: str, variant: str, value: float, unit: str = "ms") -> float:
    rows.append({"part": part, "setting": setting, "variant": variant, "value": f"{value:.4g}", "unit": unit})
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
    """Median milliseconds and seconds of the first call of each side, whose functions are made by build(*arguments).

    Every side has a process of its own, which waits while the others have their turn of 25 calls, of which the first
    5 are not counted: threads of one library that spin for work would take the cores from another in one process.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes, times = {}, [], {name: [] for name in sides}
    for name, (build, *arguments) in sides.items():
        connections[name], other = context.Pipe()
        processes.append(context.Process(target=one_side, args=(other, build, *arguments), daemon=True))
        processes[-1].start()
    first, end = {}, None
    while end is None or time.perf_counter() < end:
        for name, connection in connections.items():
            connection.send(True)
            turn = connection.recv()
            if end:
                times[name] += turn[5:]
            else:
                first[name] = turn[0] / 1e3
        end = end or time.perf_counter() + seconds * len(sides)
    for process in processes:
        process.kill()
    return {name: (statistics.median(times[name]), first[name]) for name in sides}


def our_update(
    mode: str,
    obs_dim: int,
    act_dim: int,
    width: int,
    device: torch.device,
    batch_size: int = 256,
    score_target: str = "posterior",
    diffusion_steps: int | None = None,
):
    """A function that draws a batch and updates once; `mode` is eager, compiled, graph or compiled graph."""
    args = qsm.Args(
        hidden_dims=(width, width),
        batch_size=batch_size,
        score_target=score_target,
        diffusion_steps=diffusion_steps,
        compile="compiled" in mode,
        cuda_graph="graph" in mode,
    )
    learner = qsm.make_learner(args, obs_dim, act_dim, device)
    schedule = qsm.make_schedule(args.beta_schedule, args.diffusion_steps, device)
    rng, buffer = torch.Generator(device), ReplayBuffer(100_000, obs_dim, act_dim, device)
    for stored in buffer.storage:
        stored.normal_()
    buffer.size = buffer.capacity
    _, update = fast.accelerate(qsm.best_of, qsm.update, args, device)

    def function() -> None:
        batch = buffer.gather(buffer.sample_indices(batch_size, rng))
        update(learner, batch, qsm.draw_noise(args.diffusion_steps, batch_size, act_dim, rng), schedule, args)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return function


def released_update(clone: Path, obs_dim: int, act_dim: int, width: int):
    """The released learner's own jitted update on a batch that is on its device already."""
    import jax
    from released_agreement import load_released

    spaces = [SimpleNamespace(shape=(n,), sample=lambda n=n: np.zeros(n, np.float32)) for n in (obs_dim, act_dim)]
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
    print("\n| O, A, width | " + ("released, ms | ours, ms (of released) |" if clone else "ours, ms (of eager) |"))
    print("|---|---|---|" if clone else "|---|---|")
    modes = ("eager", "compiled") + (("graph", "compiled graph") if device.type == "cuda" else ())
    for size in SIZES:
        sides = {"released": (released_update, clone, *size)} if clone else {}
        sides |= {mode: (our_update, mode, *size, device, 256, "released") for mode in modes}
        results = in_turns(sides)
        for name, (ms, first) in results.items():
            record("update", "{} {} {}".format(*size), name, ms)
            if name == "compiled":
                record("update", "{} {} {}".format(*size), "compiling", first, "s")
        base = results["released" if clone else "eager"][0]
        cells = [f"{name} {ms:.2f} ({ms / base:.2f})" for name, (ms, _) in results.items() if name != "released"]
        cells[-1] += f"; compiling took {results['compiled'][1]:.0f} s"
        print(f"| {size} | " + (f"{base:.2f} | " if clone else "") + ", ".join(cells) + " |", flush=True)


def part_scaling(device: torch.device, clone: Path | None) -> None:
    default = {"batch_size": 256, "width": 256, "diffusion_steps": 10}
    sweeps = {
        "batch_size": (256, 512, 1024, 2048, 4096, 8192),
        "width": (256, 512, 1024),
        "diffusion_steps": (5, 10, 20, 50),
    }
    mode = "compiled graph" if device.type == "cuda" else "compiled"
    print(f"\nO = 17, A = 6, {mode}, otherwise {default}: ms per update (relative to the first)")
    for name, values in sweeps.items():
        sides = {}
        for value in values:
            flags = default | {name: value}
            size = 17, 6, flags["width"], device, flags["batch_size"], "posterior", flags["diffusion_steps"]
            sides[value] = our_update, mode, *size
        times = {value: ms for value, (ms, _) in in_turns(sides, seconds=6.0).items()}
        cells = []
        for value, ms in times.items():
            record("scaling", f"{name} {value}", mode, ms)
            cells.append(f"{value}: {ms:.2f} ({ms / times[values[0]]:.1f})")
        print(f"{name}: " + ", ".join(cells), flush=True)


def part_profile(device: torch.device, clone: Path | None) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda, updates = device.type == "cuda", 50
    mode = "compiled graph" if cuda else "compiled"
    torch._inductor.config.cpp.enable_kernel_profile = True  # or matrix products in the C++ wrapper have no name
    print(f"\nO = 17, A = 6, batch 256, {mode}: where the time of an update goes")
    for width in (256, 512):
        for diffusion_steps in (5, 10, 20):
            setting = f"width {width} T {diffusion_steps}"
            function = our_update(mode, 17, 6, width, device, diffusion_steps=diffusion_steps)
            ms = record("profile", setting, mode, median_ms(function))
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
                for _ in range(updates):
                    function()
            line = f"{setting}: {ms:.2f} ms, {1e3 / ms:.0f} updates a second; "
            if cuda:
                kernels = [e.time_range.elapsed_us() for e in trace.events() if e.device_type == DeviceType.CUDA]
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
    """Milliseconds per step of a training run, from its own log: the median of the intervals after compiling."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, learning_starts = (1250, 500) if device.type == "cpu" else (6000, 1000)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"total_timesteps": steps, "learning_starts": learning_starts, "eval_every": 0, "log_every": 125}
        flags |= {"compile": True, "checkpoint_every": 0, "run_dir": Path(folder), "device": str(device)}
        run = qsm.main(qsm.Args(**flags))
        events = EventAccumulator(str(run))
        events.Reload()
        speeds = [e.value for e in events.Scalars("charts/SPS") if e.step > learning_starts + 125]
    return 1e3 / statistics.median(speeds)


def part_loop(device: torch.device, clone: Path | None) -> None:
    update_alone = our_update("compiled graph" if device.type == "cuda" else "compiled", 376, 17, 512, device)
    envs = make_envs("Humanoid-v4", 1)
    envs.reset(seed=0)
    step = record("loop", "Humanoid-v4", "step alone", median_ms(lambda: envs.step(envs.action_space.sample())))
    envs.close()
    ratios, before = [], median_ms(update_alone)
    for i in range(3):
        loop = record("loop", f"Humanoid-v4 {i}", "loop", loop_ms(device))
        after = median_ms(update_alone)
        update = record("loop", f"Humanoid-v4 {i}", "update alone", (before + after) / 2)
        ratios.append(loop / max(update, step))
        before = after
        print(f"\nHumanoid-v4: {loop:.2f} ms a step; update alone {update:.2f} ms, environment step {step:.2f} ms")
    print(f"loop / larger of the two: {statistics.median(ratios):.2f} (of {', '.join(f'{x:.2f}' for x in ratios)})")


def part_envs(device: torch.device, clone: Path | None) -> None:
    print(f"\nEnvironment steps per second, random actions, {os.cpu_count()} cores: one process / workers")
    for env_id in ("HalfCheetah-v4", "Humanoid-v4"):
        cells = []
        for num_envs in (1, 2, 4, 8, 16, 32, 64):
            both = {}
            for name, asynchronous in (("sync", False), ("async", True)):
                envs = make_envs(env_id, num_envs, asynchronous)
                envs.reset(seed=0)
                actions = envs.action_space.sample()
                ms = median_ms(lambda envs=envs, actions=actions: envs.step(actions), seconds=1.5)
                both[name] = record("envs", f"{env_id} {num_envs}", name, 1e3 * num_envs / ms, "steps/s")
                envs.close()
            cells.append(f"{num_envs}: {both['sync']:.0f} / {both['async']:.0f}")
        print(f"{env_id}: " + ", ".join(cells), flush=True)


def part_startup(device: torch.device, clone: Path | None) -> None:
    capacity, process = 1_000_000, psutil.Process()
    start = time.perf_counter()
    envs = make_envs("Humanoid-v4", 1)
    envs.reset(seed=0)
    qsm.make_learner(qsm.Args(), 376, 17, device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else process.memory_info().rss
    buffer = ReplayBuffer(capacity, 376, 17, device)
    seconds = record("startup", "Humanoid-v4", "start", time.perf_counter() - start, "s")
    for stored in buffer.storage:
        stored.zero_()
    after = torch.cuda.memory_allocated() if device.type == "cuda" else process.memory_info().rss
    ratio = record("startup", "buffer", "memory", (after - before) / buffer.num_bytes(capacity, 376, 17), "ratio")
    print(f"\nStart-up after imports: {seconds:.1f} s; a full replay buffer takes {ratio:.3f} of its arithmetic size")
    envs.close()


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    lines = {}  # (axis, label): points
    for row in (row for row in rows if row["part"] in ("scaling", "envs")):
        name, value = row["setting"].split()
        if row["part"] == "scaling":
            axis, label = axes[("batch_size", "width", "diffusion_steps").index(name)], None
            axis.set(xlabel=name.replace("_", " "), ylabel="ms per update")
        else:
            axis, label = axes[3], f"{name}, {'workers' if row['variant'] == 'async' else 'one process'}"
            axis.set(xlabel="environments", ylabel="environment steps per second")
        lines.setdefault((axis, label), []).append((int(value), float(row["value"])))
    for (axis, label), points in lines.items():
        axis.loglog(*zip(*points, strict=True), "o-", label=label, ms=4)
        axis.set_xticks([x for x, _ in points], [x for x, _ in points])
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
    times = [y for (axis, _), points in lines.items() for _, y in points if axis is not axes[3]]
    for axis in axes[:3] if times else ():
        axis.set_ylim(min(times) / 1.5, max(times) * 1.5)
    if len(lines) > 3:
        axes[3].legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parts = {name[5:]: function for name, function in globals().items() if name.startswith("part_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--released", type=Path, help="folder of a clone of the authors' repository")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not set(args.parts) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}")
    device = qsm.runs.get_device(args.device)
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} cores, {platform.machine()}"
    precision = torch.get_float32_matmul_precision()
    print(f"{machine}; torch {torch.__version__}, {torch.get_num_threads()} threads, {precision} precision")
    for part in args.parts or parts:
        parts[part](device, args.released)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if any(row["part"] == "scaling" for row in rows):
            plot(args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
