"""The memory workbench: what a language model memorizes, when, for how long, and where.

Public names resolve on first use, so that ``import workbench`` costs next to nothing and does not
import torch.
"""

from __future__ import annotations

import importlib
import os

# two processes on two cores collapse when OpenMP threads spin while they wait; read when torch is
# first imported, so it stands before any of our modules can do that
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_HOME = {
    "workbench.table": "METRICS InputError load rows save validate",
    "workbench.models": "LanguageModel load_checkpoints load_model",
    "workbench.items": "load_items make_biographies make_canaries make_controls",
    "workbench.overlap": "drop_shared shared_words",
    "workbench.facts": "load_facts make_facts",
    "workbench.injection": "inject_facts",
    "workbench.probes.facts": "probe_facts",
    "workbench.stats.facts": "fact_effects fact_trace",
    "workbench.foils": "audit_lists make_foils make_study_lists",
    "workbench.lexicon": "make_neighbours synonyms",
    "workbench.capacity": "capacity_runs load_capacity",
    "workbench.recorder": "RetentionCallback RetentionRecorder probe_texts",
    "workbench.finetuning": "load_tuning tune_briefly",
    "workbench.retention": "choose_learning_rate interference_texts study_and_retain",
    "workbench.savings": "realign relearn",
    "workbench.streams": "stream_tasks train_stream",
    "workbench.suite": "load_suite",
    "workbench.subsets": "load_subsets",
    "workbench.tasks": "load_tasks make_tasks task_texts teach_tasks",
    "workbench.probes.tasks": "probe_tasks",
    "workbench.probes.drift": "probe_drift",
    "workbench.probes.interference": "probe_interference",
    "workbench.probes.weights": "probe_barrier probe_cka probe_weight_drift probe_weight_path",
    "workbench.probes.likelihood": "probe_likelihood",
    "workbench.decoding": "Decoding",
    "workbench.probes.extraction": "probe_cdd probe_continuation probe_discoverable probe_extraction probe_strength",
    "workbench.probes.scan": "add_passages forecast_scan probe_scan read_text",
    "workbench.probes.membership": "probe_membership",
    "workbench.probes.recognition": "probe_recognition",
    "workbench.probes.recall": "probe_recall",
    "workbench.probes.unintended": "probe_unintended",
    "workbench.decoys": "fill_template make_decoys",
    "workbench.probes.exposure": "probe_exposure",
    "workbench.probes.compression": "probe_compression",
    "workbench.probes.guesses": "probe_guesses",
    "workbench.probes.curvature": "curvature_texts probe_band_energy probe_curvature recited_items sweep_layers",
    "workbench.probes.stability": "probe_stability",
    "workbench.curvature": "correct_masses decompose edited",
    "workbench.kronfluence": "export_kronfluence",
    "workbench.patches": "export_edited patched save_patch",
    "workbench.factors": "collect_factors forecast_factors load_factors merge_factors save_factors",
    "workbench.fisher": "dampened diagonal_fisher load_fisher merge_fishers save_fisher",
    "workbench.hessian": "loss_hessian mean_interval",
    "workbench.probes.sharpness": "probe_item_sharpness probe_sharpness self_influence",
    "workbench.subject": "load_subject",
    "workbench.stats.exposure": "align_exposures",
    "workbench.stats.counterfactual": "agreement counterfactual_memorization",
    "workbench.stats.effects": "calibration compare_with_truth item_gains same_at_every_lag truth_of_others twin_effects",
    "workbench.stats.summarise": "summarise",
    "workbench.stats.floors": "add_floor",
    "workbench.stats.blind": "blind_baseline",
    "workbench.stats.sharpness": "sharpness_auc sharpness_correlation",
    "workbench.stats.membership": "membership_auc membership_trend roc_curve",
    "workbench.stats.prediction": "predict_memorized ranked_guesses",
    "workbench.stats.taxonomy": "class_shares classify_memorized predict_by_class text_features",
    "workbench.stats.life_events": "forgetting_events life_events",
    "workbench.stats.survival": "compare_survival fit_survival item_margins survival_curve survival_times",
    "workbench.stats.discoverable": "discoverable tries_needed",
    "workbench.stats.scan": "longest_runs scan_heat scan_shares",
    "workbench.stats.profile": "detectable_effect memorization_profile pretrend_test profile_by",
    "workbench.stats.falls": "fall_curve fall_ranks item_falls",
    "workbench.stats.frontier": "choose_layers matched_frontier",
    "workbench.stats.laws": "describe_laws early_loss fit_forgetting",
    "workbench.stats.shrinkage": "shrink_forgetting",
    "workbench.stats.finetuning": "tuning_changes tuning_summary",
    "workbench.stats.retention": "retention_curve",
    "workbench.stats.savings": "savings_curve spurious_forgetting",
    "workbench.stats.capacity": "bits_per_parameter fit_capacity",
    "workbench.stats.continual": "accuracy_matrix knowledge_accumulation load_matrix plasticity stability_gap",
    "workbench.results": "audit_checkpoints load_results write_example_results",
    "workbench.stats.audit": "audit_results",
    "workbench.stats.peaks": "peak_drop",
    "workbench.explore.items": "explore_items",
    "workbench.explore.forgetting": "explore_forgetting",
    "workbench.explore.profile": "explore_profile",
    "workbench.explore.curvature": "explore_curvature",
    "workbench.explore.runs": "explore_runs report_curves report_numbers",
    "workbench.report": "publish run_report run_reports",
    "workbench.grid": "read_grid run_grid",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name.startswith("plot_"):
        return getattr(importlib.import_module("workbench.plots"), name)
    if name not in _WHERE:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
