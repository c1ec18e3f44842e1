"""The causal profile against three packages for Callaway & Sant'Anna's estimator, where installed.

Where they differ by convention:

- Panels with holes. csdid takes them for repeated cross-sections: each mean over whoever was seen
  then, so that the items' levels enter. So does differences unless told not to; then it takes the
  items seen at both checkpoints of a cell, as we do and as the definition, a mean of changes, says.
- Clusters. csdid sums influences within a cluster, as we do. moderndid's analytic errors leave
  clusters out without a word, and its bootstrap averages within them, which is another number where
  their sizes differ. differences 0.3 does not take a cluster column under pandas 3.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pandas as pd
import pytest

from workbench.stats.profile import memorization_profile

pytestmark = pytest.mark.filterwarnings("ignore")
DESIGNS = [(c, b) for c in ("never", "not_yet") for b in ("varying", "universal")]
AGGREGATES = ("lag", "cohort", "step", "overall")


def staggered_panel(*, holes: float = 0.0, clusters: str = "nested") -> pd.DataFrame:
    """160 items, 7 checkpoints, cohorts 3, 4, 6 and never (missing), clusters that move together."""
    rng = np.random.default_rng(0)
    items, steps = 160, np.arange(1, 8)
    cohort = rng.choice([np.nan, 3, 4, 6], items, p=[0.4, 0.2, 0.25, 0.15])
    cluster = rng.integers(0, 12, items)
    if clusters == "nested":
        cluster = cluster + 100 * np.nan_to_num(cohort).astype(int)
    shared = rng.normal(size=(1000, 7)).cumsum(axis=1)
    value = rng.normal(size=(items, 8)).cumsum(axis=1)[:, 1:] + shared[cluster]
    value = value + 0.5 * (steps >= cohort[:, None])
    table = pd.DataFrame(
        {
            "item": np.repeat(np.arange(items), 7),
            "step": np.tile(steps, items),
            "value": value.ravel(),
            "cohort": np.repeat(cohort, 7),
            "cluster": np.repeat(cluster, 7),
        }
    )
    return table[rng.random(len(table)) >= holes].reset_index(drop=True)


def estimates_of_differences(table: pd.DataFrame, control: str, base: str) -> dict:
    differences = pytest.importorskip("differences")
    named = table.rename(columns={"item": "entity", "step": "time"})
    data = named.set_index(["entity", "time"])[["value", "cohort"]]
    peer = differences.ATTgt(data, "cohort", base_period=base)
    cells = peer.fit(
        "value",
        control_group=f"{control}_treated",
        as_repeated_cross_section=False,
        progress_bar=False,
    )
    names = {"lag": "event", "cohort": "cohort", "step": "time", "overall": "simple"}
    found = {by: peer.aggregate(theirs) for by, theirs in names.items()}
    found["cell"] = cells.to_pandas()
    return {by: each.to_numpy()[:, :2].astype(float) for by, each in found.items()}


def estimates_of_csdid(
    table: pd.DataFrame, control: str, base: str, cluster: str | None = None
) -> dict:
    csdid = pytest.importorskip("csdid.att_gt")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = csdid.ATTgt(
            yname="value",
            tname="step",
            idname="item",
            gname="cohort",
            data=table.fillna({"cohort": 0}),
            control_group=["nevertreated" if control == "never" else "notyettreated"],
            clustervar=cluster,
        ).fit(est_method="reg", base_period=base, bstrap=False)
        found = {"cell": (peer.results["att"], peer.results["se"])}
        for by, theirs in (("lag", "dynamic"), ("cohort", "group"), ("step", "calendar")):
            peer.aggte(theirs)
            found[by] = (peer.atte["att_egt"], peer.atte["se_egt"])
        peer.aggte("simple")
        found["overall"] = (peer.atte["overall_att"], peer.atte["overall_se"])
    return {by: np.column_stack([np.ravel(v) for v in pair]) for by, pair in found.items()}


def estimates_of_moderndid(table: pd.DataFrame, control: str, base: str) -> dict:
    moderndid = pytest.importorskip("moderndid")
    peer = moderndid.att_gt(
        data=table.fillna({"cohort": 0}),
        yname="value",
        tname="step",
        idname="item",
        gname="cohort",
        est_method="reg",
        cband=False,
        control_group="nevertreated" if control == "never" else "notyettreated",
        base_period=base,
    )
    found = {"cell": (peer.att_gt, peer.se_gt)}
    for by, theirs in (("lag", "dynamic"), ("cohort", "group"), ("step", "calendar")):
        means = moderndid.aggte(peer, type=theirs)
        found[by] = (means.att_by_event, means.se_by_event)
    overall = moderndid.aggte(peer, type="simple")
    found["overall"] = ([overall.overall_att], [overall.overall_se])
    return {by: np.column_stack(pair) for by, pair in found.items()}


PEERS = {
    "differences": estimates_of_differences,
    "csdid": estimates_of_csdid,
    "moderndid": estimates_of_moderndid,
}


def same(table: pd.DataFrame, found: dict, control: str, base: str, cluster: str | None = None):
    for by in ("cell", *AGGREGATES):
        got = memorization_profile(
            table, by=by, control=control, base=base, cluster=cluster, simultaneous=False
        )
        got = got.sort_values({"cell": ["cohort", "step"], "overall": "step"}.get(by, by))
        want = found[by].astype(float)
        # with a universal base they list the cell t = b, 0 without an error
        want = want[~((want[:, 0] == 0) & ~(want[:, 1] > 0))]
        np.testing.assert_allclose(got[["value", "se"]], want, rtol=0, atol=1e-8, err_msg=by)


@pytest.mark.parametrize(("control", "base"), DESIGNS)
@pytest.mark.parametrize("peer", PEERS)
def test_full_panels(peer, control, base):
    table = staggered_panel()
    same(table, PEERS[peer](table, control, base), control, base)


@pytest.mark.parametrize(("control", "base"), DESIGNS)
def test_panels_with_holes(control, base):
    table = staggered_panel(holes=0.1)
    same(table, estimates_of_differences(table, control, base), control, base)


@pytest.mark.parametrize(("control", "base"), DESIGNS)
@pytest.mark.parametrize("clusters", ["nested", "crossing"])
def test_clusters(clusters, control, base):
    table = staggered_panel(clusters=clusters)
    found = estimates_of_csdid(table, control, base, "cluster")
    same(table, found, control, base, "cluster")


def test_moderndid_leaves_clusters_out_of_its_analytic_errors():
    moderndid = pytest.importorskip("moderndid")
    table = staggered_panel()
    errors = [
        moderndid.att_gt(
            data=table.fillna({"cohort": 0}),
            yname="value",
            tname="step",
            idname="item",
            gname="cohort",
            est_method="reg",
            cband=False,
            clustervars=clusters,
        ).se_gt
        for clusters in (None, ["cluster"])
    ]
    np.testing.assert_array_equal(*errors)
