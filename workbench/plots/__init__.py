"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from workbench.plots.curvature import plot_band_ratio, plot_edit_sweep, plot_spectrum
from workbench.plots.curves import plot_curve, plot_groups, plot_truth
from workbench.plots.forgetting import plot_forgetting, plot_laws
from workbench.plots.profile import plot_event_study, plot_profile
from workbench.plots.retention import plot_recall, plot_recognition, plot_retention

__all__ = [
    "plot_band_ratio",
    "plot_curve",
    "plot_edit_sweep",
    "plot_event_study",
    "plot_forgetting",
    "plot_groups",
    "plot_laws",
    "plot_profile",
    "plot_recall",
    "plot_recognition",
    "plot_retention",
    "plot_spectrum",
    "plot_truth",
]
