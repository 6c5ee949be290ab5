"""How an update is made fast: one compiled graph, CUDA graph. Speed only; nothing here is specific to QSM.

Without `accelerate` everything is the same up to rounding, only slower.
"""

import copy
import ctypes
import importlib.util
import os
import shutil
import sys

import torch


def mish(x: torch.Tensor) -> torch.Tensor:
    """x tanh(softplus(x)) with one exponential, not three: tanh(log(1 + w)) = n / (n + 2), w = exp(x), n = w (w + 2).

    Beyond 20 the ratio is 1 in float32, and exp would overflow at 44.
    """
    w = x.clamp_max(20.0).exp()
    n = w * (w + 2)
    return x * (n / (n + 2))


def mish_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient to x: with the ratio n / (n + 2) as above, its derivative is 4 w (w + 1) / (n + 2)^2."""
    x = x.clamp_max(20.0)
    w = x.exp()
    n = w * (w + 2)
    return grad * (n / (n + 2) + x * (4 * w * (w + 1) / (n + 2) ** 2))


def adam(params, grads, exp_avgs, exp_avg_sqs, _, steps, *, lr, beta1, beta2, eps, found_inf, **_ignored) -> None:
    """The step of torch's fused Adam, which has increased `steps` already: the formulas of the Adam paper."""
    finite = 1 - found_inf
    t = steps[0].double().view(1)  # the same for all parameters; in float32 1 - 0.999^t has few digits
    # By cat the two powers become a tensor in memory; otherwise they would be computed again for each element.
    bias = torch.cat([1 - beta1**t, 1 - beta2**t]).float()
    for parameter, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = torch.where(finite > 0, grad, 0)
        exp_avg.lerp_(grad, (1 - beta1) * finite)
        exp_avg_sq.lerp_(grad.square(), (1 - beta2) * finite)
        parameter.sub_(finite * lr / bias[0] * exp_avg / ((exp_avg_sq / bias[1]).sqrt() + eps))


DECOMPOSITIONS = {  # what a compiled update has in place of kernels of torch, to be fused with what is beside it
    torch.ops.aten.mish.default: mish,
    torch.ops.aten.mish_backward.default: mish_backward,
    torch.ops.aten.addmm.default: lambda bias, x, weight: x @ weight + bias,
    torch.ops.aten._fused_adam_.tensor_lr: adam,
}


def tensors_in(learner) -> list[torch.Tensor]:
    """Every tensor of a NamedTuple of modules, optimizers and tensors, once each."""
    tensors = []
    for part in learner:
        if isinstance(part, torch.nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
        elif isinstance(part, torch.optim.Optimizer):
            tensors += [x for state in part.state.values() for x in state.values()] + [part.param_groups[0]["lr"]]
        else:
            tensors.append(part)
    return tensors


def resolve_flags(args, device: torch.device) -> None:
    """Set `args.compile` and `args.cuda_graph` where they are None.

    Raises:
        ValueError: with one line to show, if they are requested but unavailable.
    """
    on_cuda = device.type == "cuda"
    variable, usual = ("CC", "gcc") if on_cuda else ("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compiler = os.environ.get(variable, usual)  # as Triton and Inductor look for it
    can_compile = bool(shutil.which(compiler)) and (not on_cuda or importlib.util.find_spec("triton") is not None)
    if args.compile is None:
        args.compile = can_compile and args.utd * (args.total_timesteps - args.learning_starts) > 20_000
    if args.cuda_graph is None:
        args.cuda_graph = device.type == "cuda"
    if args.compile and not can_compile:
        raise ValueError(f"--compile True needs a compiler: install {compiler}" + (" and triton" if on_cuda else ""))
    if args.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph True needs a CUDA device, not {device}")


def accelerate(act, update, args, device: torch.device):
    """`act` and `update`, made fast as `args` say. Compilation and capture happen on the first call."""
    if args.compile:
        on_cpu = device.type == "cpu"
        act = torch.compile(act, fullgraph=True, options={"cpp_wrapper": on_cpu})
        update = compiled(update, on_cpu)
    if args.cuda_graph:
        update = captured(update)
    if device.type == "cpu":
        update = with_fast_matmul(update)
        keep_freed_memory()
    return act, update


def compiled(update, on_cpu: bool):
    """`update` as one graph, compiled by Inductor in the first call with a learner and a batch size.

    Always called with the same schedule and args. torch.compile would look at all modules, tensors and args again in
    each call, which is a tenth of a small update's time.
    """
    graphs = {}

    def build(learner, batch, noise, schedule, args):
        import torch._inductor  # only here, a second
        from torch.fx.experimental.proxy_tensor import make_fx

        for optimizer in (learner.actor_optimizer, learner.critic_optimizer):
            optimizer.zero_grad()  # gradients are made within the graph
        held = [*tensors_in(learner), *schedule]
        everything, names = [*held, *batch, *noise], []

        def on_tensors(*traced):
            for x, traced_x in zip(everything, traced, strict=True):
                traced_x.requires_grad_(x.requires_grad)
            in_place_of = {id(x): traced_x for x, traced_x in zip(everything, traced, strict=True)}
            metrics = update(*copy.deepcopy((learner, batch, noise, schedule), in_place_of), args)
            names[:] = metrics
            return list(metrics.values())

        inputs = [x.detach() for x in everything]  # they require no gradient: the graph has its backward pass within
        graph = make_fx(on_tensors, DECOMPOSITIONS, tracing_mode="fake")(*inputs)
        options = {"cpp_wrapper": True, "pattern_matcher": False} if on_cpu else {}
        with torch.no_grad():
            return torch._inductor.compile(graph, inputs, options), inputs[: len(held)], names, learner

    def compiled_update(learner, batch, noise, schedule, args) -> dict[str, torch.Tensor]:
        key = id(learner), *(x.shape for x in (*batch, *noise))
        if key not in graphs:
            graphs[key] = build(learner, batch, noise, schedule, args)
        graph, held, names, _ = graphs[key]
        with torch.no_grad():
            return dict(zip(names, graph(*held, *batch, *noise), strict=True))

    return compiled_update


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

    The graph is replayed once and compared with an update that is not captured, from the same state. Where it cannot be
    captured or differs by more than 1e-4, one line says so, and updates go on without it.

    Batch and noise are copied into the tensors that the graph was captured with, so that noise is fresh on every
    replay. The metrics are the graph's own and change with the next call.
    """
    graph = torch.cuda.CUDAGraph()
    inputs, metrics, use = [], {}, []

    def capture(learner, batch, noise, schedule, args) -> None:
        batch, noise = (type(part)(*(x.clone() for x in part)) for part in (batch, noise))
        changed = tensors_in(learner)
        before = [x.detach().clone() for x in changed]

        @torch.no_grad()
        def restore() -> list[torch.Tensor]:
            after = [x.clone() for x in changed]
            torch._foreach_copy_(changed, before)
            return after

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and makes what is made on first use
            for _ in range(3):
                update(learner, batch, noise, schedule, args)
                expected = restore()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                metrics.update(update(learner, batch, noise, schedule, args))
            graph.replay()
            largest = max((x - y).abs().max().item() for x, y in zip(restore(), expected, strict=True))
            use.append(largest < 1e-4)
            problem = f"its result differs by {largest:.1e}"
        except RuntimeError as error:
            restore()
            use.append(False)
            problem = str(error).splitlines()[0]
        if not use[0]:
            print(f"updates are not captured as a CUDA graph: {problem}")
        inputs.extend((*batch, *noise))

    def replay(learner, batch, noise, schedule, args) -> dict[str, torch.Tensor]:
        if not use:
            with torch.cuda.device(schedule.betas.device):
                capture(learner, batch, noise, schedule, args)
        if not use[0]:
            return update(learner, batch, noise, schedule, args)
        for x, value in zip(inputs, (*batch, *noise), strict=True):
            x.copy_(value)
        graph.replay()
        return dict(metrics)

    return replay
