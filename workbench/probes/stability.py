"""How much of a decomposition of the loss curvature, and of the edit along it, is chance.

Factors are estimated from some text and labels drawn at random. Other labels, less text, the other
half of the text or another checkpoint give other eigenbases: compared here are the directions,
what the edits take out of the weights, and which items they stop from being recited.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.stats import binomtest, chi2
from tqdm.auto import tqdm

from workbench.curvature import (
    MASKED,
    Basis,
    component_mask,
    correct_masses,
    decompose,
    edited,
    refuse_share,
)
from workbench.factors import LABELS, collect_factors
from workbench.items import check_items, cut_items, items_hash
from workbench.models import LanguageModel
from workbench.table import InputError, rows, validate

ASKER = "probe_stability"
PLACES = np.linspace(0, 1, 11)  # at which of the sorted angles a subspace is read
TIE = 1e-12  # eigenvalues closer than this, relatively, span one space and are taken together
RANDOM = 20  # random subspaces behind the level of chance
LEVEL = 0.95  # of all intervals
DRAWS = 1000  # of the bootstrap over layers


# Subspaces


def principal_angles(
    first: Float[torch.Tensor, "n k"], second: Float[torch.Tensor, "n l"]
) -> Float[np.ndarray, " angle"]:
    """Principal angles between two subspaces in degrees, ascending; ``min(k, l)`` of them.

    Björck & Golub (1973), "Numerical methods for computing angles between linear subspaces": the
    cosines are the singular values of ``first.T @ second``. Angles below 45 degrees are read from
    the sines, where cosines have lost their digits. The columns must be orthonormal; their signs,
    their order and any rotation among them change nothing.

    Returns:
        0 for a direction that both hold, 90 for one that is orthogonal to all of the other.
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    product = first.T @ second
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ product).flip(0).clamp(max=1)
    angles = torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin())
    return np.degrees(angles.cpu().numpy())


def random_angles(n: int, k: int, *, draws: int, seed: int) -> Float[np.ndarray, "draw angle"]:
    """Principal angles in degrees between two random subspaces of ``k`` of ``n`` dimensions.

    The mean squared cosine is ``k / n``; the single angles have no closed form and are drawn.
    """
    rng, axes = np.random.default_rng([seed, n, k]), torch.eye(n, k, dtype=torch.float64)
    drawn = [torch.linalg.qr(torch.from_numpy(rng.normal(size=(n, k)))).Q for _ in range(draws)]
    return np.stack([principal_angles(axes, each) for each in drawn])


def leading(values: Float[np.ndarray, " n"], *, share: float, dimensions: int | None) -> int:
    """How many leading eigenvectors to compare: ``dimensions``, or the fewest with the share.

    Eigenvalues (descending) equal to the last one taken (to 1e-12) are taken as well: within
    equal ones the directions are arbitrary, only their span is not.

    Raises:
        InputError: Eigenvalues that are all 0.
    """
    if not values[0] > 0:
        raise InputError(f"{ASKER}: a factor holds no mass; needs texts with a gradient")
    held = np.cumsum(values) / values.sum()
    count = dimensions or 1 + int(np.searchsorted(held, share * (1 - TIE)))
    last = values[min(count, len(values)) - 1]
    return int(np.count_nonzero(values >= last * (1 - TIE)))


# Edits


@dataclass(frozen=True)
class Overlap:
    """Sums over the entries of one weight that compare two edits; they add up over weights.

    ``R`` is what an edit removes and ``W'`` what it leaves. Each sum stands beside the value
    expected if the second edit removed as many components of a random basis: by symmetry a share
    ``q`` of any energy, so that ``<R_1, R_2>`` is ``q <R_1, W_2>``.

    Attributes:
        product: ``<R_1, R_2>``.
        first, second: ``|R_1|^2`` and ``|R_2|^2``.
        shared: Energy of ``R_1`` in the components that the second edit removes.
        gap: ``|W_1' - W_2'|^2``.
        left: ``|W_1'|^2``.
        both, either: Components kept by both edits and by at least one; only in one basis.
    """

    product: Float[np.ndarray, " 2"]
    first: float
    second: Float[np.ndarray, " 2"]
    shared: Float[np.ndarray, " 2"]
    gap: Float[np.ndarray, " 2"]
    left: float
    both: Float[np.ndarray, " 2"]
    either: Float[np.ndarray, " 2"]

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def measures(self) -> dict[str, Float[np.ndarray, " 2"]]:
        """Each measure as observed and by chance; NaN where an edit removes or leaves nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "edit_cosine": np.clip(self.product / np.sqrt(self.first * self.second), -1, 1),
                "edit_shared": self.shared / np.float64(self.first),
                "edit_difference": np.sqrt(self.gap / np.float64(self.left)),
                "mask_jaccard": self.both / self.either,
            }


def overlap(
    first: Basis,
    keep_first: Bool[np.ndarray, "out in"],
    second: Basis,
    keep_second: Bool[np.ndarray, "out in"],
) -> Overlap:
    """What two edits of one layer have in common, entry by entry of the weight.

    Masks of different bases cannot be compared; what they remove from the weight can. For two
    masks in one basis the product is the energy ``C^2`` of the components that both remove.
    """
    one, two = (
        torch.from_numpy(np.ascontiguousarray(keep)).to(basis.coefficients.device)
        for basis, keep in ((first, keep_first), (second, keep_second))
    )
    whole, other = (basis.matrix(basis.coefficients) for basis in (first, second))
    gone = first.matrix(first.coefficients * ~one)
    gone_other = second.matrix(second.coefficients * ~two)
    kept, kept_other = whole - gone, other - gone_other
    turned = second.output_vectors.T @ gone @ second.input_vectors
    q = 1 - float(keep_second.mean())
    energy, left = float(gone.square().sum()), float(kept.square().sum())
    size = float(other.square().sum())
    far = left + (1 - q) * size - 2 * (1 - q) * float((kept * other).sum())
    shares = np.array([keep_first.mean(), keep_second.mean()])
    both = np.array([(keep_first & keep_second).mean(), shares.prod()]) * keep_first.size
    either = shares.sum() * keep_first.size - both
    same = same_basis(first, second)
    return Overlap(
        product=np.array([float((gone * gone_other).sum()), q * float((gone * other).sum())]),
        first=energy,
        second=np.array([float(gone_other.square().sum()), q * size]),
        shared=np.array([float((turned * ~two).square().sum()), q * energy]),
        gap=np.array([float((kept - kept_other).square().sum()), max(far, 0.0)]),
        left=left,
        both=both if same else np.full(2, np.nan),
        either=either if same else np.full(2, np.nan),
    )


def same_basis(first: Basis, second: Basis) -> bool:
    """Whether component (i, j) means the same in both."""
    return first is second or (
        torch.equal(first.input_vectors, second.input_vectors)
        and torch.equal(first.output_vectors, second.output_vectors)
    )


# Verdicts


def kappa(
    first: Bool[np.ndarray, " item"], second: Bool[np.ndarray, " item"]
) -> tuple[float, float, float]:
    """Agreement of two verdicts beyond chance, and its 95 % interval.

    Scott (1955), "Reliability of content analysis": both share one rate p, as two edits of one
    kind should, so that by chance they agree on ``p^2 + (1-p)^2`` of the items. The interval is
    Donner & Eliasziw's (1992): all kappas at which the counts of (both, one, neither) pass a
    chi-square test; not empty with few items, nor where all agree.

    Returns:
        1 where all agree, 0 at chance, at least -1; NaN where all verdicts are the same one.
    """
    n = len(first)
    both, one = np.count_nonzero(first & second), np.count_nonzero(first ^ second)
    rate = (2 * both + one) / (2 * n) if n else np.nan
    spread = rate * (1 - rate)
    if not spread > 0:
        return np.nan, np.nan, np.nan
    value, critical = 1 - one / (2 * n * spread), chi2.ppf(LEVEL, 1)

    def excess(at: float) -> float:
        if at == value:
            return -critical  # also where a count is 0 and was expected to be
        # the counts expected if kappa were ``at`` are off by d, -2d and d
        off = n * spread * (at - value)
        expected = (
            n * (rate**2 + spread * at), 2 * n * spread * (1 - at),
            n * ((1 - rate) ** 2 + spread * at),
        )  # fmt: skip
        return sum((w * off) ** 2 / e for w, e in zip((1, 2, 1), expected, strict=True)) - critical

    least, close = -min(rate / (1 - rate), (1 - rate) / rate), 1e-9
    low = brentq(excess, least + close, value) if value > least + 2 * close else least
    high = brentq(excess, value, 1 - close) if value < 1 - 2 * close else 1.0
    return float(value), float(low), float(high)


# The probe


@dataclass(frozen=True)
class Setting:
    """One way to estimate the factors, and the edits that came of it.

    Nothing of it changes when its model's module takes other weights.
    """

    run: str
    step: int
    tokens: int
    bases: Sequence[Basis]
    verdicts: Mapping[tuple[str, float], Bool[np.ndarray, " item"]]


def probe_stability(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    texts: Sequence[str],
    memorized: str = "seen",
    seeds: int = 3,
    shares: Sequence[float] = (0.125, 0.25, 0.5),
    others: Mapping[str, Iterable[LanguageModel]] | None = None,
    edits: Sequence[tuple[str, float]] = (),
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    method: str = "kfac",
    rho: Sequence[float] = (0.98, 0.95, 0.9),
    mass: float = 0.9,
    dimensions: int | None = None,
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Repeat a decomposition and its edits with one thing changed, and say what stayed.

    Compared with the factors of all ``texts`` with the given labels and seed are, by the
    coordinate ``varied``: other seeds of the sampled labels (``seed``), gold labels where sampled
    ones were asked for and the reverse (``labels``), the first part of the texts in random order
    (``tokens``; part of the whole, so it overlaps more than new text would), and the models of
    ``others``. The two ``halves`` of the texts are compared with each other. Two sets of factors
    are held at a time; every model has its own weights again at the end.

    Args:
        items: Items frame; of the group ``memorized`` those that the unedited model recites are
            asked again under each edit.
        texts: For the factors: ordinary text of the kind the model was trained on.
        seeds: How many other seeds of the labels, from ``seed + 1`` on. Gold labels have none.
        shares: Of the texts.
        others: Further models of the same shape, under a name for what they vary, such as
            ``{"checkpoint": suite.checkpoints().select([180, 230])}``. Read one after another,
            after all else: a model that shares its module with them holds the last one's weights.
        edits: Further (method, rho) to compare with the edits of ``method``, in the one basis.
        method: ``kfac``, ``saliency`` or ``ekfac``; ``random`` as a control.
        rho: Shares kept by the edits.
        mass: The leading eigenvectors compared are the fewest that hold this share of a
            factor's eigenvalues, with all texts; as many for every setting.
        dimensions: Compare this many instead, or all there are.
        progress: Show bars: of the settings, and of the factors where they take long.

    Returns:
        Rows of group ``observed`` and ``chance``, with coordinates ``varied``, ``setting``,
        ``tokens`` (of the second setting) and ``block``, ``role``; ``block`` -1 and role ``all``
        pool the layers. Run and step are those of the second setting.

        - ``principal_angle`` and ``subspace_overlap`` (mean squared cosine) of the leading
          eigenspaces of A (``side`` input) and G (output); the sorted angles are read at
          ``place``, 0 for the smallest and 1 for the largest. Pooled: mean over layers, bootstrap
          over them. Chance: random subspaces of ``dimensions``; an angle's is the mean of 20 draws,
          with the range of 95 % of them, and the overlap's is k / n, exactly.
        - ``edit_cosine``, ``edit_shared``, ``edit_difference``, and in one basis
          ``mask_jaccard``, by ``rho``. They are measured whole and have no interval. Pooled: of
          all layers as one vector. Chance: as many components, of a random basis.
        - ``recitation_strict`` of each item and pooled (Wilson interval), and over the items that
          both unedited models recite ``verdict_agreement`` (Wilson; chance as in :func:`kappa`)
          and ``verdict_kappa``.

        Undefined numbers are NaN with a ``reason``. ``.attrs["passport"]`` says from what.

    Raises:
        InputError: No memorized items, or none recited or long enough, fewer than two usable
            texts, unknown labels or methods, shares outside (0, 1), ``rho`` outside (0, 1],
            several models around one module, or models of other shapes.
    """
    grid = _grid(method, rho, edits)
    _refuse_settings(labels, shares, mass, dimensions, others)
    items = check_items(items)
    asked = _asked(items, memorized, texts)
    tokens, kept = cut_items(model, asked, prefix + suffix, asker=ASKER)
    order = np.random.default_rng([seed, len(texts)]).permutation(len(texts))
    texts = [texts[i] for i in order]

    def make(model: LanguageModel, texts: Sequence[str], labels: str, seed: int) -> Setting:
        usable = _usable(model, texts)
        with warnings.catch_warnings():
            # few tokens are what is being looked at
            warnings.filterwarnings("ignore", "collect_factors: .* tokens for factors")
            factors = collect_factors(
                model, usable, roles=roles, blocks=blocks, labels=labels, seed=seed,
                progress=progress,
            )  # fmt: skip
        bases = decompose(factors)
        if "ekfac" in dict(grid):
            bases = correct_masses(model, bases, usable, labels=labels, seed=seed)
        verdicts = _verdicts(model, bases, grid, tokens, prefix)
        return Setting(model.run, model.step, factors.tokens, bases, verdicts)

    def settings() -> Iterator[tuple[str, str, Setting, Setting]]:
        if labels == "sampled":
            for draw in range(1, seeds + 1):
                told = f"labels drawn again, {draw}"
                yield "seed", told, whole, make(model, texts, labels, seed + draw)
        other = LABELS[1 - LABELS.index(labels)]
        yield "labels", f"{other} labels", whole, make(model, texts, other, seed)
        for share in shares:
            part = texts[: max(1, round(share * len(texts)))]
            yield "tokens", f"{share:.3g} of the texts", whole, make(model, part, labels, seed)
        one, two = (make(model, part, labels, seed) for part in (texts[::2], texts[1::2]))
        yield "halves", "one half against the other", one, two
        for varied, models in (others or {}).items():
            for each in models:
                told = f"{each.run}, step {each.step}"
                yield varied, told, whole, make(each, texts, labels, seed)

    whole = make(model, texts, labels, seed)
    if not whole.verdicts["none", 1.0].any():
        raise InputError(
            f"{ASKER}: the unedited model recites none of {len(kept)} items of group "
            f"{memorized!r}, so no edit can stop it; give items that it recites"
        )
    passport = model.passport()
    sizes = [leading(v, share=mass, dimensions=dimensions) for _, v, _ in _spaces(whole)]
    parts = [_chance_rows(whole, sizes, seed)]
    parts += [_edit_rows(whole, whole, "edit", f"same factors, {m} at {r:g}", (method, s), (m, r))
              for m, r in edits for s in rho]  # fmt: skip
    parts.append(_verdict_rows(whole, kept, "none", "reference"))
    compared = [(method, share) for share in rho]
    with tqdm(desc="settings", unit="setting", disable=not progress, leave=False) as bar:
        for varied, told, first, second in settings():
            _refuse_other_layers(first, second)
            parts.append(_angle_rows(first, second, varied, told, sizes, seed))
            for edit in compared:
                parts.append(_edit_rows(first, second, varied, told, edit, edit))
                parts.append(_agreement_rows(first, second, varied, told, edit))
            parts.append(_verdict_rows(second, kept, varied, told))
            bar.update()
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {
        "dropped": kept.attrs["dropped"],
        "passport": {
            **passport,
            "items": items_hash(items),
            "factor_tokens": whole.tokens,
            "layers": [basis.layer.name for basis in whole.bases],
            "labels": labels,
            "seed": seed,
        },
    }
    return table


def _asked(items: pd.DataFrame, memorized: str, texts: Sequence[str]) -> pd.DataFrame:
    asked = items[items["group"] == memorized]
    if asked.empty:
        raise InputError(
            f"{ASKER}: no items of group {memorized!r}; there are groups "
            f"{', '.join(sorted(map(str, items['group'].unique())))}"
        )
    if len(texts) < 2:
        raise InputError(
            f"{ASKER}: got {len(texts)} texts, needs at least two, which are compared with each other"
        )
    return asked


def _usable(model: LanguageModel, texts: Sequence[str]) -> list[Int[np.ndarray, " pos"]]:
    encoded = [each[: model.context] for each in model.encode(list(texts))]
    usable = [each for each in encoded if len(each) >= 2]
    if not usable:
        raise InputError(f"{ASKER}: none of {len(texts)} texts has two tokens; give more text")
    return usable


def _verdicts(model, bases, grid, tokens, prefix: int) -> dict[tuple[str, float], np.ndarray]:
    verdicts = {("none", 1.0): recited(model, tokens, prefix)}
    for name, share in grid:
        with edited(bases, method=name, rho=share):
            verdicts[name, share] = recited(model, tokens, prefix)
    return verdicts


def recited(
    model: LanguageModel, tokens: Int[np.ndarray, "item pos"], prefix: int
) -> Bool[np.ndarray, " item"]:
    """Whether greedy decoding from the prefix gives the rest; one pass decides it."""
    return (model.score(tokens, start=prefix, keep=("guess",)).guess == tokens[:, prefix:]).all(1)


def _grid(method: str, rho: Sequence[float], edits) -> list[tuple[str, float]]:
    if not len(rho):
        raise InputError(f"{ASKER}: rho holds no shares, needs at least one")
    grid = [(method, float(share)) for share in rho] + [(m, float(r)) for m, r in edits]
    for name, share in grid:
        if name not in MASKED:  # svd and magnitude know nothing of the factors
            raise InputError(
                f"{ASKER}: method {name!r} does not come from the factors; choose from "
                f"{', '.join(MASKED)}"
            )
        refuse_share(share, ASKER)
    return grid


def _refuse_settings(labels, shares, mass, dimensions, others) -> None:
    if labels not in LABELS:
        raise InputError(f"{ASKER}: labels {labels!r}; choose from {', '.join(LABELS)}")
    for name, share in [("shares holds", each) for each in shares] + [("mass is", mass)]:
        if not 0 < share < 1:
            raise InputError(f"{ASKER}: {name} {share}, needs a share above 0 and below 1")
    if dimensions is not None and dimensions < 1:
        raise InputError(f"{ASKER}: dimensions is {dimensions}, needs at least 1")
    for varied, models in (others or {}).items():
        if isinstance(models, Sequence) and len({id(m.module) for m in models}) < len(models):
            raise InputError(
                f"{ASKER}: models under {varied!r} share one module, which holds the weights of "
                "the last one read; give the checkpoints themselves, as checkpoints.select(steps)"
            )


def _refuse_other_layers(first: Setting, second: Setting) -> None:
    one, two = (
        [(b.layer.name, tuple(b.coefficients.shape)) for b in each.bases]
        for each in (first, second)
    )
    if one != two:
        raise InputError(
            f"{ASKER}: {second.run} at step {second.step} has other layers than {first.run}: "
            f"{len(two)} of them, first {two[0]}, against {len(one)}, first {one[0]}; "
            "give models of one shape"
        )


def _spaces(setting: Setting) -> Iterator[tuple[dict, np.ndarray, torch.Tensor]]:
    """Coordinates, eigenvalues and eigenvectors of each factor; a shared A once."""
    shared: dict[int, list[Basis]] = {}
    for basis in setting.bases:
        shared.setdefault(id(basis.input_vectors), []).append(basis)
    for group in shared.values():
        role = ", ".join(basis.layer.role for basis in group)
        where = {"block": group[0].layer.block, "role": role, "side": "input"}
        yield where, group[0].input_values, group[0].input_vectors
    for basis in setting.bases:
        where = {"block": basis.layer.block, "role": basis.layer.role, "side": "output"}
        yield where, basis.output_values, basis.output_vectors


def _at_places(angles: Float[np.ndarray, "*draw angle"]) -> Float[np.ndarray, "*draw place"]:
    """The sorted angles at :data:`PLACES`, so that subspaces of different sizes can be pooled."""
    return angles[..., np.rint(PLACES * (angles.shape[-1] - 1)).astype(int)]


def _angle_rows(first, second, varied, told, sizes: Sequence[int], seed) -> pd.DataFrame:
    found: dict[str, list] = {}
    parts = []
    named = {"run": second.run, "step": second.step, "group": "observed"}
    beside = {"varied": varied, "setting": told, "tokens": second.tokens}
    for k, (where, _, vectors), (_, _, others) in zip(
        sizes, _spaces(first), _spaces(second), strict=True
    ):
        angles = principal_angles(vectors[:, :k], others[:, :k])
        share = float(np.mean(np.cos(np.radians(angles)) ** 2))
        at = beside | where | {"dimensions": k}
        read = _at_places(angles)
        parts.append(rows("principal_angle", read, **named, beside=at | {"place": PLACES}))
        parts.append(rows("subspace_overlap", share, **named, beside=at))
        found.setdefault(where["side"], []).append((read, share))
    for side, each in found.items():
        at = beside | {"block": -1, "role": "all", "side": side}
        parts += _pooled(each, named, at, seed)
    return pd.concat(parts, ignore_index=True)


def _pooled(found: list[tuple], named: dict, beside: dict, seed: int) -> list[pd.DataFrame]:
    """Mean over layers, and its interval by bootstrap over them."""
    parts = []
    read, share = np.stack([a for a, _ in found]), np.array([s for _, s in found])
    n = len(found)
    draws = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    for metric, values, at in (
        ("principal_angle", read, {"place": PLACES}), ("subspace_overlap", share[:, None], {}),
    ):  # fmt: skip
        mean = values.mean(axis=0)
        low, high = np.quantile(draws @ values, tails, axis=0)
        bounds = {"lo": np.minimum(low, mean), "hi": np.maximum(high, mean), "n": n}
        parts.append(rows(metric, mean, **named, **bounds, beside=beside | at))
    return parts


def _chance_rows(whole: Setting, sizes: Sequence[int], seed: int) -> pd.DataFrame:
    """Random subspaces of the sizes compared; the same for all settings."""
    found: dict[str, list] = {}
    parts, known = [], {}
    named = {"run": whole.run, "step": whole.step, "group": "chance"}
    beside = {"varied": "none", "setting": "random subspaces"}
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    for k, (where, _, vectors) in zip(sizes, _spaces(whole), strict=True):
        n = len(vectors)
        if (n, k) not in known:
            known[n, k] = _at_places(random_angles(n, k, draws=RANDOM, seed=seed))
        drawn = known[n, k]
        at = beside | where | {"dimensions": k}
        low, high = np.quantile(drawn, tails, axis=0)
        mean = np.clip(drawn.mean(axis=0), low, high)
        bounds = {"lo": low, "hi": high, "n": RANDOM}
        parts.append(
            rows("principal_angle", mean, **named, **bounds, beside=at | {"place": PLACES})
        )
        parts.append(rows("subspace_overlap", k / n, **named, beside=at))
        found.setdefault(where["side"], []).append((mean, k / n))
    for side, each in found.items():
        parts += _pooled(each, named, beside | {"block": -1, "role": "all", "side": side}, seed)
    return pd.concat(parts, ignore_index=True)


def _edit_rows(first, second, varied, told, edit, other) -> pd.DataFrame:
    """Overlap of one edit of the first setting with one of the second, by layer and pooled."""
    pieces = []
    for one, two in zip(first.bases, second.bases, strict=True):
        keep, keep_other = (
            component_mask(basis, method=m, rho=r) for basis, (m, r) in ((one, edit), (two, other))
        )
        pieces.append((one.layer.block, one.layer.role, overlap(one, keep, two, keep_other)))
    total = pieces[0][2]
    for _, _, each in pieces[1:]:
        total = total + each
    pieces.append((-1, "all", total))
    parts = []
    blocks, roles = [block for block, _, _ in pieces], [role for _, role, _ in pieces]
    beside = {"varied": varied, "setting": told, "tokens": second.tokens,
              "method": edit[0], "rho": edit[1], "block": blocks, "role": roles}  # fmt: skip
    measured = [each.measures() for _, _, each in pieces]
    for metric in measured[0]:
        values = np.stack([each[metric] for each in measured])
        if metric == "mask_jaccard" and np.isnan(values).all():
            continue  # in different bases masks say nothing
        counts = len(pieces) - 1
        n = [1] * counts + [counts]
        for group, column in (("observed", values[:, 0]), ("chance", values[:, 1])):
            reason = np.where(np.isnan(column), "an edit removes or leaves nothing", None)
            parts.append(
                rows(metric, column, run=second.run, step=second.step, group=group, n=n,
                     beside=beside | {"reason": reason})
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _agreement_rows(first, second, varied, told, edit) -> pd.DataFrame:
    asked = first.verdicts["none", 1.0] & second.verdicts["none", 1.0]
    one, two = first.verdicts[edit][asked], second.verdicts[edit][asked]
    n = int(asked.sum())
    beside = {"varied": varied, "setting": told, "tokens": second.tokens,
              "method": edit[0], "rho": edit[1]}  # fmt: skip
    named = {"run": second.run, "step": second.step, "n": n}
    if not n:
        none = beside | {"reason": "no item is recited by both unedited models"}
        parts = [
            rows(metric, np.nan, **named, group="observed", beside=none)
            for metric in ("verdict_agreement", "verdict_kappa")
        ]
        return pd.concat(parts, ignore_index=True)
    agreed, rate = int((one == two).sum()), (one.sum() + two.sum()) / (2 * n)
    low, high = _wilson(agreed, n)
    value, least, most = kappa(one, two)
    reason = "all items have one verdict" if np.isnan(value) else None
    parts = [
        rows("verdict_agreement", agreed / n, **named, lo=low, hi=high, group="observed",
             beside=beside),
        rows("verdict_agreement", rate**2 + (1 - rate) ** 2, **named, group="chance",
             beside=beside),
        rows("verdict_kappa", value, **named, lo=least, hi=most, group="observed",
             beside=beside | {"reason": reason}),
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _verdict_rows(setting: Setting, kept: pd.DataFrame, varied: str, told: str) -> pd.DataFrame:
    parts = []
    for (method, share), verdicts in setting.verdicts.items():
        beside = {"varied": varied, "setting": told, "tokens": setting.tokens,
                  "method": method, "rho": share}  # fmt: skip
        named = {"run": setting.run, "step": setting.step, "beside": beside}
        low, high = _wilson(int(verdicts.sum()), len(verdicts))
        pooled = {"lo": low, "hi": high, "n": len(verdicts), "group": str(kept["group"].iloc[0])}
        parts.append(
            rows("recitation_strict", verdicts, group=kept["group"], item=kept["item"], **named)
        )
        parts.append(rows("recitation_strict", verdicts.mean(), **pooled, **named))
    return pd.concat(parts, ignore_index=True)


def _wilson(hits: int, n: int) -> tuple[float, float]:
    interval = binomtest(hits, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
