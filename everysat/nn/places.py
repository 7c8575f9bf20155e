"""What is said of a place in sentences, and by where it lies: the networks that read bags of sentences and positions with a radius."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everysat.nn.attention import Mlp
from everysat.nn.gaussian import Gaussian, GaussianHead, fuse
from everysat.nn.location import Fourier, LocationEncoder, Siren, cartesian, spherical_harmonics
from everysat.nn.ragged import side_by_side
from everysat.types import Batch, Encoder, Features, Tokens

TEMPERATURE = 0.15
"""Of the attention of sentences to a context (WINCEL, Zermatten et al. 2025)."""


class Bag(nn.Module):
    """Sentences as Gaussians, and a bag of them as one: their product, each to the power of its share, so that saying something twice adds nothing.
    Shares grow with how sure a sentence is, and with its likeness to what else is known of the place, where there is such a context. ``dim`` to
    ``high`` are of :class:`GaussianHead`."""

    def __init__(self, vector: int, hidden: int, dim: int, low: float, high: float) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(vector, hidden), nn.GELU())
        self.head = GaussianHead(hidden, dim, low, high)
        self.trust = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, row: Tensor, rows: int, context: Gaussian | None = None) -> Gaussian:
        """One Gaussian of each of ``rows``, of the vectors ``x`` [sentence, vector] of sentences of ``row``; not observed where there are none."""
        mean, log_var = self.head(self.adapter(x))
        share = -0.5 * self.trust * log_var.mean(-1)
        if context is not None:
            likeness = F.cosine_similarity(mean, context.mean[row], dim=-1)
            share = share + likeness * context.observed[row] / TEMPERATURE
        means, there, slot = side_by_side(mean, row, rows)
        log_vars, _, _ = side_by_side(log_var, row, rows)
        logit = share.new_full((there.numel(),), -1e9).index_copy(0, slot, share).view(there.shape)
        return fuse("precision_average", means, log_vars, there, logit.softmax(-1).clamp(min=1e-12))


class Where(nn.Module):
    """Positions with radii as vectors [n, width]: a village and a country around it are not the same.

    ``kind``: spherical ``harmonics`` of ``degrees`` by a sinusoidal network (SatCLIP, Klemmer et al. 2025); random Fourier features, ``fourier``, of points
    of the unit sphere, of ``sigmas`` cycles per unit; or a location encoder that stays as it is, ``frozen``.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        *,
        degrees: int = 10,
        sigmas: Sequence[float] = (0.5, 4.0, 32.0),
        frozen: LocationEncoder | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.degrees = kind, degrees
        if kind == "harmonics":
            self.net: nn.Module = Siren(degrees**2, width, width, 2)
        elif kind == "fourier":
            self.codes = nn.ModuleList(Fourier(3, 64, sigma) for sigma in sigmas)
            self.net = nn.Sequential(nn.Linear(128 * len(sigmas), width), nn.GELU(), nn.Linear(width, width))
        elif kind == "frozen" and frozen is not None:
            self.frozen = frozen.requires_grad_(False)
            self.net = nn.Linear(frozen.dim, width)
        else:
            raise ValueError(f"kind={kind!r} is none of harmonics, fourier and frozen (with an encoder)")
        self.size, self.mix = nn.Linear(2, width), Mlp(width, 2 * width)

    def forward(self, lonlat: Tensor, radius_m: Tensor) -> Tensor:
        """``lonlat`` float64 [n, 2] in degrees, ``radius_m`` [n] in metres."""
        like = self.size.weight
        if self.kind == "harmonics":
            code = spherical_harmonics(lonlat, self.degrees)
        elif self.kind == "fourier":
            code = torch.cat([part(cartesian(lonlat)) for part in self.codes], -1)
        else:
            with torch.no_grad():
                code = self.frozen.of(lonlat)
        decades = radius_m.log10() / 3 - 1  # 0 at 1 km, 1 at 1000 km
        x = self.net(code.to(like)) + self.size(torch.stack([decades, decades.square()], -1).to(like))
        mixed: Tensor = x + self.mix(x)
        return mixed


class Blind(Encoder):
    """In place of an image encoder where there are no images: it has no inputs."""

    family, dim = "blind", 1

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.config, self.any_sensor = {}, {}, True  # no layer is listed

    def tokenize(self, batch: Batch) -> Tokens:
        raise LookupError("there is no image encoder that could read a layer")

    def forward(self, tokens: Tokens) -> Features:
        raise LookupError("there is no image encoder that could read a layer")
