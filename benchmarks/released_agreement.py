"""Is `--score-target released` the released learner? Same weights, batches and noise for both.

    git clone https://github.com/Alescontrela/score_matching_rl /tmp/released    # 2e77893
    pip install jax==0.10.2 flax optax         # beside requirements.txt
    python benchmarks/released_agreement.py /tmp/released

Prints the largest difference of any parameter after each update: 9e-8. With four other draws it was
9e-8 to 1.2e-7, and 7e-7 of one weight whose first gradient, 1e-7, is near Adam's eps. The released
learner's random numbers are replaced by ours, its code is otherwise run as it is (without jit, so
that the replacement reaches the sampler's loop).
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from buffer import Batch
from qsm import Args, Learner, Noise, actor_lr_at, make_learner, make_schedule, update

OBS, ACT, B, HIDDEN = 11, 3, 64, (32, 32)


def load_released(clone: Path):
    """ScoreMatchingLearner of a clone, without packages (gym, dmcgym) that the rest needs."""

    def module(name: str, **attributes) -> ModuleType:
        sys.modules[name] = result = ModuleType(name)
        result.__dict__.update(attributes)
        return result

    module("gym", Env=object, Space=object, spaces=SimpleNamespace(Space=object, Box=object))
    for package in ("", ".agents", ".agents.score_matching", ".networks", ".data"):
        module(f"jaxrl5{package}", __path__=[str(clone / f"jaxrl5{package}".replace(".", "/"))])
    module("jaxrl5.types", PRNGKey=object)
    module("jaxrl5.data.dataset", DatasetDict=dict)
    for name in ("mlp", "state_action_value", "diffusion"):  # each fills the package for the next
        source = vars(importlib.import_module(f"jaxrl5.networks.{name}"))
        vars(sys.modules["jaxrl5.networks"]).update({k: source[k] for k in source if k[0] != "_"})
    name = "jaxrl5.agents.score_matching.score_matching_learner"
    return importlib.import_module(name).ScoreMatchingLearner


def copy_weights(released, ours: Learner) -> None:
    """The released learner's weights into ours; flax has (in, out), torch (out, in)."""

    def dense(layer, params, i):
        layer.weight.copy_(torch.tensor(np.array(params[f"Dense_{i}"]["kernel"])).T)
        layer.bias.copy_(torch.tensor(np.array(params[f"Dense_{i}"]["bias"])))

    params, net = released.score_model.params, ours.score_net
    time_mlp, mlp = sorted((params["MLP_0"], params["MLP_1"]), key=len)  # 2 layers, 3 layers
    with torch.no_grad():
        net.frequencies.copy_(torch.tensor(np.array(params["FourierFeatures_0"]["kernel"]))[:, 0])
        dense(net.time_mlp[0], time_mlp, 0)
        dense(net.time_mlp[1], time_mlp, 1)
        dense(net.first, mlp, 0)
        dense(net.hidden[0], mlp, 1)
        dense(net.out, mlp, 2)
        online = released.critic_1, released.critic_2
        target = released.target_critic_1, released.target_critic_2
        for critic, states in ((ours.critic, online), (ours.critic_target, target)):
            for i, state in enumerate(states):
                layers = [*state.params["MLP_0"].values(), state.params["Dense_0"]]
                kernels = [torch.tensor(np.array(layer["kernel"])) for layer in layers]
                biases = [torch.tensor(np.array(layer["bias"])) for layer in layers]
                for j in range(3):
                    critic.weights[j][i].copy_(kernels[j])
                    critic.biases[j][i, 0].copy_(biases[j])


def main(clone: Path) -> None:
    space = SimpleNamespace
    spaces = [space(shape=(n,), sample=lambda n=n: np.zeros(n, np.float32)) for n in (OBS, ACT)]
    widths = {"critic_hidden_dims": HIDDEN, "actor_hidden_dims": HIDDEN}
    released = load_released(clone).create(0, *spaces, M_q=50.0, **widths)
    args = Args(score_target="released", hidden_dims=HIDDEN, device="cpu")
    ours, check = (make_learner(args, OBS, ACT, "cpu") for _ in range(2))
    T, schedule = args.diffusion_steps, make_schedule(args.beta_schedule, args.diffusion_steps)
    copy_weights(released, ours)

    rng, queue = np.random.default_rng(0), []
    jax.random.normal = lambda key, shape: jnp.asarray(queue.pop(0)).reshape(shape)
    jax.random.randint = lambda key, shape, low, high: jnp.asarray(queue.pop(0)).reshape(shape)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    for step in range(5):
        actions = torch.from_numpy(rng.uniform(-1, 1, (B, ACT)).astype(np.float32))
        batch = Batch(normal(B, OBS), actions, normal(B), normal(B, OBS), (normal(B) > 0.5).float())
        normals = normal(T + 1, B, ACT), normal(B, ACT)
        noise = Noise(*normals, torch.from_numpy(rng.integers(0, T, B)))
        # In its order: the start, a step noise for every t (the last times 0), the rest.
        *sampling, action_noise = noise.next_actions
        draws = *sampling, normal(B, ACT), action_noise, noise.t, noise.actions
        queue[:] = [x.numpy() for x in draws]
        data = {name: jnp.asarray(x.numpy()) for name, x in batch._asdict().items()}
        released_batch = {
            "observations": data["obs"],
            "actions": data["actions"],
            "rewards": data["rewards"],
            "next_observations": data["next_obs"],
            "masks": 1 - data["terminations"],
        }
        with jax.disable_jit():
            released, _ = released.update(released_batch)
        assert not queue

        ours.actor_optimizer.param_groups[0]["lr"].fill_(actor_lr_at(step, args))
        update(ours, batch, noise, schedule, args)
        copy_weights(released, check)
        cells = []
        for name, x, y in zip(Learner._fields[:3], ours[:3], check[:3]):
            pairs = zip(x.parameters(), y.parameters(), strict=True)
            cells.append(f"{name} {max((p - q).abs().max().item() for p, q in pairs):.1e}")
        print(f"update {step + 1}: " + ", ".join(cells))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/released_agreement.py FOLDER_OF_A_CLONE")
    main(Path(sys.argv[1]))
