"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from workbench.plots.capacity import plot_bits_per_parameter, plot_capacity
from workbench.plots.curvature import plot_band_ratio, plot_edit_sweep, plot_spectrum
from workbench.plots.curves import plot_curve, plot_groups, plot_truth
from workbench.plots.dose import plot_dose
from workbench.plots.extraction import plot_discoverable, plot_scan
from workbench.plots.forgetting import plot_forgetting, plot_laws
from workbench.plots.items import plot_life_lines, plot_two_clocks
from workbench.plots.membership import plot_auc, plot_roc
from workbench.plots.prediction import plot_exposure, plot_prediction
from workbench.plots.profile import plot_event_study, plot_profile
from workbench.plots.retention import plot_recall, plot_recognition, plot_retention
from workbench.plots.truth import plot_coverage

__all__ = [
    "plot_auc",
    "plot_band_ratio",
    "plot_bits_per_parameter",
    "plot_capacity",
    "plot_coverage",
    "plot_curve",
    "plot_discoverable",
    "plot_dose",
    "plot_edit_sweep",
    "plot_event_study",
    "plot_exposure",
    "plot_forgetting",
    "plot_groups",
    "plot_laws",
    "plot_life_lines",
    "plot_prediction",
    "plot_profile",
    "plot_recall",
    "plot_recognition",
    "plot_retention",
    "plot_roc",
    "plot_scan",
    "plot_spectrum",
    "plot_truth",
    "plot_two_clocks",
]
