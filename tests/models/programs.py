"""Networks of many kinds, and the log joint of a program read off Pyro's own trace."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from bayesdl.models import BayesianNetwork
from bayesdl.models.priors import Normal, PerParameter

Values = dict[str, Tensor]


def log_joint(model: BayesianNetwork, x: Tensor, y: Tensor) -> Callable[[Values], Tensor]:
    """The summed log probability of a conditioned trace, as a function of the latent sites' values."""

    def value(values: Values) -> Tensor:
        with pyro.validation_enabled(False):
            return poutine.trace(poutine.condition(model, data=values)).get_trace(x, y).log_prob_sum()

    return value


def prior_values(model: BayesianNetwork, x: Tensor, draws: int, seed: int = 0) -> Values:
    """Independent draws of all latent sites, stacked ``[draws, *shape]``."""
    torch.manual_seed(seed)
    traces = [poutine.trace(model).get_trace(x) for _ in range(draws)]
    names = [name for name, site in traces[0].nodes.items() if _latent(name, site)]
    return {name: torch.stack([trace.nodes[name]["value"].detach() for trace in traces]) for name in names}


def _latent(name: str, site: dict[str, object]) -> bool:
    return site["type"] == "sample" and name not in ("data", "y")


class Last(nn.Module):
    """A recurrent layer's last output, through a Linear."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = layer(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """An embedding whose matrix is also the output layer's."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=padding)
        self.inner = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.inner(self.embedding(x).mean(1))))[:, 0]


def _table(n: int) -> Tensor:
    return torch.linspace(-1.5, 2.0, n * 3, dtype=torch.float64).reshape(n, 3).sin()


def _sequence(width: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, 4 * 5 * width, dtype=torch.float64).reshape(4, 5, width).cos()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), lambda: _table(6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1)),
        lambda: torch.linspace(-1, 1, 4 * 36, dtype=torch.float64).reshape(4, 1, 6, 6).sin(),
    ),
    "conv_transpose": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(22, 1)),
        lambda: _sequence(3).transpose(1, 2),
    ),
    "rnn": (lambda: Last(nn.RNN), lambda: _sequence(3)),
    "lstm": (lambda: Last(nn.LSTM), lambda: _sequence(3)),
    "gru": (lambda: Last(nn.GRU), lambda: _sequence(3)),
    "attention": (Attention, lambda: _sequence(4)),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(20, 1)),
        lambda: _sequence(4),
    ),
    "tied_embeddings": (Tied, lambda: torch.tensor([[0, 1, 2], [4, 4, 3], [2, 0, 1]])),
    "padded_embeddings": (lambda: Tied(padding=2), lambda: torch.tensor([[0, 1, 2], [2, 2, 3], [2, 0, 1]])),
    "layer_norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1)),
        lambda: _table(6),
    ),
    "group_norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 1)),
        lambda: _table(6),
    ),
    "batch_norm_eval": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).eval(),
        lambda: _table(6),
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
        lambda: _table(6),
    ),
}


def model_of(name: str) -> tuple[BayesianNetwork, Tensor]:
    """A model of one of the NETS in float64, with inputs."""
    torch.manual_seed(1)
    net, inputs = NETS[name]
    prior = PerParameter({"0.param*": Normal(1.0), "*": Normal("fan_in")}) if name == "weight_norm" else None
    return BayesianNetwork(net().double(), prior), inputs()
