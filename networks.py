"""The two networks of QSM: the score network (the policy) and the stacked double critic.

Only torch is imported, so the file can be copied on its own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def xavier_uniform(shape: Sequence[int], fan_in: int, fan_out: int) -> nn.Parameter:
    """Xavier-uniform weights, U(-b, b) with b = sqrt(6 / (fan_in + fan_out)).

    The fans are arguments because a layer over several concatenated inputs is stored here in one piece per input.
    """
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias (released code: networks/mlp.py:7)."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ScoreNet(nn.Module):
    """The prediction of the diffusion policy at (s, a_t, t): the clean action, or the noise eps if trained for it.

    An MLP with Mish over the concatenation of action, observation and time embedding (released code:
    networks/diffusion.py:45-68). The first layer is kept as three pieces, W [a; s; e] = W_a a + W_s s + W_e e,
    so that a sampling call computes W_s s once instead of T times, and W_e e once for all T time steps.

    Args:
        obs_dim, act_dim: sizes O and A of one observation and one action.
        hidden_dims: widths of the hidden layers; H below is the first of them.
        diffusion_steps: T, the number of denoising steps.
        time_dim: number of Fourier features of the raw integer t.
        time_hidden: width of the two layers of the time MLP.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden_dims: Sequence[int] = (512, 512),
        diffusion_steps: int = 10,
        time_dim: int = 64,
        time_hidden: int = 128,
    ):
        super().__init__()
        self.register_buffer("timesteps", torch.arange(diffusion_steps, dtype=torch.float32), persistent=False)
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))
        self.time_mlp = nn.ModuleList([linear(time_dim, time_hidden), linear(time_hidden, time_hidden)])
        fans = (act_dim + obs_dim + time_hidden, hidden_dims[0])
        self.act_weight = xavier_uniform((hidden_dims[0], act_dim), *fans)
        self.obs_weight = xavier_uniform((hidden_dims[0], obs_dim), *fans)
        self.time_weight = xavier_uniform((hidden_dims[0], time_hidden), *fans)
        self.first_bias = nn.Parameter(torch.zeros(hidden_dims[0]))
        self.hidden = nn.ModuleList(linear(i, o) for i, o in zip(hidden_dims[:-1], hidden_dims[1:], strict=True))
        self.out = linear(hidden_dims[-1], act_dim)

    def time_features(self) -> torch.Tensor:
        """The time embedding's share of the first layer for t = 0 .. T-1, (T, H)."""
        angles = 2 * torch.pi * self.timesteps[:, None] * self.frequencies  # (T, time_dim / 2)
        x = F.mish(self.time_mlp[0](torch.cat([angles.cos(), angles.sin()], dim=-1)))
        embedding = self.time_mlp[1](x)  # (T, time_hidden)
        return F.linear(embedding, self.time_weight, self.first_bias)

    def obs_features(self, obs: torch.Tensor) -> torch.Tensor:
        """The observation's share of the first layer, (B, O) -> (B, H)."""
        return F.linear(obs, self.obs_weight)

    def denoise(self, features: torch.Tensor, noisy_actions: torch.Tensor) -> torch.Tensor:
        """The prediction (B, A) from obs_features + time_features (B, H) and a_t (B, A)."""
        x = F.mish(features + F.linear(noisy_actions, self.act_weight))
        for layer in self.hidden:
            x = F.mish(layer(x))
        return self.out(x)

    def forward(self, obs: torch.Tensor, noisy_actions: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction at (s, a_t, t), (B, O), (B, A) and integers (B,) in [0, T) -> (B, A)."""
        one_hot = (t[:, None] == self.timesteps).to(obs.dtype)  # (B, T)
        # time_features()[t], whose gradient would be a scatter: with several threads a sum in random order
        return self.denoise(self.obs_features(obs) + one_hot @ self.time_features(), noisy_actions)


class Critic(nn.Module):
    """Two Q-functions as one network with a leading dimension of 2: ReLU MLPs over [s; a].

    As in the score network, the first layer is kept in pieces: the gradient to the action, which is what QSM
    needs from the critic, then never computes the observation's columns.

    Args:
        obs_dim, act_dim: sizes O and A of one observation and one action.
        hidden_dims: widths of the hidden layers of each of the two networks.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_dims: Sequence[int] = (512, 512)):
        super().__init__()
        fans = (obs_dim + act_dim, hidden_dims[0])
        self.obs_weight = xavier_uniform((2, obs_dim, hidden_dims[0]), *fans)
        self.act_weight = xavier_uniform((2, act_dim, hidden_dims[0]), *fans)
        self.first_bias = nn.Parameter(torch.zeros(2, 1, hidden_dims[0]))
        widths = [*hidden_dims, 1]
        self.weights = nn.ParameterList(
            xavier_uniform((2, i, o), i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(2, 1, o)) for o in widths[1:])

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q_1 and Q_2, (B, O) and (B, A) -> (2, B)."""
        x = obs @ self.obs_weight + actions @ self.act_weight + self.first_bias  # (2, B, H)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x.relu() @ weight + bias
        return x.squeeze(-1)  # not (2, B, 1): against a (B,) target that would broadcast to (2, B, B)
