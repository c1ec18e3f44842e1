"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from workbench.plots.capacity import plot_bits_per_parameter, plot_capacity
from workbench.plots.curvature import (
    plot_band_ratio,
    plot_edit_sweep,
    plot_falls,
    plot_layer_choice,
    plot_rho_sweep,
    plot_spectrum,
    plot_staircase,
)
from workbench.plots.curves import plot_curve, plot_groups, plot_truth
from workbench.plots.dose import plot_dose
from workbench.plots.extraction import plot_discoverable, plot_scan
from workbench.plots.facts import plot_effectivity, plot_fact_trace, plot_retainability
from workbench.plots.finetuning import plot_before_after, plot_tuning
from workbench.plots.forgetting import plot_forgetting, plot_laws, plot_residuals
from workbench.plots.items import plot_life_lines, plot_two_clocks
from workbench.plots.membership import plot_auc, plot_roc
from workbench.plots.prediction import plot_exposure, plot_prediction
from workbench.plots.profile import plot_event_study, plot_profile
from workbench.plots.reports import plot_key_numbers
from workbench.plots.results import plot_audit, plot_results
from workbench.plots.retention import plot_recall, plot_recognition, plot_retention
from workbench.plots.savings import plot_savings
from workbench.plots.sharpness import plot_density, plot_item_sharpness, plot_sharpness
from workbench.plots.stability import plot_edit_overlap, plot_principal_angles
from workbench.plots.streams import (
    plot_accuracy_matrix,
    plot_matrix_measures,
    plot_plasticity,
    plot_stability_gap,
)
from workbench.plots.survival import plot_hazards, plot_survival
from workbench.plots.tasks import plot_tasks
from workbench.plots.truth import plot_coverage
from workbench.plots.weights import (
    plot_barrier,
    plot_cka,
    plot_drift,
    plot_drift_heat,
    plot_interference,
    plot_path,
    plot_step,
)

__all__ = [
    "plot_accuracy_matrix",
    "plot_auc",
    "plot_audit",
    "plot_band_ratio",
    "plot_barrier",
    "plot_before_after",
    "plot_bits_per_parameter",
    "plot_capacity",
    "plot_cka",
    "plot_coverage",
    "plot_curve",
    "plot_density",
    "plot_discoverable",
    "plot_dose",
    "plot_drift",
    "plot_drift_heat",
    "plot_edit_overlap",
    "plot_edit_sweep",
    "plot_effectivity",
    "plot_event_study",
    "plot_exposure",
    "plot_fact_trace",
    "plot_falls",
    "plot_forgetting",
    "plot_groups",
    "plot_hazards",
    "plot_interference",
    "plot_item_sharpness",
    "plot_key_numbers",
    "plot_laws",
    "plot_layer_choice",
    "plot_life_lines",
    "plot_matrix_measures",
    "plot_path",
    "plot_plasticity",
    "plot_prediction",
    "plot_principal_angles",
    "plot_profile",
    "plot_recall",
    "plot_recognition",
    "plot_residuals",
    "plot_results",
    "plot_retainability",
    "plot_retention",
    "plot_rho_sweep",
    "plot_roc",
    "plot_savings",
    "plot_scan",
    "plot_sharpness",
    "plot_spectrum",
    "plot_stability_gap",
    "plot_staircase",
    "plot_step",
    "plot_survival",
    "plot_tasks",
    "plot_truth",
    "plot_tuning",
    "plot_two_clocks",
]
