"""Speed only: allocation, compilation, CUDA graphs. Without them a run differs by rounding only."""

import copy
import ctypes
from itertools import zip_longest

import torch
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from envs import one_line


def adam(params, grads, means, squares, _, steps, *, lr, beta1, beta2, eps, found_inf, **others):
    """The step of torch's fused Adam, to be compiled; torch has already increased `steps`."""
    assert not any(others.values()), others  # weight decay, AMSGrad and the like
    finite = 1 - found_inf
    t = steps[0].double().view(1)  # the same for all; in float32 1 - 0.999^t has few digits
    # cat puts the two powers into memory; otherwise they are computed again for each element.
    bias = torch.cat([1 - beta1**t, 1 - beta2**t]).float()
    for parameter, grad, mean, square in zip(params, grads, means, squares, strict=True):
        grad = torch.where(finite > 0, grad, 0)
        mean.lerp_(grad, (1 - beta1) * finite)
        square.lerp_(grad.square(), (1 - beta2) * finite)
        parameter.sub_(finite * lr / bias[0] * mean / ((square / bias[1]).sqrt() + eps))


def tune(device: torch.device, tf32: bool = False) -> None:
    """Choose the library of matrix products; on a CPU, flush subnormals and keep freed memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are captured
        return torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # Adam's means of dead units sink below 1e-38, where a CPU can be 3.6 times as slow.
    torch.set_flush_denormal(True)
    # MKL can be slow on AMD; "medium" is oneDNN, which may use bfloat16.
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    if (x[0] @ x[1] - x[0].double() @ x[1].double()).abs().max() > 1e-3:  # float32: 1e-5
        torch.set_float32_matmul_precision("highest")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc has it
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum: else freed memory is faulted in again
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def tensors_in(learner) -> list[torch.Tensor]:
    """Every tensor of a learner, once each: of four networks, two optimizers, and the others."""
    tensors = [x for net in learner[:4] for x in (*net.parameters(), *net.buffers())]
    adams = [[*adam.state.values(), adam.param_groups[0]["lr"]] for adam in learner[4:6]]
    return [*tensors, *tree_leaves(adams), *learner[6:]]


def accelerate(function, args, device: torch.device):
    """`function(learner, data, noise, schedule, args)`, made fast as `args` say.

    The result must always be called with the same learner, schedule and args, and with data and
    noise of the same shapes. Compilation and capture happen on the first call. Where one fails, a
    line says so and training goes on with what there is.
    """
    many = args.utd * (args.total_timesteps - args.learning_starts) > 20_000
    ways = [compiled] if args.compile or (args.compile is None and many) else []
    ways += [captured] if args.cuda_graph and device.type == "cuda" else []

    def accelerated(*inputs):
        nonlocal function
        while ways:
            function = ways.pop(0)(function, *inputs)
        return function(*inputs)

    return accelerated


def compiled(function, learner, data, noise, schedule, args):
    """`function` traced as one graph of tensors, compiled by Inductor.

    Not torch.compile: it looks at all modules, tensors and args again in each call, which takes a
    tenth of a small update's time, and cannot put an optimizer's step into the graph.
    """
    import torch._inductor  # takes a second
    from torch.fx.experimental.proxy_tensor import make_fx

    everything = [*tensors_in(learner), *schedule, *tree_leaves((data, noise))]

    def on_tensors(*traced):
        in_place_of = {id(x): y.requires_grad_(x.requires_grad) for x, y in zip(everything, traced)}
        return function(*copy.deepcopy((learner, data, noise, schedule), in_place_of), args)

    tensors = [x.detach() for x in everything]  # the backward pass is within the graph
    own = {torch.ops.aten._fused_adam_.tensor_lr: adam}  # the compiler has none
    graph = make_fx(on_tensors, own, tracing_mode="fake")(*tensors)
    options = {"cpp_wrapper": True, "pattern_matcher": False} if tensors[0].is_cpu else {}
    try:
        with torch.no_grad():
            graph = torch._inductor.compile(graph, tensors, options)
    except Exception as error:  # no g++, or on CUDA no triton or gcc; killed by a Ctrl-C
        tqdm.write(f"not compiled: {one_line(error)}")
    held = tensors[: -len(tree_leaves((data, noise)))]
    return lambda learner, data, noise, *_: graph(*held, *tree_leaves((data, noise)))


def captured(function, learner, data, noise, schedule, args):
    """`function` as one CUDA graph; data and noise are copied to where the graph reads them.

    The first replay is compared with a call that is not captured, from the same state. If a tensor
    differs by more than 1 % of its change in that call, or capturing fails, one line says so and
    nothing is captured. Outputs are the graph's own tensors and change with the next call.
    """
    graph, stream, changed = torch.cuda.CUDAGraph(), torch.cuda.Stream(), tensors_in(learner)
    before, static = [x.detach().clone() for x in changed], tree_map(torch.clone, (data, noise))

    @torch.no_grad()
    def results(outputs) -> list[torch.Tensor]:
        after = [x.clone() for x in (*changed, *tree_leaves(outputs))]
        torch._foreach_copy_(changed, before)  # back to the state before
        return after

    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # creates what CUDA creates on first use
            for _ in range(3):
                expected = results(function(learner, *static, schedule, args))
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            outputs = function(learner, *static, schedule, args)
        graph.replay()
        for x, y, start in zip_longest(results(outputs), expected, before, fillvalue=0):
            error, change = (x - y).abs().sum().item(), (y - start).abs().sum().item()
            if not error <= 0.01 * change:  # so that a NaN is an error
                raise RuntimeError(f"a tensor that changes by {change:.1e} is off by {error:.1e}")
    except RuntimeError as error:
        torch.cuda.synchronize()
        results(())
        tqdm.write(f"not captured as a CUDA graph: {one_line(error)}")
        return function

    def replay(learner, data, noise, schedule, args):
        torch._foreach_copy_(tree_leaves(static), tree_leaves((data, noise)))
        graph.replay()
        return outputs

    return replay
