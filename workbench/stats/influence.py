"""What each item does to each estimate of a causal profile, and the errors and bands that gives.

Every estimate, a cell or an aggregate of cells, is one linear contrast of the groups' mean curves.
So one covariance over steps and one product of bootstrap draws per group serve all of them, and
no array of items x cells is ever made (:class:`Contrasts`). With holes in the panel the contrasts
differ from item to item, and influences are made in chunks of items instead (:class:`Chunks`).

Items of one cluster have their influences summed before squaring, and share their draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import sparse, stats

from workbench.stats.cells import CHUNK, Aggregate, Cells, Means, changes, firsts
from workbench.stats.panel import Panel

IQR_OF_NORMAL = 1.34898  # interquartile range of a standard normal
BLOCK = 256  # rows of the result, or items, that are perturbed at a time
NO_SPREAD = 1e-12  # of the largest outcome: below it a spread is rounding
# the eight signs that each byte of random bits stands for
SIGNS = 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) - 1


@dataclass(frozen=True)
class Estimates:
    """A panel's estimates, whose uncertainty is asked for."""

    panel: Panel
    cells: Cells
    means: Means
    aggregate: Aggregate


class Contrasts(Estimates):
    """Panels without holes: item i of group j moves row r by ``contrast[r, j] @ [Y_i - mean_j, 1]``.

    The last entry of a contrast holds how far group j lies from its cell's pooled controls, and the
    estimation of the shares.
    """

    @cached_property
    def width(self) -> int:
        return len(self.panel.steps) + 1

    @cached_property
    def contrast(self) -> sparse.csr_array:
        """[row, group x (step and 1)]"""
        panel, cells, means = self.panel, self.cells, self.means
        curves = np.stack(
            [panel.members(j).mean(axis=0, dtype=float) for j in range(len(panel.cohorts))]
        )
        small = np.int32  # not_yet makes a hundred thousand entries and more
        cell = np.arange(len(cells.group), dtype=small)
        group, of = (index.astype(small) for index in np.nonzero(cells.controls))
        distance = curves[group, cells.step[of]] - curves[group, cells.base[of]] - means.control[of]
        distance[cells.controls.sum(axis=0)[of] == 1] = 0.0  # nothing is pooled
        own, other = cells.group.astype(small) * self.width, group * self.width
        step, base = cells.step.astype(small), cells.base.astype(small)
        entries = [
            (cell, own + step, 1 / means.treated_n),
            (cell, own + base, -1 / means.treated_n),
            (of, other + step[of], -1 / means.control_n[of]),
            (of, other + base[of], 1 / means.control_n[of]),
            (of, other + self.width - 1, -distance / means.control_n[of]),
        ]
        shape = (len(cell), len(panel.cohorts) * self.width)
        row, column, weight = (np.concatenate(part) for part in zip(*entries, strict=True))
        contrast = self.aggregate.weight @ sparse.csr_array((weight, (row, column)), shape)
        row, group = np.nonzero(self.aggregate.share_term)
        shares = self.aggregate.share_term[row, group], (row, (group + 1) * self.width - 1)
        contrast = contrast + sparse.csr_array(shares, contrast.shape)
        contrast.eliminate_zeros()
        return contrast

    def by_group(self) -> list[sparse.csr_array]:
        columns = self.contrast.tocsc()
        groups = range(len(self.panel.cohorts))
        return [columns[:, j * self.width : (j + 1) * self.width].tocsr() for j in groups]

    def pieces(
        self, group: int
    ) -> Iterator[tuple[Float[np.ndarray, "cluster step_and_1"], Int[np.ndarray, " cluster"]]]:
        """``[Y_i - mean_j, 1]`` summed over the items of each cluster, a chunk at a time."""
        members, number = self.panel.members(group), self.panel.numbers(group)
        # contrasts sum to zero over steps, so an item's level is taken out before rounding costs
        level = members.mean(axis=1, dtype=float, keepdims=True)
        curve = members.mean(axis=0, dtype=float) - level.mean()
        for chunk in self.panel.chunks(group, CHUNK // self.width):
            part = np.ones((chunk.stop - chunk.start, self.width))
            np.subtract(members[chunk], level[chunk], out=part[:, :-1])
            part[:, :-1] -= curve
            if self.panel.cluster is None:
                yield part, number[chunk]
            else:
                first = firsts(number[chunk])
                yield np.add.reduceat(part, first), number[chunk][first]

    def moments(self) -> Iterator[Float[np.ndarray, "step_and_1 step_and_1"]]:
        """Of each group's pieces, the sum of outer products."""
        for j in range(len(self.panel.cohorts)):
            yield sum(part.T @ part for part, _ in self.pieces(j))

    def shared(self) -> Iterator[tuple[int, int, Float[np.ndarray, "step_and_1 step_and_1"]]]:
        """Of two groups that share clusters, the sum of outer products over those."""
        if not self.panel.crossed:
            return
        held = []
        for j in range(len(self.panel.cohorts)):
            parts, numbers = zip(*self.pieces(j), strict=True)
            held.append((np.concatenate(parts), np.concatenate(numbers)))
        for j, (mine, number) in enumerate(held):
            for k, (theirs, other) in enumerate(held[:j]):
                _, a, b = np.intersect1d(number, other, assume_unique=True, return_indices=True)
                if len(a):
                    yield j, k, mine[a].T @ theirs[b]

    def variance(self) -> Float[np.ndarray, "row group"]:
        """Squared standard error of each row, by the cohort that it comes from.

        Where clusters cross cohorts, only the sum over cohorts has a meaning.
        """
        total = np.zeros((len(self.aggregate.label), len(self.panel.cohorts)))
        contrast = self.by_group()
        for j, moment in enumerate(self.moments()):
            total[:, j] = self._form(contrast[j], moment, contrast[j])
        for j, k, moment in self.shared():
            total[:, j] += 2 * self._form(contrast[j], moment, contrast[k])
        return total

    def _form(
        self, left: sparse.csr_array, moment: np.ndarray, right: sparse.csr_array
    ) -> Float[np.ndarray, " row"]:
        """Row by row ``left[r] @ moment @ right[r]``."""
        total = np.zeros(left.shape[0])
        touched = np.flatnonzero((np.diff(left.indptr) > 0) & (np.diff(right.indptr) > 0))
        size = max(1, CHUNK // self.width)
        for start in range(0, len(touched), size):
            at = touched[start : start + size]
            total[at] = right[at].multiply(left[at] @ moment).sum(axis=1)
        return total

    def covariance(self) -> Float[np.ndarray, "row row"]:
        """Of the rows' estimates: the sum of outer products of influences."""
        size = len(self.aggregate.label)
        total = np.zeros((size, size))

        def add(left: sparse.csr_array, moment: np.ndarray, right: sparse.csr_array) -> None:
            a, b = (np.flatnonzero(np.diff(side.indptr)) for side in (left, right))
            total[np.ix_(a, b)] += (left[a] @ moment) @ right[b].T

        contrast = self.by_group()
        for j, moment in enumerate(self.moments()):
            add(contrast[j], moment, contrast[j])
        for j, k, moment in self.shared():
            add(contrast[j], moment, contrast[k])
            add(contrast[k], moment.T, contrast[j])
        return total

    def perturbed(self, draws: int, seed: int) -> Iterator[Float[np.ndarray, "row draw"]]:
        """Estimates' errors under Rademacher multipliers, a block of rows at a time."""
        bits = random_bits(self.panel, draws, seed)
        # single precision: a band's width is known to no more than three digits anyway
        moved = np.zeros((self.contrast.shape[1], draws), dtype=np.float32)
        for j in range(len(self.panel.cohorts)):
            own = moved[j * self.width : (j + 1) * self.width]
            for part, number in self.pieces(j):
                add_perturbed(own, part, number, bits)
        for start in range(0, self.contrast.shape[0], BLOCK):
            yield self.contrast[start : start + BLOCK].astype(np.float32) @ moved


@dataclass(frozen=True)
class Reach:
    """The cells a group takes part in, the rows those make, and with which weights."""

    at: Int[np.ndarray, " cell"]
    mean: Float[np.ndarray, " cell"]  # change since the base of the group's side
    rows: Int[np.ndarray, " touched"]
    weight: sparse.csr_array  # [cell, touched]
    share_term: Float[np.ndarray, " touched"]


class Chunks(Estimates):
    """Panels with holes: each item's influence on the rows it touches, a chunk of items at a time."""

    @cached_property
    def reach(self) -> list[Reach]:
        cells, means, found = self.cells, self.means, []
        for j in range(len(self.panel.cohorts)):
            own = cells.group == j
            at = np.flatnonzero(own | cells.controls[j])
            own = own[at]
            count = np.where(own, means.treated_n[at], means.control_n[at])
            scale = np.where(own, 1.0, -1.0) / np.maximum(count, 1)
            weight = self.aggregate.weight[:, at]
            share_term = self.aggregate.share_term[:, j]
            touched = np.flatnonzero((np.diff(weight.indptr) > 0) | (share_term != 0))
            weight = sparse.csr_array(weight[touched].T).multiply(scale[:, None]).tocsr()
            mean = np.where(own, means.treated[at], means.control[at])
            found.append(Reach(at, mean, touched, weight, share_term[touched]))
        return found

    def pieces(
        self, group: int, chunks: list[slice] | None = None
    ) -> Iterator[tuple[Float[np.ndarray, "cluster touched"], Int[np.ndarray, " cluster"]]]:
        """Influence on the rows a group touches, summed over the items of each cluster."""
        reach, number = self.reach[group], self.panel.numbers(group)
        widest = max(len(reach.at), len(reach.rows), 1)
        for chunk in chunks or self.panel.chunks(group, CHUNK // widest):
            change = changes(self.panel, self.cells, group, reach.at, chunk) - reach.mean
            change[np.isnan(change)] = 0.0
            influence = change @ reach.weight + reach.share_term
            first = firsts(number[chunk])
            if len(first) < len(influence):
                influence = np.add.reduceat(influence, first)
            yield influence, number[chunk][first]

    def whole(
        self,
    ) -> Iterator[tuple[int, Int[np.ndarray, " touched"], Float[np.ndarray, "cluster touched"]]]:
        """A cohort, the rows its clusters touch, and their influence, each cluster once."""
        groups = range(len(self.panel.cohorts))
        if not self.panel.crossed:
            for j in groups:
                for influence, _ in self.pieces(j):
                    yield j, self.reach[j].rows, influence
            return
        width, clusters = len(self.aggregate.label), int(self.panel.cluster.max()) + 1
        size = max(1, CHUNK // width)
        for start in range(0, clusters, size):
            total = np.zeros((min(size, clusters - start), width))
            for j in groups:
                ends = np.searchsorted(self.panel.numbers(j), [start, start + size])
                if ends[0] < ends[1]:
                    influence, number = next(self.pieces(j, [slice(*ends)]))
                    total[np.ix_(number - start, self.reach[j].rows)] += influence
            yield 0, np.arange(width), total

    def variance(self) -> Float[np.ndarray, "row group"]:
        """See :meth:`Contrasts.variance`."""
        total = np.zeros((len(self.aggregate.label), len(self.panel.cohorts)))
        for j, touched, influence in self.whole():
            total[touched, j] += np.square(influence).sum(axis=0)
        return total

    def covariance(self) -> Float[np.ndarray, "row row"]:
        """See :meth:`Contrasts.covariance`."""
        size = len(self.aggregate.label)
        total = np.zeros((size, size))
        for _, touched, influence in self.whole():
            total[np.ix_(touched, touched)] += influence.T @ influence
        return total

    def perturbed(self, draws: int, seed: int) -> Iterator[Float[np.ndarray, "row draw"]]:
        """See :meth:`Contrasts.perturbed`."""
        bits = random_bits(self.panel, draws, seed)
        total = np.zeros((len(self.aggregate.label), draws), dtype=np.float32)
        for j, reach in enumerate(self.reach):
            every = len(reach.rows) == len(total)
            own = total if every else np.zeros((len(reach.rows), draws), dtype=np.float32)
            for influence, number in self.pieces(j):
                add_perturbed(own, influence, number, bits)
            if not every:
                total[reach.rows] += own
        for start in range(0, len(total), BLOCK):
            yield total[start : start + BLOCK]


def estimates(panel: Panel, cells: Cells, means: Means, aggregate: Aggregate) -> Contrasts | Chunks:
    """What each cluster adds to each estimate; in chunks where items have holes."""
    return (Chunks if panel.holes else Contrasts)(panel, cells, means, aggregate)


# --- the multiplier bootstrap ---------------------------------------------------------------------


def random_bits(panel: Panel, draws: int, seed: int) -> UInt8[np.ndarray, "cluster eighth"]:
    """A fair coin for each cluster and draw, eight to a byte."""
    clusters = len(panel.outcome) if panel.cluster is None else int(panel.cluster.max()) + 1
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (clusters, -(-draws // 8)), dtype=np.uint8)


def add_perturbed(
    total: Float[np.ndarray, "column draw"],
    part: Float[np.ndarray, "cluster column"],
    number: Int[np.ndarray, " cluster"],
    bits: UInt8[np.ndarray, "cluster eighth"],
) -> None:
    """Add ``part.T @ signs`` of the clusters' Rademacher signs, a block of clusters at a time."""
    part = part.astype(np.float32)
    for start in range(0, len(part), BLOCK):
        block = slice(start, start + BLOCK)
        signs = SIGNS.take(bits[number[block]], axis=0).reshape(len(part[block]), -1)
        total += part[block].T @ signs[:, : total.shape[1]]


def bootstrap(
    spread: Contrasts | Chunks,
    se: Float[np.ndarray, " row"],
    *,
    draws: int,
    seed: int,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " draw"]]:
    """Standard error of each row, and in each draw the largest standardised error of all rows.

    The error is the draws' interquartile range over 1.34898, which outlying draws do not move.

    Rows without an analytic error ``se`` are left out; it stands in where the quartiles coincide,
    as with two or three items.
    """
    sigma, largest, start = np.full(len(se), np.nan), np.zeros(draws), 0
    for block in spread.perturbed(draws, seed):
        at = start + np.flatnonzero(np.isfinite(se[start : start + len(block)]))
        block, start = block[at - start], start + len(block)
        if not len(block):
            continue
        low, high = np.quantile(block, [0.25, 0.75], axis=1)
        width = (high - low) / IQR_OF_NORMAL
        sigma[at] = width = np.where(width > 0, width, se[at])
        np.maximum(largest, np.abs(block / width[:, None]).max(axis=0), out=largest)
    return sigma, largest


# --- errors ---------------------------------------------------------------------------------------


def errors_and_reasons(
    spread: Contrasts | Chunks, variance: Float[np.ndarray, "row group"]
) -> tuple[Float[np.ndarray, " row"], np.ndarray]:
    """Standard error of each row, and why it is NaN where it is."""
    weight, means, panel = spread.aggregate.weight, spread.means, spread.panel
    se = np.sqrt(np.maximum(variance.sum(axis=1), 0.0))
    used = (weight != 0).astype(float)
    reason = np.full(len(se), "", dtype=object)
    # the extremes, not abs(), which would copy the panel
    largest = max(abs(float(np.nanmax(panel.outcome))), abs(float(np.nanmin(panel.outcome))))
    reason[se <= NO_SPREAD * largest] = "no spread: every item moved alike"
    unit = "item" if panel.cluster is None else "cluster"
    sides = (
        (means.control_n, means.control_units, "controls"),
        (means.treated_n, means.treated_units, "a cohort"),
    )
    for count, units, side in sides:
        reason[used @ (units == 1).astype(float) > 0] = f"no error: one {unit} in {side}"
        reason[used @ (count == 0).astype(float) > 0] = f"no estimate: no item left in {side}"
    return np.where(reason == "", se, np.nan), reason


def few_items(
    spread: Contrasts | Chunks, variance: Float[np.ndarray, "row group"], *, far: bool
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """What few items make of a row's error (a factor), and its degrees of freedom (Welch).

    Each treated cohort is one sample and its controls together another: with a variance ``v / n``
    each, ``n - 1`` in place of ``n`` makes it unbiased, and Welch-Satterthwaite's degrees of freedom
    are ``(sum v/n)^2 / sum (v/n)^2 / (n - 1)``. A row over several cells takes the fewest items.

    Args:
        far: The far tails are asked for, where these degrees of freedom, themselves estimated, are
            too many. Rows of one cohort then take the smaller sample's ``n - 1``, which never are.
    """
    means, cells = spread.means, spread.cells
    row, cell = spread.aggregate.weight.nonzero()
    size = np.full(variance.shape, np.inf)
    np.minimum.at(size, (row, cells.group[cell]), means.treated_units[cell])
    controls = np.full(len(variance), np.inf)
    np.minimum.at(controls, row, means.control_units[cell])
    treated = np.isfinite(size)
    parts = np.column_stack([np.where(treated, variance, 0.0), (variance * ~treated).sum(axis=1)])
    size = np.column_stack([np.where(treated, size, 2.0), controls])  # 2: any, their part is 0
    with np.errstate(divide="ignore", invalid="ignore"):
        unbiased = parts * size / (size - 1)
        total = unbiased.sum(axis=1)
        freedom = total**2 / (unbiased**2 / (size - 1)).sum(axis=1)
        if far:
            fewest = np.where(parts > 0, size, np.inf).min(axis=1)
            freedom = np.where(treated.sum(axis=1) == 1, fewest - 1, freedom)
        return np.sqrt(total / parts.sum(axis=1)), freedom


def wald_statistic(
    effect: Float[np.ndarray, " cell"], covariance: Float[np.ndarray, "cell cell"]
) -> tuple[float, int]:
    """Wald statistic and its degrees of freedom, the rank of the covariance."""
    scale = np.sqrt(np.diag(covariance))  # correlations, so that the rank ignores units
    eigenvalue, vector = np.linalg.eigh(covariance / np.outer(scale, scale))
    keep = eigenvalue > eigenvalue[-1] * len(eigenvalue) * np.finfo(float).eps * 10
    along = vector[:, keep].T @ (effect / scale)
    return float((along**2 / eigenvalue[keep]).sum()), int(keep.sum())


def critical_values(
    normal: float, freedom: Float[np.ndarray, " row"] | None
) -> Float[np.ndarray, " row"] | float:
    """Multiples of the errors whose tails hold as much as a normal beyond ``normal``."""
    return normal if freedom is None else stats.t.isf(stats.norm.sf(normal), freedom)
