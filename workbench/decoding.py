"""How a model is sampled from: temperature, then top-k, then top-p, as one object for all.

The probability of a text under a scheme is read from the same logits that score it, so several
schemes cost one forward pass; drawing from a scheme uses the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from workbench.table import InputError

NUCLEUS = (
    64  # likeliest tokens looked at first; top-p needs more of them only where these fall short
)
SMALLEST = torch.finfo(torch.float32).tiny  # a lower temperature could not divide a float32


@dataclass(frozen=True)
class Decoding:
    """A sampling scheme: the distribution that each next token is drawn from.

    Logits are divided by ``temperature``; then the ``top_k`` likeliest tokens are kept; then of
    those, renormalised, the fewest likeliest that hold at least the mass ``top_p``. What is left
    is renormalised. Among equal logits the lowest id comes first, so that exactly ``top_k`` stay.
    Temperature 0 is greedy, the limit from above but for ties, where the lowest id takes all.

    Raises:
        InputError: A temperature that is negative or not finite, ``top_k`` below 1 or not whole,
            ``top_p`` outside 0 < top_p <= 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"Decoding: temperature is {self.temperature}, it must be 0 (greedy) or more"
            )
        if self.top_k is not None:
            if not (self.top_k >= 1 and float(self.top_k).is_integer()):
                raise InputError(
                    f"Decoding: top_k is {self.top_k}, it must be a whole number of at least 1; "
                    "None keeps all tokens"
                )
            object.__setattr__(self, "top_k", int(self.top_k))  # 40.0 and 40 are one scheme
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(
                f"Decoding: top_p is {self.top_p}, it must be above 0 and at most 1; None keeps "
                "all tokens"
            )

    @classmethod
    def greedy(cls) -> Decoding:
        """Always the likeliest token."""
        return cls(temperature=0.0)

    @property
    def name(self) -> str:
        """What tables and legends call it: ``greedy``, ``T=1``, ``top-p 0.9, T=0.7``."""
        if self.temperature == 0:
            return "greedy"
        cuts = (("top-k", self.top_k), ("top-p", self.top_p))
        parts = [f"{word} {value:g}" for word, value in cuts if value is not None]
        if self.temperature != 1 or not parts:
            parts.append(f"T={self.temperature:g}")
        return ", ".join(parts)

    def log_probabilities(
        self, logits: Float[torch.Tensor, "row vocab"]
    ) -> Float[torch.Tensor, "row vocab"]:
        """Natural log-probability of each token under the scheme, -inf outside what it keeps."""
        shifted = logits - logits.max(dim=1, keepdim=True).values
        count, edge, total = _kept(shifted, self)
        # above the edge all are kept, and of those equal to it the first ids, up to the count
        equal = shifted == edge[:, None]
        above = shifted > edge[:, None]
        room = count[:, None] - above.sum(dim=1, keepdim=True)
        kept = above | (equal & (equal.cumsum(dim=1) <= room))
        log_p = shifted / max(self.temperature, SMALLEST) - total[:, None]
        return torch.where(kept | log_p.isnan(), log_p, -math.inf)


def check_schemes(schemes: Sequence[Decoding], asker: str) -> tuple[Decoding, ...]:
    """The schemes as a tuple, once they are at least one and told apart by their names.

    Raises:
        InputError: None, something else than a scheme, or two of one name.
    """
    for scheme in schemes:
        if not isinstance(scheme, Decoding):
            raise InputError(f"{asker}: {scheme!r} is no scheme; give Decoding(...) objects")
    names = [scheme.name for scheme in schemes]
    if not names:
        raise InputError(f"{asker}: there are no schemes; give one or more Decoding(...)")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{asker}: {names.count(name)} schemes are {name}; give each once")
    return tuple(schemes)


def true_log_probability(
    logits: Float[torch.Tensor, "row vocab"],
    target: Int[torch.Tensor, " row"],
    schemes: Sequence[Decoding],
) -> Float[torch.Tensor, "row scheme"]:
    """Log-probability of one token a row under each scheme, without its whole distribution.

    The same as ``log_probabilities(logits)`` at the token; -inf where the scheme leaves it out.
    """
    shifted = logits - logits.max(dim=1, keepdim=True).values
    true = shifted.gather(1, target[:, None])[:, 0]
    widest = max([scheme.top_k or 0 for scheme in schemes if scheme.temperature], default=0)
    leading = _leading(shifted, max(widest, NUCLEUS)) if any(map(_sorts, schemes)) else None
    out = []
    for scheme in schemes:
        count, edge, total = _kept(shifted, scheme, leading)
        log_p = true / max(scheme.temperature, SMALLEST) - total
        if _cuts(scheme):
            inside, tie = true > edge, (true == edge).nonzero()[:, 0]
            # only at the edge can equals compete for the last places
            inside[tie] = rank_of(shifted[tie], target[tie]) <= count[tie]
            # a NaN stays one: what a broken model says is refused, not outside
            log_p = torch.where(inside | log_p.isnan(), log_p, -math.inf)
        out.append(log_p)
    return torch.stack(out, dim=1)


def rank_of(
    logits: Float[torch.Tensor, "row vocab"], target: Int[torch.Tensor, " row"]
) -> Int[torch.Tensor, " row"]:
    """1 for the likeliest token; among equals the lowest id comes first."""
    true = logits.gather(1, target[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    return 1 + ((logits > true) | ((logits == true) & before)).sum(dim=1)


def _cuts(scheme: Decoding) -> bool:
    return scheme.temperature == 0 or scheme.top_k is not None or (scheme.top_p or 1) < 1


def _sorts(scheme: Decoding) -> bool:
    return scheme.temperature > 0 and _cuts(scheme)


def _leading(shifted: torch.Tensor, size: int) -> Float[torch.Tensor, "row size"]:
    """The largest logits of each row, in order."""
    return shifted.topk(min(size, shifted.shape[1]), dim=1).values


def _kept(
    shifted: Float[torch.Tensor, "row vocab"],
    scheme: Decoding,
    leading: Float[torch.Tensor, "row size"] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many tokens a scheme keeps, the least of their logits, and the log of their mass.

    Logits come with the row's largest at 0; the mass is the sum of ``exp(logit / temperature)``.
    """
    rows, vocabulary = shifted.shape
    heat = max(scheme.temperature, SMALLEST)
    if scheme.temperature == 0:
        one = torch.ones(rows, dtype=torch.long, device=shifted.device)
        return one, torch.zeros_like(shifted[:, 0]), torch.zeros_like(shifted[:, 0])
    if not _cuts(scheme):
        all_of_them = torch.full((rows,), vocabulary, device=shifted.device)
        return all_of_them, shifted.amin(dim=1), _mass(shifted, heat).log()
    size = min(scheme.top_k or NUCLEUS, vocabulary)
    if leading is None:
        leading = _leading(shifted, size)
    if scheme.top_p is None:
        leading = leading[:, :size]
        count = torch.full((rows,), size, device=shifted.device)
        return count, leading[:, -1], _mass(leading, heat).log()
    if scheme.top_k is not None:
        leading = leading[:, :size]
        return _nucleus(leading, _mass(leading, heat), scheme)[:3]
    whole = _mass(shifted, heat)
    count, edge, total, enough = _nucleus(leading, whole, scheme)
    size = leading.shape[1]
    while size < vocabulary and not enough.all():
        size, short = 8 * size, (~enough).nonzero()[:, 0]
        more = _leading(shifted[short], size)
        found = _nucleus(more, whole[short], scheme)
        count[short], edge[short], total[short], enough[short] = found
    return count, edge, total


def _mass(shifted: torch.Tensor, heat: float) -> Float[torch.Tensor, " row"]:
    # the largest is 0, so the sum lies between 1 and the vocabulary: no need to shift again
    return (shifted if heat == 1 else shifted / heat).exp().sum(dim=1)


def _nucleus(leading, whole, scheme: Decoding) -> tuple[torch.Tensor, ...]:
    """Count, edge and log mass of the top-p set among ordered logits, and whether they reach p."""
    mass = (leading / max(scheme.temperature, SMALLEST)).exp().cumsum(dim=1)
    share = mass / whole[:, None]
    # the token with which the mass is reached is kept: those count that still lacked mass before
    count = 1 + (share[:, :-1] < scheme.top_p).sum(dim=1)
    last = (count - 1)[:, None]
    enough = share.gather(1, last)[:, 0] >= scheme.top_p
    return count, leading.gather(1, last)[:, 0], mass.gather(1, last)[:, 0].log(), enough
