"""How an update is made fast: Adam on the device, torch.compile, CUDA graph. Apart from qsm.py: nothing here is of QSM.

Without `faster` everything is the same up to rounding, only slower.
"""

import copy
import ctypes
import os
import shutil
import sys

import torch


class Adam(torch.nn.Module):
    """Adam with betas 0.9 and 0.999 and epsilon 1e-8, as in torch.optim and in the released code's optax.

    Written out, so that the whole update is one graph: torch.optim.Adam does its bookkeeping on the host.
    """

    def __init__(self, net: torch.nn.Module, lr: float):
        super().__init__()
        self.register_buffer("lr", torch.tensor(lr))  # a tensor, to be changed in place
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))  # 1 - 0.999^t in float32: 5 digits
        self.exp_avg, self.exp_avg_sq = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
        for moment in self.parameters():
            moment.zero_()

    @torch.no_grad()
    def step(self, net: torch.nn.Module, grads: tuple[torch.Tensor, ...], loss: torch.Tensor) -> torch.Tensor:
        """A step, left out where the loss is NaN or infinite; returns 1.0 there, else 0.0.

        Decided on the device, as in torch.amp.GradScaler: the host does not wait.
        """
        finite = loss.isfinite()
        self.steps += finite
        bias1, bias2 = (1 - beta ** self.steps.clamp_min(1) for beta in (0.9, 0.999))
        lr = finite * self.lr / bias1
        moments = self.exp_avg.parameters(), self.exp_avg_sq.parameters()
        for parameter, grad, exp_avg, exp_avg_sq in zip(net.parameters(), grads, *moments, strict=True):
            grad = torch.where(finite, grad, 0)
            exp_avg.lerp_(grad, 0.1 * finite)
            exp_avg_sq.lerp_(grad.square(), 0.001 * finite)
            parameter -= lr * exp_avg / ((exp_avg_sq / bias2).sqrt() + 1e-8)
        return 1.0 - finite.float()


def decide(args, device: torch.device) -> None:
    """Set `args.compile` and `args.cuda_graph` where they are None.

    Raises:
        ValueError: with one line to show, if they are True and cannot be had.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile looks for it
    can_compile = device.type == "cuda" or bool(shutil.which(compiler))
    if args.compile is None:
        args.compile = can_compile and args.utd * (args.total_timesteps - args.learning_starts) > 20_000
    if args.cuda_graph is None:
        args.cuda_graph = device.type == "cuda"
    if args.compile and not can_compile:
        raise ValueError(f"--compile True needs a C++ compiler on a CPU: install {compiler}")
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph True needs a CUDA device, not {device}")


def faster(act, update, args, device: torch.device):
    """`act` and `update`, made fast as `args` say; what has to be compiled or captured is so in the first call."""
    if args.compile:
        act, update = (compiled(function, device.type == "cpu") for function in (act, update))
    if args.cuda_graph:
        update = captured(update)
    if device.type == "cpu":
        update = with_fast_matmul(update)
        keep_freed_memory()
    return act, update


def compiled(function, on_cpu: bool):
    """torch.compile of a function as one graph."""
    whole = hasattr(torch._dynamo.config, "trace_autograd_ops")  # without, torch.autograd.grad breaks the graph
    if whole:
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, fullgraph=whole, options={"cpp_wrapper": on_cpu})


def with_fast_matmul(update):
    """`update` with oneDNN's float32 kernels in place of MKL's, which are slow on AMD; only where they are exact.

    They are what "medium" selects on a CPU. With AMX it would round to bfloat16, and on CUDA too. Outside the update
    matrices have few rows, for which MKL's are faster.
    """
    x = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    exact = (x[0] @ x[1] - x[0].double() @ x[1].double()).abs().max() < 1e-3  # float32: 1e-5, bfloat16: 0.1
    torch.set_float32_matmul_precision(outside)

    def fast_update(*args):
        torch.set_float32_matmul_precision("medium")
        try:
            return update(*args)
        finally:
            torch.set_float32_matmul_precision(outside)

    return fast_update if exact else update


def keep_freed_memory() -> None:
    """On Linux glibc would give freed tensors back to the kernel, and each update fault in 1,000 new pages."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def captured(update):
    """`update` as one CUDA graph, captured in its first call. Called like `update`, always with the first learner.

    Batch and noise are copied into the tensors that the graph was captured with, so that noise is fresh on every
    replay. The metrics are the graph's own and change with the next call.
    """
    graph = torch.cuda.CUDAGraph()
    inputs, metrics = [], {}

    def capture(learner, batch, noise, schedule, args) -> None:
        batch, noise = (type(part)(*(x.clone() for x in part)) for part in (batch, noise))
        parts = (part.state_dict().values() if isinstance(part, torch.nn.Module) else [part] for part in learner)
        changed = [x for tensors in parts for x in tensors]
        before = [x.clone() for x in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes what is made on first use
            for _ in range(3):
                update(learner, batch, noise, schedule, args)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            metrics.update(update(learner, batch, noise, schedule, args))
        for x, value in zip(changed, before, strict=True):
            x.copy_(value)
        inputs.extend((*batch, *noise))

    def replay(learner, batch, noise, schedule, args) -> dict[str, torch.Tensor]:
        if not inputs:
            with torch.cuda.device(schedule.betas.device):
                capture(learner, batch, noise, schedule, args)
        for x, value in zip(inputs, (*batch, *noise), strict=True):
            x.copy_(value)
        graph.replay()
        return dict(metrics)

    return replay
