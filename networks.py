"""The two networks of QSM: the score network (the policy) and the stacked double critic."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(in_dim: int, out_dim: int) -> nn.Linear:
    """Xavier-uniform weights and zero bias (released code: networks/mlp.py:7)."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)), with one exponential; beyond 20 it is x in float32."""
    w = x.clamp_max(20.0).exp()
    n = w * (w + 2)
    return x * (n / (n + 2))


class ScoreNet(nn.Module):
    """The prediction of the diffusion policy at (s, a_t, t): the clean action, or the noise eps.

    An MLP with Mish over the concatenation of action, observation and time embedding (released
    code: networks/diffusion.py:34-67). The first layer is applied in three pieces,
    W [a; s; e] = W_a a + W_s s + W_e e: a sampling call then computes W_s s once, not T times.
    O, A, H and T are obs_dim, act_dim, hidden_dims[0] and diffusion_steps.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_dims=(512, 512), diffusion_steps=10):
        super().__init__()
        self.register_buffer("timesteps", torch.arange(float(diffusion_steps)), persistent=False)
        time_dim, time_hidden = 64, 128  # of the Fourier features of t, of the time MLP
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))
        self.time_mlp = nn.ModuleList(linear(n, time_hidden) for n in (time_dim, time_hidden))
        self.columns = act_dim, obs_dim, time_hidden  # of the first layer's weight
        self.first = linear(sum(self.columns), hidden_dims[0])
        self.hidden = nn.ModuleList(linear(*io) for io in zip(hidden_dims[:-1], hidden_dims[1:]))
        self.out = linear(hidden_dims[-1], act_dim)

    def time_features(self) -> Tensor:
        """The time embedding's share of the first layer for t = 0 .. T-1, with the bias, (T, H)."""
        angles = 2 * torch.pi * self.timesteps[:, None] * self.frequencies  # (T, time_dim / 2)
        x = mish(self.time_mlp[0](torch.cat([angles.cos(), angles.sin()], dim=-1)))
        time_weight = self.first.weight.split(self.columns, dim=1)[2]
        return F.linear(self.time_mlp[1](x), time_weight, self.first.bias)

    def obs_features(self, obs: Tensor) -> Tensor:
        """The observation's share of the first layer, (B, O) -> (B, H)."""
        return F.linear(obs, self.first.weight.split(self.columns, dim=1)[1])

    def denoise(self, features: Tensor, noisy_actions: Tensor) -> Tensor:
        """The prediction (B, A) from obs_features + time_features (B, H) and a_t (B, A)."""
        act_weight = self.first.weight.split(self.columns, dim=1)[0]
        x = mish(features + F.linear(noisy_actions, act_weight))
        for layer in self.hidden:
            x = mish(layer(x))
        return self.out(x)

    def forward(self, obs: Tensor, noisy_actions: Tensor, t: Tensor) -> Tensor:
        """The prediction at (s, a_t, t): (B, O), (B, A), integers (B,) in [0, T) -> (B, A)."""
        one_hot = (t[:, None] == self.timesteps).to(obs.dtype)  # (B, T)
        # Not time_features()[t]: its gradient is a scatter, whose order of summation is random.
        features = self.obs_features(obs) + one_hot @ self.time_features()
        return self.denoise(features, noisy_actions)


class Critic(nn.Module):
    """Two Q-functions as one network with a leading dimension of 2: ReLU MLPs over [s; a].

    The first layer is applied in two pieces: dQ/da then skips the observation's rows.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_dims=(512, 512)):
        super().__init__()
        widths = [obs_dim + act_dim, *hidden_dims, 1]
        self.rows = obs_dim, act_dim  # of the first weight
        self.weights = nn.ParameterList(torch.empty(2, *io) for io in zip(widths[:-1], widths[1:]))
        self.biases = nn.ParameterList(torch.zeros(2, 1, width) for width in widths[1:])
        for weight in self.weights:
            for one in weight:  # one by one: for a 3-D tensor torch computes other fans
                nn.init.xavier_uniform_(one)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Q_1 and Q_2, (B, O) and (B, A) -> (2, B)."""
        (first, *weights), (first_bias, *biases) = self.weights, self.biases
        obs_weight, act_weight = first.split(self.rows, dim=1)
        x = obs @ obs_weight + actions @ act_weight + first_bias  # (2, B, H)
        for weight, bias in zip(weights, biases):
            x = x.relu() @ weight + bias
        return x.squeeze(-1)  # not (2, B, 1): against a (B,) target that broadcasts to (2, B, B)
