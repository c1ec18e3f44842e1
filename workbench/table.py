"""The one table: one row is one measurement, whoever made it.

Probes return it, statistics map it to itself, plots draw it. It is a plain DataFrame with the
columns of :data:`COLUMNS`; any further column is a coordinate (``lag``, ``copies``, ``layer``),
but for ``se`` (a standard error) and ``reason`` (why a value is NaN), which ride beside the value.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

COLUMNS = ("run", "step", "group", "item", "metric", "value", "lo", "hi", "n")
TEXT = ("run", "group", "item", "metric")
FLOOR = ("floor", "floor_lo", "floor_hi")  # what texts without memory give, see stats.floors
BOOTSTRAP = ("lo_bootstrap", "hi_bootstrap")  # a second interval beside lo and hi
BESIDE_VALUE = (
    "value",
    "lo",
    "hi",
    "n",
    "n_in",
    "n_out",
    "n_control",
    "se",
    "reason",
    *FLOOR,
    *BOOTSTRAP,
)
VERSION = 1  # of the file layout; load() refuses others by name
PASSPORT_KEY = b"workbench.passport"


class InputError(ValueError):
    """What came from the user cannot be used; the message is one line that names the way out.

    The command line prints it and exits with status 2; a report that meets it writes nothing.
    """


@dataclass(frozen=True)
class Metric:
    """What a metric key means: the only place that knows label, unit, range and direction.

    ``low`` and ``high`` bound the value (None: unbounded), ``chance`` is what a model without any
    memory of the item gets (None: depends on the item, so a control is needed), ``better`` says
    which direction is stronger memory or a better model ("high", "low", or "" for neither).
    """

    label: str
    unit: str
    low: float | None
    high: float | None
    chance: float | None
    better: str
    source: str
    formula: str = ""

    @property
    def axis(self) -> str:
        """Label and unit as an axis title."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label


OURS = "the workbench"
EBBINGHAUS = "Ebbinghaus (1885), Über das Gedächtnis"
CARLINI = "Carlini et al. (2022), Quantifying memorization"
BIDERMAN = "Biderman et al. (2023), Emergent and predictable memorization"
LESCI = "Lesci et al. (2024), Causal estimation of memorisation profiles"
ORHAN = "Orhan (2023), Recognition, recall, and retention of few-shot memories"
MERULLO = "Merullo et al. (2025), From memorization to reasoning in the spectrum of loss curvature"
HAYES = "Hayes et al. (2024), Measuring memorization through probabilistic discoverable extraction"
COOPER = "Cooper et al. (2025), Extracting memorized pieces of (copyrighted) books from open-weight language models"
FALSE_SENSE = (
    "Ippolito et al. (2023), Preventing verbatim memorization gives a false sense of privacy"
)
SECRET = "Carlini et al. (2019), The secret sharer"
SCHWARZSCHILD = (
    "Schwarzschild et al. (2024), Rethinking LLM memorization through adversarial compression"
)
PRASHANTH = "Prashanth et al. (2024), Recite, reconstruct, recollect"
BURNHAM = "Burnham & Anderson (2002), Model selection and multimodel inference"
HARNESS = "Gao et al. (2023), A framework for few-shot language model evaluation"
CHANG = "Chang et al. (2024), How do LLMs acquire factual knowledge during pretraining?"
MORRIS = "Morris et al. (2025), How much do language models memorize?"
TONEVA = "Toneva et al. (2019), An empirical study of example forgetting"
KAPLAN = "Kaplan & Meier (1958), Nonparametric estimation from incomplete observations"
MANTEL = "Mantel (1966), Evaluation of survival data and two new rank order statistics"
COX = "Cox (1972), Regression models and life-tables"
WEI = "Wei (1992), The accelerated failure time model"
GEM = "Lopez-Paz & Ranzato (2017), Gradient episodic memory for continual learning"
RIEMANNIAN = "Chaudhry et al. (2018), Riemannian walk for incremental learning"
DELANGE = "De Lange et al. (2023), Continual evaluation for lifelong learning: identifying the stability gap"
LESORT = (
    "Lesort et al. (2023), Challenging common assumptions about catastrophic forgetting and "
    "knowledge accumulation"
)
GROSSE = (
    "Grosse et al. (2023), Studying large language model generalization with influence functions"
)
BJORCK = "Björck & Golub (1973), Numerical methods for computing angles between linear subspaces"
DOHARE = "Dohare et al. (2024), Loss of plasticity in deep continual learning"

METRICS: dict[str, Metric] = {
    # one forward pass
    "log_probability": Metric(
        "mean log-probability", "nats per token", None, 0.0, None, "high", OURS,
        formula="(1/(L−k)) Σ_{t>k} log p(x_t | x_{<t})",
    ),
    "top1": Metric(
        "tokens right under teacher forcing",
        "share of tokens",
        0.0,
        1.0,
        None,
        "high",
        "Tirumala et al. (2022), Memorization without overfitting",
        formula="share of t > k with x_t = argmax p(· | x_{<t})",
    ),
    "rank": Metric("mean rank of the true token", "rank", 1.0, None, None, "low", OURS,
        formula="mean over t > k of the rank of x_t in p(· | x_{<t}), 1 the likeliest",
    ),
    "perplexity": Metric("perplexity", "per token", 1.0, None, None, "low", OURS,
        formula="exp(−(1/n) Σ log p(x_t | x_{<t}))",
    ),
    "loss": Metric("mean negative log-probability", "nats per token", 0.0, None, None, "low", OURS,
        formula="−(1/n) Σ log p(x_t | x_{<t})",
    ),
    "coverage": Metric(
        "cells whose band holds the truth", "share of cells", 0.0, 1.0, None, "", OURS,
        formula="cells with |estimate − truth| within the half-width / cells",
    ),
    "bias": Metric(
        "mean error of the estimate", "nats per token", None, None, 0.0, "", OURS,
        formula="mean over runs of estimate − truth",
    ),
    "error_ratio": Metric(
        "actual over reported error", "ratio", 0.0, None, 1.0, "", OURS,
        formula="sqrt(mean (estimate − truth)² / mean se²) over runs",
    ),
    "power": Metric(
        "cells found above zero", "share of cells", 0.0, 1.0, None, "high", OURS,
        formula="cells whose interval lies above 0 / cells",
    ),
    "correlation": Metric("correlation over items", "", -1.0, 1.0, 0.0, "", OURS,
        formula="cov(x, y) / (sd x · sd y)",
    ),
    "counterfactual": Metric(
        "counterfactual memorization", "unit of the score", None, None, 0.0, "high",
        "Zhang et al. (2021), Counterfactual memorization in neural language models",
        formula="mean score of the runs with the text − mean of the runs without",
    ),
    "difference": Metric("difference between paired conditions", "", None, None, 0.0, "", OURS,
        formula="mean over pairs of first − second",
    ),
    "shared_words": Metric(
        "word n-grams shared with the training text", "share of n-grams", 0.0, 1.0, None, "", OURS,
        formula="word n-grams of the text that stand in the training text / all its n-grams",
    ),
    # extraction
    "extractable": Metric(
        "reproduced word for word", "share of items", 0.0, 1.0, 0.0, "high", CARLINI,
        formula="1 if x_t = argmax p(· | x_{<t}) for every t > k, else 0",
    ),
    "verbatim_length": Metric("verbatim prefix length", "tokens", 0.0, None, 0.0, "high", CARLINI,
        formula="tokens after the prompt before the first x_t ≠ argmax p(· | x_{<t})",
    ),
    "log_p_z": Metric(
        "log-probability of the whole suffix",
        "nats",
        None,
        0.0,
        None,
        "high",
        HAYES,
        formula="Σ_{t>k} log p(x_t | x_{<t})",
    ),
    "memorization_score": Metric(
        "greedy continuation matches", "share of tokens", 0.0, 1.0, None, "high", BIDERMAN,
        formula="share of positions at which the greedy continuation of the prompt equals the text",
    ),
    "extraction_strength": Metric(
        "extraction strength",
        "share of tokens",
        0.0,
        1.0,
        None,
        "high",
        "Carlini et al. (2021), Extracting training data from large language models",
        formula="1 − min{k : greedy decoding from the first k of L tokens gives the rest} / L",
    ),
    "edit_similarity": Metric(
        "token edit similarity of the continuation", "share", 0.0, 1.0, None, "high", FALSE_SENSE,
        formula="1 − token edit distance of greedy continuation and text / the longer length",
    ),
    "bleu": Metric(
        "BLEU of the continuation", "", 0.0, 1.0, None, "high", FALSE_SENSE,
        formula="geometric mean of the shares of 1- to 4-grams of tokens that the text has",
    ),
    "cdd": Metric(
        "samples close to the greedy continuation",
        "share of samples",
        0.0,
        1.0,
        None,
        "high",
        "Dong et al. (2024), Generalization or memorization: data contamination and trustworthy evaluation",
        formula="share of samples with token edit distance to the greedy one ≤ α · length",
    ),
    "p_z": Metric(
        "probability of the whole suffix", "", 0.0, 1.0, None, "high", HAYES,
        formula="Π_{t>k} p(x_t | x_{<t}) under the sampling scheme",
    ),
    "discoverable": Metric(
        "extracted in n samples with probability p or more",
        "share of items",
        0.0,
        1.0,
        None,
        "high",
        HAYES,
        formula="share of items with 1 − (1 − p_z)ⁿ ≥ p",
    ),
    "tries": Metric(
        "samples needed to extract with probability p", "samples", 1.0, None, None, "low", HAYES,
        formula="⌈log(1 − p) / log(1 − p_z)⌉",
    ),
    "near_verbatim_run": Metric(
        "longest near-verbatim run", "tokens", 0.0, None, None, "high", COOPER,
        formula="longest union of overlapping suffixes with p_z ≥ threshold",
    ),
    "verbatim_run": Metric(
        "longest verbatim run", "tokens", 0.0, None, None, "high", OURS,
        formula="longest union of overlapping greedy matches, each prompted by the text before it",
    ),
    # membership: one attack score an item, higher = member; AUC and TPR once pooled
    "member_loss": Metric(
        "loss attack score",
        "nats per token",
        None,
        0.0,
        None,
        "high",
        "Yeom et al. (2018), Privacy risk in machine learning",
        formula="(1/n) Σ log p(x_t | x_{<t})",
    ),
    "member_zlib": Metric(
        "zlib attack score", "nats per token and byte", None, 0.0, None, "high", "Carlini et al. (2021)",
        formula="(1/n) Σ log p(x_t | x_{<t}) / bytes of zlib(text)",
    ),
    "member_mink": Metric(
        "Min-K score",
        "nats per token",
        None,
        0.0,
        None,
        "high",
        "Shi et al. (2024), Detecting pretraining data",
        formula="mean of the lowest max(1, ⌊k n⌋) of log p(x_t | x_{<t})",
    ),
    "member_minkpp": Metric(
        "Min-K++ score", "standard deviations", None, None, None, "high", "Zhang et al. (2025)",
        formula="mean of the lowest max(1, ⌊k n⌋) of (log p(x_t | x_{<t}) − μ_t) / σ_t",
    ),
    "member_reference": Metric(
        "reference attack score",
        "nats per token",
        None,
        None,
        None,
        "high",
        "Carlini et al. (2021), Extracting training data from large language models",
        "(log p(x) - log p_reference(x)) / tokens",
    ),
    "member_recall": Metric(
        "ReCaLL score",
        "ratio",
        0.0,
        None,
        None,
        "high",
        "Xie et al. (2024), ReCaLL: Membership inference via relative conditional log-likelihoods",
        "log p(x | prefix) / log p(x), both negative",
    ),
    "member_neighbourhood": Metric(
        "neighbourhood attack score",
        "nats per token",
        None,
        None,
        None,
        "high",
        "Mattern et al. (2023), Membership inference via neighbourhood comparison",
        "mean log p(x) - mean over neighbours of mean log p(neighbour)",
    ),
    "member_gradient": Metric(
        "gradient norm attack score",
        "nats per token and unit of weight",
        None,
        0.0,
        None,
        "high",
        "Wang et al. (2024), Pandora's white-box",
        "-|gradient of the mean loss over all parameters|",
    ),
    "member_blind": Metric(
        "blind bag of words (no model)",
        "share of the other class",
        0.0,
        1.0,
        0.5,
        "",
        "Das, Zhang & Tramer (2024), Blind baselines beat membership inference attacks",
        formula="out-of-fold log-odds of a bag of words with logistic regression",
    ),
    "auc": Metric(
        "membership AUC", "", 0.0, 1.0, 0.5, "high", "DeLong et al. (1988), Comparing areas",
        formula="P(member's score > other's) + ½ P(equal)",
    ),
    "partial_auc": Metric(
        "partial AUC up to the false positive rate, standardised",
        "",
        0.0,
        1.0,
        0.5,
        "high",
        "McClish (1989), Analyzing a portion of the ROC curve",
        formula="area below the false positive rate, scaled so that chance is ½ and perfect 1 (McClish)",
    ),
    "auc_gain": Metric(
        "membership AUC beyond a blind bag of words", "", -1.0, 1.0, 0.0, "high", "Das et al. (2024)",
        formula="AUC of the attack − AUC of the blind baseline",
    ),
    "dose_concordance": Metric(
        "pairs of texts in the order of their exposures",
        "share of pairs",
        0.0,
        1.0,
        0.5,
        "high",
        "Jonckheere (1954), A distribution-free k-sample test against ordered alternatives",
        formula="P(the text with more exposures scores higher) + ½ P(equal), over pairs of different exposures",
    ),
    "tpr_at_fpr": Metric(
        "true positive rate at the false positive rate",
        "share",
        0.0,
        1.0,
        None,
        "high",
        "Carlini et al. (2022), Membership inference from first principles",
        formula="largest share of members above a threshold that at most the given share of others pass",
    ),
    # causal profile and forgetting
    "outcome": Metric("outcome", "", None, None, None, "", "the user's panel",
        formula="as it came",
    ),
    # results of other tools
    "accuracy": Metric("accuracy", "share of items", 0.0, 1.0, None, "high", HARNESS,
        formula="items answered right / items",
    ),
    "accuracy_norm": Metric(
        "accuracy, likelihoods per byte of the answer", "share of items", 0.0, 1.0, None, "high", HARNESS,
        formula="items whose right answer has the highest log-likelihood / length in bytes, over items",
    ),
    "exact_match": Metric("exact match", "share of items", 0.0, 1.0, None, "high", HARNESS,
        formula="items whose generated answer equals a right one / items",
    ),
    "task_score": Metric("score, higher is better", "", None, None, None, "high", "the results read",
        formula="as it came, its name in source_metric",
    ),
    "task_loss": Metric("score, lower is better", "", None, None, None, "low", "the results read",
        formula="as it came, its name in source_metric",
    ),
    "by_chance": Metric("probability that chance alone shows this", "", 0.0, 1.0, None, "low", OURS,
        formula="min(1, p · comparisons made), p that of one comparison; see audit_results",
    ),
    "peak_drop": Metric(
        "fall from the peak to the end",
        "unit of the score",
        0.0,
        None,
        0.0,
        "low",
        "Chernozhukov, Lee & Rosen (2013), Intersection bounds: estimation and inference",
        formula="max(0, max_s (y_s − y_T − c₅₀ · standard error)), c₅₀ the median of the largest noise",
    ),
    "memorization": Metric("memorization (ATT)", "nats per token", None, None, 0.0, "high", LESCI,
        formula="ATT(g, t) = mean over cohort g of (Y_t − Y_b) − mean over controls of (Y_t − Y_b)",
    ),
    "placebo": Metric("placebo effect", "nats per token", None, None, 0.0, "", LESCI,
        formula="ATT(g, t) at t before g",
    ),
    "wald": Metric("pre-trend Wald statistic", "chi-square", 0.0, None, None, "low", LESCI,
        formula="θ' V⁺ θ over the placebo effects θ with covariance V",
    ),
    "p_value": Metric("p-value", "", 0.0, 1.0, None, "", OURS,
        formula="P(χ² ≥ Wald), degrees of freedom the rank of V",
    ),
    "p_value_max_t": Metric(
        "p-value of the largest placebo effect",
        "",
        0.0,
        1.0,
        None,
        "",
        "Callaway & Sant'Anna (2021), Difference-in-differences with multiple time periods",
        formula="(1 + multiplier draws with a larger max |θ* / σ|) / (1 + draws)",
    ),
    "detectable": Metric(
        "smallest effect detectable at 80 % power", "nats per token", 0.0, None, None, "low", OURS,
        formula="(z_{.975} + z_{.80}) · standard error",
    ),
    "effectivity": Metric(
        "effectivity of an injection", "nats per token", None, None, 0.0, "high", CHANG,
        formula="max over the window of log p(target | prefix) − the same just before the injection",
    ),
    "gain": Metric(
        "gain since before the first injection", "nats per token", None, None, 0.0, "high", CHANG,
        formula="log p(target | prefix) at t_LAM + t − the same just before the first injection",
    ),
    "retainability": Metric(
        "share of the gain that is left since its best", "share", None, None, 0.0, "high", CHANG,
        formula="mean gain at t_LAM + t / mean gain at t_LAM",
    ),
    "decay_constant": Metric(
        "share of the gain lost as time grows tenfold", "share per decade", None, None, 0.0, "low",
        CHANG,
        formula="b of the least-squares line a − b log10 t through retainability",
    ),
    "retention": Metric(
        "share of the gain that is left",
        "share",
        None,
        None,
        0.0,
        "high",
        "Chang et al. (2024), How do LLMs acquire factual knowledge during pretraining?",
        formula="gain at lag t / gain at lag 0",
    ),
    "updates_to_criterion": Metric(
        "updates until a text is learned", "updates", 0.0, None, None, "low", EBBINGHAUS,
        formula="first u with loss(u) ≤ criterion · loss before study, on a line between askings",
    ),
    "savings": Metric("savings in relearning", "share of updates", None, 1.0, 0.0, "high", EBBINGHAUS,
        formula="1 − updates to relearn / updates to learn first; net: each over the controls' own",
    ),
    "spurious_forgetting": Metric(
        "share of what was forgotten that re-alignment brings back",
        "share",
        None,
        None,
        0.0,
        "",
        "Zheng et al. (2025), Spurious forgetting in continual learning of language models",
        formula="(recovered − observed) / (initial − observed)",
    ),
    "aicc": Metric("corrected Akaike criterion", "", None, None, None, "low", BURNHAM,
        formula="n log(RSS / n) + 2 k + 2 k (k + 1) / (n − k − 1), k with the error variance",
    ),
    "weight": Metric("Akaike weight", "share", 0.0, 1.0, None, "high", BURNHAM,
        formula="exp(−Δ/2) / Σ exp(−Δ/2), Δ = AICc less the smallest",
    ),
    "half_life": Metric("half-life", "updates", 0.0, None, None, "high", OURS,
        formula="t at which the fitted r(t) is r(0) / 2",
    ),
    "learnability_threshold": Metric(
        "learnability threshold", "updates", 0.0, None, None, "high",
        "Chang et al. (2024), How do LLMs acquire factual knowledge during pretraining?",
        formula="10^(a / b): t at which the semi-log line a − b log10 t reaches 0",
    ),
    "rmse": Metric("root mean squared error", "", 0.0, None, None, "low", OURS,
        formula="sqrt(mean (r(t) − fit)²)",
    ),
    "rmse_holdout": Metric(
        "root mean squared error on the held-out last points", "", 0.0, None, None, "low", OURS,
        formula="sqrt(mean (r(t) − fit)²) over points the fit has not seen",
    ),
    "fitted": Metric("fitted law", "", None, None, None, "", OURS,
        formula="r(t) of the law at its fitted parameters",
    ),
    "residual": Metric("residual", "", None, None, 0.0, "", OURS,
        formula="observed − fitted",
    ),
    "early_share": Metric("share of the loss that came early", "share", None, None, None, "low", OURS,
        formula="(r(first) − r(split)) / (r(first) − r(last))",
    ),
    "decade_loss": Metric("lost per tenfold of time", "", None, None, 0.0, "low", OURS,
        formula="−slope of r on log10(1 + t), over the points before or after the split",
    ),
    "item_sd": Metric("spread of the items", "", 0.0, None, 0.0, "", OURS,
        formula="standard deviation between items of a parameter, noise taken out (REML)",
    ),
    "residual_sd": Metric("spread around an item's own line", "", 0.0, None, None, "low", OURS,
        formula="standard deviation of value − the item's fitted line (REML)",
    ),
    **{
        f"param_{name}": Metric(f"parameter {name}", "", None, None, None, "", OURS, "see the law")
        for name in ("a", "b", "c", "k", "p", "q", "s")
    },
    # recognition, recall
    "recognition": Metric(
        "two-alternative recognition", "share of pairs", 0.0, 1.0, None, "high", ORHAN,
        formula="mean over pairs of 1[loss(text) < loss(foil)] + ½ 1[equal]",
    ),
    "recognition_auc": Metric(
        "recognition AUC, unpaired", "", 0.0, 1.0, None, "high", ORHAN,
        formula="P(loss(text) < loss(foil)) + ½ P(equal), over all texts and all foils",
    ),
    "d_prime": Metric("d'", "standard deviations", None, None, None, "high", ORHAN,
        formula="(mean foil loss − mean text loss) / sqrt((var text + var foil) / 2)",
    ),
    "recall_exact": Metric("recall: exact suffix", "share of items", 0.0, 1.0, 0.0, "high", ORHAN,
        formula="1 if the greedy continuation equals the suffix, else 0",
    ),
    "recall_token": Metric("recall: tokens right", "share of tokens", 0.0, 1.0, None, "high", OURS,
        formula="share of positions at which the greedy continuation equals the suffix",
    ),
    "recall_edit": Metric(
        "recall: normalised edit similarity", "share", 0.0, 1.0, None, "high", OURS,
        formula="1 − token edit distance / the longer length",
    ),
    **{
        f"recall_rouge{kind}": Metric(
            f"recall: ROUGE-{kind}",
            "F",
            0.0,
            1.0,
            None,
            "high",
            "Lin (2004), ROUGE: a package for automatic evaluation of summaries",
            formula="F of the words, word pairs or longest common subsequence shared with the suffix",
        )
        for kind in ("1", "2", "L")
    },
    # what a model holds
    "memorized_bits": Metric(
        "memorized of random tokens", "bits", None, None, 0.0, "high", MORRIS,
        formula="N S log2 V - Σ -log2 p, over N sequences of S tokens from V",
    ),
    "doubling_gain": Metric(
        "memorized in the second half of the updates", "share", None, None, None, "", OURS,
        formula="(M - M of the run ended at half its updates) / M",
    ),
    "capacity_bits": Metric(
        "capacity", "bits", None, None, 0.0, "high", MORRIS,
        formula="plateau of what is memorized, over the size of the data",
    ),
    "plateau_trend": Metric(
        "change of what is memorized when the data double", "share", None, None, 0.0, "", OURS,
        formula="slope of M over log2 of the data / mean M",
    ),
    "bits_per_parameter": Metric(
        "capacity per parameter", "bits per parameter", None, None, 0.0, "high", MORRIS,
        formula="C / P of a model, or the slope of C over P",
    ),
    "unintended_bits": Metric(
        "bits beyond the reference, at least 0", "bits", 0.0, None, None, "high", MORRIS,
        formula="max(0, -log2 p_ref + log2 p)",
    ),
    "unintended_bits_signed": Metric(
        "bits beyond the reference", "bits", None, None, None, "high", MORRIS,
        formula="-log2 p_ref + log2 p",
    ),
    # curvature
    "mass": Metric("share of curvature mass", "share", 0.0, 1.0, None, "", MERULLO,
        formula="Σ of the largest λ_i μ_j / (Σ λ)(Σ μ)",
    ),
    "kept": Metric("share of components kept", "share", 0.0, 1.0, None, "", MERULLO,
        formula="components kept / all components",
    ),
    "clamped": Metric("clamped negative eigenvalue mass", "share", 0.0, None, 0.0, "low", OURS,
        formula="Σ |negative eigenvalues| / Σ |eigenvalues|",
    ),
    "predicted_damage": Metric(
        "second-order damage of the edit", "nats per token", 0.0, None, 0.0, "low", MERULLO,
        formula="½ Σ over removed components of C_ij² λ_i μ_j",
    ),
    "recitation_strict": Metric(
        "strict recitation", "share of items", 0.0, 1.0, 0.0, "high", MERULLO,
        formula="1 if the greedy continuation equals the text, else 0",
    ),
    "recitation_loose": Metric(
        "loose recitation (similarity at least .75)", "share of items", 0.0, 1.0, 0.0, "high", MERULLO,
        formula="1 if 1 − edit distance / length ≥ .75, else 0",
    ),
    "edit_distance": Metric(
        "token edit distance of the continuation", "share of length", 0.0, 1.0, None, "low", MERULLO,
        formula="token edit distance of continuation and text / length",
    ),
    "recitation_margin": Metric(
        "log-odds of the least likely token of the continuation", "nats", None, None, None, "high", OURS,
        formula="min over t > k of log p(x_t | x_{<t}) − log(1 − p(x_t | x_{<t}))",
    ),
    "perplexity_ratio": Metric(
        "perplexity over that of the unedited model", "ratio", 0.0, None, 1.0, "", OURS,
        formula="exp((1/n) Σ (log p_unedited − log p_edited)), over the tokens of one and the same text",
    ),
    "kept_inputs": Metric(
        "input directions kept", "directions", 0.0, None, None, "", MERULLO,
        formula="k_j = |{i : λ_i μ_j at least the threshold}|",
    ),
    "fall_price": Metric(
        "rise of perplexity at which recitation ends", "share", 0.0, None, None, "high", OURS,
        formula="largest perplexity_ratio − 1 up to the first edit under which the text is not recited",
    ),
    "fall_removed": Metric(
        "share removed when recitation ends", "share", 0.0, 1.0, None, "high", OURS,
        formula="1 − ρ of the first edit under which the text is not recited",
    ),
    "rank_correlation": Metric(
        "rank correlation over items", "", -1.0, 1.0, 0.0, "",
        "Somers (1962), A new asymmetric measure of association for ordinal variables",
        formula="(pairs in like order − pairs in opposite order) / pairs whose order of fall is known",
    ),
    "band_energy": Metric(
        "activation energy in the band", "share", 0.0, 1.0, None, "", MERULLO,
        formula="squared activation along the band's directions / along all",
    ),
    "band_ratio": Metric(
        "activation energy, memorized over clean", "ratio", 0.0, None, 1.0, "", MERULLO,
        formula="band energy of memorized texts / of clean texts",
    ),
    # stability of decompositions and edits; chance depends on sizes and stands in the table
    "principal_angle": Metric(
        "principal angle of leading eigenspaces", "degrees", 0.0, 90.0, None, "", BJORCK,
        formula="arccos of the singular values of UᵀV, orthonormal bases; chance: of random subspaces, drawn",
    ),
    "subspace_overlap": Metric(
        "overlap of leading eigenspaces", "mean squared cosine", 0.0, 1.0, None, "", BJORCK,
        formula="‖UᵀV‖² / k, the mean cos² of the principal angles; chance: k / n",
    ),
    "edit_cosine": Metric("cosine of what two edits remove", "", -1.0, 1.0, None, "", OURS,
        formula="⟨R₁, R₂⟩ / (‖R₁‖ ‖R₂‖), R = W − W′; chance: √q ⟨R₁, W₂⟩ / (‖R₁‖ ‖W₂‖), q the share removed",
    ),
    "edit_shared": Metric("removed energy that the other edit removes too", "share", 0.0, 1.0, None, "", OURS,
        formula="‖P₂ R₁‖² / ‖R₁‖², P₂ onto the components edit 2 removes; chance: their share q",
    ),
    "edit_difference": Metric("difference of the edited weights", "share of the norm", 0.0, None, None, "", OURS,
        formula="‖W₁′ − W₂′‖ / ‖W₁′‖; chance: W₂ less a random share q of its components",
    ),
    "mask_jaccard": Metric("components that two edits keep", "share of those kept by either", 0.0, 1.0, None, "",
        "Jaccard (1912), The distribution of the flora in the alpine zone",
        formula="|M₁ ∩ M₂| / |M₁ ∪ M₂|, in one basis; chance: p₁p₂ / (p₁ + p₂ − p₁p₂), p the shares kept",
    ),
    "verdict_agreement": Metric("items with the same verdict under two edits", "share of items", 0.0, 1.0, None, "", OURS,
        formula="items recited under both or under neither / items; chance: p² + (1 − p)², p the mean rate",
    ),
    "verdict_kappa": Metric("agreement of two verdicts beyond chance", "", -1.0, 1.0, 0.0, "",
        "Scott (1955), Reliability of content analysis",
        formula="(agreement − chance) / (1 − chance), chance = p² + (1 − p)²",
    ),
    # sharpness
    "hessian_eigenvalue": Metric(
        "Hessian eigenvalue", "nats per token", None, None, None, "",
        "Pearlmutter (1994), Fast exact multiplication by the Hessian",
        formula="λ with H v = λ v, H the second derivatives of the mean loss per token",
    ),
    "hessian_trace": Metric(
        "trace of the Hessian", "nats per token", None, None, None, "",
        "Hutchinson (1990), A stochastic estimator of the trace of the influence matrix",
        formula="mean over random signs v of vᵀ H v",
    ),
    "hessian_density": Metric(
        "density of Hessian eigenvalues", "per unit of eigenvalue", 0.0, None, None, "",
        "Ghorbani et al. (2019), An investigation into neural net optimization via Hessian eigenvalue density",
        formula="Σ over Lanczos nodes of w_k N(λ; θ_k, σ²), mean over random starts",
    ),
    "gradient_norm": Metric(
        "norm of the loss gradient", "nats per token", 0.0, None, None, "", OURS,
        formula="√Σ (∂ mean loss per token / ∂ weight)²",
    ),
    "input_curvature": Metric(
        "input-loss curvature", "nats² per embedding unit⁴", 0.0, None, None, "",
        "Garg et al. (2024), Memorization through the lens of curvature of loss function around samples",
        formula="mean over random signs v of |H_E v|² / tokens, H_E of the summed loss by the input embeddings",
    ),
    "self_influence": Metric(
        "self-influence", "nats per token", 0.0, None, None, "", GROSSE,
        formula="Σ (u_jᵀ D v_i)² / (λ_i μ_j + δ), D the gradient of the mean loss per token",
    ),
    "curvature_met": Metric(
        "corpus curvature along the gradient", "mean curvature", 0.0, None, 1.0, "", OURS,
        formula="Σ (u_jᵀ D v_i)² λ_i μ_j / Σ (u_jᵀ D v_i)² / mean λμ",
    ),
    "spearman": Metric(
        "Spearman's rank correlation over items", "", -1.0, 1.0, 0.0, "",
        "Spearman (1904), The proof and measurement of association between two things",
        formula="correlation of the ranks; with confounds, of what is left of the ranks beside theirs",
    ),
    # weights of checkpoints, and two models compared
    "weight_change": Metric("change of the weights since the base step", "share of the base's norm", 0.0, None, None, "", OURS,
        formula="‖W − W_base‖ / ‖W_base‖, Frobenius",
    ),
    "weight_change_previous": Metric("change of the weights since the step before", "share of the base's norm", 0.0, None, None, "", OURS,
        formula="‖W_s − W_{s−1}‖ / ‖W_base‖, Frobenius",
    ),
    "weight_cosine": Metric("cosine of the weights to the base step's", "", -1.0, 1.0, 0.0, "", OURS,
        formula="⟨W, W_base⟩ / (‖W‖ ‖W_base‖)",
    ),
    "weight_turn": Metric("cosine of successive changes", "", -1.0, 1.0, 0.0, "", OURS,
        formula="⟨Δ_s, Δ_{s−1}⟩ / (‖Δ_s‖ ‖Δ_{s−1}‖), Δ_s = W_s − W_{s−1}",
    ),
    "weight_path": Metric("length of the weights' path in a phase", "share of the base's norm", 0.0, None, None, "", OURS,
        formula="Σ_s ‖W_s − W_{s−1}‖ / ‖W_base‖ over the phase's checkpoints",
    ),
    "weight_net": Metric("net displacement of the weights in a phase", "share of the base's norm", 0.0, None, None, "", OURS,
        formula="‖W_end − W_start‖ / ‖W_base‖",
    ),
    "straightness": Metric("net displacement over path length", "ratio", 0.0, 1.0, None, "", OURS,
        formula="‖W_end − W_start‖ / Σ_s ‖W_s − W_{s−1}‖",
    ),
    "phase_cosine": Metric("cosine of two phases' net displacements", "", -1.0, 1.0, 0.0, "", OURS,
        formula="⟨D_a, D_b⟩ / (‖D_a‖ ‖D_b‖), D = W_end − W_start",
    ),
    "condition_number": Metric("condition number", "ratio", 1.0, None, None, "", OURS,
        formula="max σ / min σ, σ the singular values of W",
    ),
    "stable_rank": Metric("stable rank", "directions", 1.0, None, None, "",
        "Rudelson & Vershynin (2007), Sampling from large matrices",
        formula="Σ σ² / max σ²",
    ),
    "effective_rank": Metric("effective rank", "directions", 1.0, None, None, "",
        "Roy & Vetterli (2007), The effective rank: a measure of effective dimensionality",
        formula="exp(−Σ p log p), p = σ / Σ σ",
    ),
    "cka": Metric("linear CKA of hidden states", "", -1.0, 1.0, 0.0, "",
        "Kornblith et al. (2019), Similarity of neural network representations revisited",
        formula="HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)), unbiased HSIC (Song et al. 2012)",
    ),
    "barrier": Metric("loss barrier between the models", "nats per token", None, None, None, "",
        "Frankle et al. (2020), Linear mode connectivity and the lottery ticket hypothesis",
        formula="max over 0 < α < 1 of L((1−α)A + αB) − (1−α) L(A) − α L(B)",
    ),
    # gradient interference
    "gradient_product": Metric(
        "inner product of two groups' loss gradients", "squared nats per squared weight", None, None, 0.0, "",
        "Riemer et al. (2019), Learning to learn without forgetting by maximizing transfer and minimizing interference",
        formula="⟨g_X, g_Y⟩, g the mean over texts of the gradient of a text's mean loss; within a group the mean over pairs of texts",
    ),
    "gradient_cosine": Metric(
        "cosine of two groups' loss gradients", "", -1.0, 1.0, 0.0, "",
        "Fort et al. (2019), Stiffness: a new perspective on generalization in neural networks",
        formula="⟨g_X, g_Y⟩ / √(u_X u_Y), u the mean of ⟨g_i, g_j⟩ over pairs of texts of a group",
    ),
    "gradient_coherence": Metric(
        "coherence of a group's loss gradients", "", -1.0, 1.0, 0.0, "",
        "Chatterjee & Zielinski (2020), Making coherence out of nothing at all",
        formula="mean over pairs i ≠ j of ⟨g_i, g_j⟩ / mean over texts of ‖g_i‖²",
    ),
    "step_predicted": Metric(
        "change of the loss after one step, to first order", "nats per token", None, None, 0.0, "", OURS,
        formula="−η ⟨g_X, g_Y⟩, the step on X, the loss that of Y",
    ),
    "step_measured": Metric(
        "change of the loss after one step", "nats per token", None, None, 0.0, "", OURS,
        formula="L_Y(θ − η g_X) − L_Y(θ)",
    ),
    "step_central": Metric(
        "change of the loss by a step there against a step back, halved", "nats per token", None, None, 0.0, "", OURS,
        formula="(L_Y(θ − η g_X) − L_Y(θ + η g_X)) / 2",
    ),
    # base against tuned
    "kl_base_tuned": Metric(
        "KL(base || tuned)", "nats per token", 0.0, None, None, "low",
        "Shenfeld et al. (2025), RL's razor: why online reinforcement learning forgets less",
        formula="(1/n) Σ_t Σ_v p_base(v | x_{<t}) log(p_base(v | x_{<t}) / p_tuned(v | x_{<t}))",
    ),
    "forgetting_loss": Metric(
        "forgetting loss", "nats per token", 0.0, None, None, "low",
        "Kalajdzievski (2024), Scaling laws for forgetting when fine-tuning large language models",
        formula="−(1/n) Σ_t Σ_v p_base(v | x_{<t}) log p_tuned(v | x_{<t})",
    ),
    "net_change": Metric("change beyond the controls'", "", None, None, 0.0, "", OURS,
        formula="mean change of the group − mean change of the controls",
    ),
    "memorized_share": Metric("memorized by the tuning", "share of items", 0.0, 1.0, None, "", OURS,
        formula="items better by more than 97.5 % of further controls would be / items",
    ),
    "forgotten_share": Metric("forgotten in the tuning", "share of items", 0.0, 1.0, None, "", OURS,
        formula="items worse by more than 97.5 % of further controls would be / items",
    ),
    "lost_share": Metric("known before, lost", "share of items", 0.0, 1.0, None, "low", OURS,
        formula="items known before and not after / items known before",
    ),
    "gained_share": Metric("not known before, learned", "share of items", 0.0, 1.0, None, "high", OURS,
        formula="items known after and not before / items not known before",
    ),
    # exposure, guesses, compression, prediction, life lines
    "exposure": Metric("exposure", "bits", 0.0, None, 1.4427, "high", SECRET,
        formula="log2 candidates − log2 rank, the text counted among them",
    ),
    "exposure_extrapolated": Metric(
        "exposure by the fitted tail", "bits", 0.0, None, 1.4427, "high", SECRET,
        formula="−log2 of the skew-normal tail, fitted to the decoys, beyond the text",
    ),
    "fit_distance": Metric(
        "Kolmogorov-Smirnov distance of the fit", "", 0.0, 1.0, None, "low", SECRET,
        formula="Kolmogorov-Smirnov distance of the decoys from the fitted skew-normal",
    ),
    "guess_log_probability": Metric(
        "log-probability of the model's own continuation",
        "nats",
        None,
        0.0,
        None,
        "high",
        "Carlini et al. (2021), Extracting training data from large language models",
        formula="(1/n) Σ log p of the model's own greedy continuation",
    ),
    "precision": Metric("precision", "share of guesses", 0.0, 1.0, None, "high", BIDERMAN,
        formula="foretold and memorized / foretold",
    ),
    "recall": Metric("recall", "share of targets", 0.0, 1.0, None, "high", BIDERMAN,
        formula="foretold and memorized / memorized",
    ),
    "f1": Metric("F1", "", 0.0, 1.0, None, "high", BIDERMAN,
        formula="2 precision · recall / (precision + recall)",
    ),
    "base_rate": Metric("base rate", "share of items", 0.0, 1.0, None, "", BIDERMAN,
        formula="memorized / all texts",
    ),
    "average_precision": Metric("average precision", "", 0.0, 1.0, None, "high", OURS,
        formula="mean over the right ones of precision at their rank",
    ),
    "recall_at_errors": Metric(
        "recall before the allowed errors are spent", "share of targets", 0.0, 1.0, None, "high", OURS,
        formula="right guesses above the N-th wrong one / all targets",
    ),
    "compression_ratio": Metric(
        "adversarial compression ratio", "target per prompt token", 0.0, None, None, "high", SCHWARZSCHILD,
        formula="tokens of the text / tokens of the shortest prompt found that elicits it greedily",
    ),
    "prompt_tokens": Metric(
        "shortest prompt found", "tokens", 1.0, None, None, "low", SCHWARZSCHILD,
        formula="tokens of the shortest prompt found that elicits the text greedily",
    ),
    "compressible": Metric(
        "elicited by a prompt shorter than itself", "share of items", 0.0, 1.0, None, "high", SCHWARZSCHILD,
        formula="1 if a prompt shorter than the text was found within the budget, else 0",
    ),
    "coefficient": Metric(
        "logistic coefficient", "log-odds per standard deviation", None, None, 0.0, "", PRASHANTH,
        formula="change of the log-odds of being memorized for one standard deviation of the feature",
    ),
    "class_share": Metric("share of the memorized texts", "share", 0.0, 1.0, None, "", PRASHANTH,
        formula="memorized texts of the class / memorized texts",
    ),
    "event_step": Metric("checkpoint that first shows it", "updates", 0.0, None, None, "", OURS,
        formula="first checkpoint at which the event is seen",
    ),
    # survival of memories
    "forgetting_events": Metric("times forgotten", "events", 0.0, None, None, "low", TONEVA,
        formula="looks at which a text is not known although it was at the look before",
    ),
    "margin": Metric(
        "gain above that of texts never trained on", "nats per token", None, None, None, "high", OURS,
        formula="(Y_t − Y_b) − quantile over controls of (Y_t − Y_b)",
    ),
    "survival_time": Metric("time until it is lost", "updates", 0.0, None, None, "high", OURS,
        formula="lag of the first look that finds it lost, or of the last look where none does",
    ),
    "survival": Metric("still remembered", "share of texts", 0.0, 1.0, None, "high", KAPLAN,
        formula="S(t) = Π_{t_j ≤ t} (1 − d_j / n_j), d lost and n at risk; Turnbull: the most likely S",
    ),
    "hazard": Metric("lost since the look before", "share of those at risk", 0.0, 1.0, None, "low", KAPLAN,
        formula="d_j / n_j",
    ),
    "median_survival": Metric("median survival", "updates", 0.0, None, None, "high", KAPLAN,
        formula="first t with S(t) ≤ ½",
    ),
    "log_rank": Metric("log-rank statistic", "chi-square", 0.0, None, None, "", MANTEL,
        formula="(O − E)ᵀ V⁻ (O − E), O losses and E those expected if all groups had one hazard",
    ),
    "p_value_log_rank": Metric("p-value of the log-rank test", "", 0.0, 1.0, None, "", MANTEL,
        formula="P(χ² ≥ statistic), degrees of freedom the groups less one",
    ),
    "p_value_holm": Metric(
        "p-value of the log-rank test, for all pairs at once", "", 0.0, 1.0, None, "",
        "Holm (1979), A simple sequentially rejective multiple test procedure",
        formula="running maximum of (m − i + 1) p_(i) over the m sorted p-values, at most 1",
    ),
    "hazard_ratio": Metric("hazard ratio", "", 0.0, None, 1.0, "low", COX,
        formula="exp(β) at the largest partial likelihood, ties after Efron",
    ),
    "time_ratio": Metric("time ratio", "", 0.0, None, 1.0, "high", WEI,
        formula="exp(β) of log T = α + β x + error",
    ),
    "p_value_ratio": Metric("p-value of a ratio of 1", "", 0.0, 1.0, None, "", COX,
        formula="P(|Z| ≥ |β / se|)",
    ),
    "p_value_proportional": Metric(
        "p-value of proportional hazards", "", 0.0, 1.0, None, "",
        "Grambsch & Therneau (1994), Proportional hazards tests and diagnostics",
        formula="P(χ²₁ ≥ statistic) of scaled Schoenfeld residuals against the rank of time",
    ),
    "shape": Metric("shape of the law of survival", "", 0.0, None, None, "", WEI,
        formula="Weibull ρ, log-normal σ, log-logistic β",
    ),
    "concordance": Metric(
        "concordance index", "share of pairs", 0.0, 1.0, 0.5, "high",
        "Harrell et al. (1982), Evaluating the yield of medical tests",
        formula="pairs whose order of loss is foretold, ties a half / pairs whose order is known",
    ),
    "aic": Metric("Akaike criterion", "", None, None, None, "low", BURNHAM,
        formula="−2 log-likelihood (Cox: partial) + 2 k",
    ),
    # streams of tasks: R[t, i] the score on task i after training task t
    "acc": Metric("average accuracy", "unit of the score", None, None, None, "high", GEM,
        formula="mean over i of R[T,i]",
    ),
    "average_incremental_accuracy": Metric(
        "average incremental accuracy",
        "unit of the score",
        None,
        None,
        None,
        "high",
        "Rebuffi et al. (2017), iCaRL: Incremental classifier and representation learning",
        formula="mean over t of the mean over i ≤ t of R[t,i]",
    ),
    "bwt": Metric("backward transfer", "unit of the score", None, None, 0.0, "high", GEM,
        formula="1/(T−1) Σ_{i<T} R[T,i] − R[i,i]",
    ),
    "bwt_gem_code": Metric(
        "backward transfer, as its authors' code has it", "unit of the score", None, None, 0.0, "high", GEM,
        formula="1/T Σ_{i<T} R[T,i] − R[i,i]",
    ),
    "fwt": Metric("forward transfer", "unit of the score", None, None, 0.0, "high", GEM,
        formula="1/(T−1) Σ_{i>1} R[i−1,i] − b_i",
    ),
    "forgetting": Metric("forgetting (from the best)", "unit of the score", None, None, 0.0, "low", RIEMANNIAN,
        formula="1/(T−1) Σ_{j<T} max_{l<T} R[l,j] − R[T,j]",
    ),
    "forgetting_mammoth": Metric(
        "forgetting (from the best, the end counted)",
        "unit of the score",
        0.0,
        None,
        0.0,
        "low",
        "Mammoth, Buzzega et al. (2020), Dark experience for general continual learning",
        formula="1/(T−1) Σ_{j<T} max_l R[l,j] − R[T,j]",
    ),
    "forgetting_avalanche": Metric(
        "forgetting (first minus last)",
        "unit of the score",
        None,
        None,
        0.0,
        "low",
        "Lomonaco et al. (2021), Avalanche: an end-to-end library for continual learning",
        formula="1/(T−1) Σ_{j<T} R[j,j] − R[T,j]",
    ),
    "intransigence": Metric("intransigence", "unit of the score", None, None, 0.0, "low", RIEMANNIAN,
        formula="mean over k of a*_k − R[k,k], a* trained jointly",
    ),
    "lca": Metric(
        "learning-curve area",
        "unit of the score",
        None,
        None,
        None,
        "high",
        "Chaudhry et al. (2019), Efficient lifelong learning with A-GEM",
        formula="mean over b = 0 … β, and over tasks, of the score after b updates of the task",
    ),
    "min_acc": Metric("worst score since the task ended", "unit of the score", None, None, None, "high", DELANGE,
        formula="mean over old tasks of the minimum since their own training ended",
    ),
    "wc_acc": Metric("worst-case score", "unit of the score", None, None, None, "high", DELANGE,
        formula="score(k)/k + (1 − 1/k) · min_acc",
    ),
    "wf": Metric("windowed forgetting", "unit of the score", 0.0, None, None, "low", DELANGE,
        formula="mean over tasks of the largest drop inside w consecutive evaluations, at least 0",
    ),
    "wp": Metric("windowed plasticity", "unit of the score", 0.0, None, None, "high", DELANGE,
        formula="mean over tasks of the largest gain inside w consecutive evaluations, at least 0",
    ),
    "forgotten_between": Metric("lost until the task came again", "unit of the score", None, None, 0.0, "low", LESORT,
        formula="score after presentation j − 1 less the score just before presentation j",
    ),
    "accumulation": Metric("gained beyond the first presentation", "unit of the score", None, None, 0.0, "high", LESORT,
        formula="score after presentation j less the score after the first",
    ),
    "plasticity_loss": Metric("learned worse than alone", "unit of the score", None, None, 0.0, "low", DOHARE,
        formula="score of the task learned alone less its score learned in the stream, equal updates",
    ),
    "plasticity_trend": Metric(
        "change of plasticity loss for each task before", "unit of the score per task", None, None, 0.0, "low", DOHARE,
        formula="least-squares slope of plasticity loss over the place in the stream",
    ),
}  # fmt: skip


def rows(
    metric: str,
    value,
    *,
    run: str,
    step: int = 0,
    group="all",
    item="all",
    lo=np.nan,
    hi=np.nan,
    n=1,
    beside: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Build table rows of one metric; scalars are repeated to the length of ``value``.

    Args:
        metric: A key of :data:`METRICS`.
        value: Scalar or one number per row, in the metric's unit.
        run, step, group, item: Coordinates, scalar or one per row.
        lo, hi: Interval bounds, NaN where none was estimated.
        n: How many measurements were pooled, 1 for a single item.
        beside: Further columns: coordinates, ``se`` or ``reason``.

    Raises:
        KeyError: If the metric is not registered.
    """
    if metric not in METRICS:
        raise KeyError(f"rows: {metric!r} is not in METRICS; add it there first")
    value = np.atleast_1d(np.asarray(value, dtype=float))
    columns = dict(run=run, step=step, group=group, item=item, metric=metric)
    columns |= dict(value=value, lo=lo, hi=hi, n=n) | dict(beside or {})
    length = max([len(value)] + [len(c) for c in columns.values() if _is_column(c)])
    if len(value) == 1 and length != 1:
        columns["value"] = np.repeat(value, length)
    # an Index other than 0..n-1 (a slice of an items frame) must not realign the columns
    plain = {k: np.asarray(v) if isinstance(v, pd.Series) else v for k, v in columns.items()}
    return pd.DataFrame(plain, index=range(length))


def _is_column(value) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str)


def coordinates(table: pd.DataFrame) -> list[str]:
    """Columns that say where a measurement was taken; all but the value and what rides beside it."""
    return [name for name in table.columns if name not in BESIDE_VALUE]


def validate(table: pd.DataFrame) -> pd.DataFrame:
    """Check a table and return it with its types settled (text as categoricals, floats, ints).

    Raises:
        InputError: Missing columns, unknown metrics, values out of a metric's range, ``lo > hi``
            or two rows with the same coordinates; the first offender is named.
    """
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise InputError(
            f"validate: the table lacks the columns {', '.join(missing)}; "
            f"it has {', '.join(map(str, table.columns))}"
        )
    table = table.reset_index(drop=True).copy(deep=False)
    for name in table.columns:
        if name in ("value", "lo", "hi", "se", *FLOOR, *BOOTSTRAP):
            table[name] = table[name].astype("float64")
        elif name in ("step", "n"):
            if table[name].isna().any():
                raise InputError(f"validate: {name} is missing in {table[name].isna().sum()} rows")
            table[name] = table[name].astype("int64")
        elif name in TEXT or name == "reason" or _is_text(table[name]):
            table[name] = table[name].astype(str if name in TEXT else "str").astype("category")
    unknown = [m for m in table["metric"].cat.categories if m not in METRICS]
    if unknown:
        raise InputError(
            f"validate: unknown metric {unknown[0]!r}; known are {', '.join(sorted(METRICS))}"
        )
    if (table["lo"] > table["hi"]).any():
        first = table[table["lo"] > table["hi"]].iloc[0]
        raise InputError(f"validate: lo {first.lo} > hi {first.hi} in {_where(first, table)}")
    for key, part in table.groupby("metric", observed=True)["value"]:
        metric, slack = METRICS[key], 1e-6
        low = part < metric.low - slack if metric.low is not None else part != part
        high = part > metric.high + slack if metric.high is not None else part != part
        # NaN != NaN, so an unbounded side must not count the undefined as out of range
        outside = part[(low | high) & part.notna()]
        if len(outside):
            first = table.loc[outside.index[0]]
            raise InputError(
                f"validate: {key} is {first.value}, outside {metric.low} to {metric.high}, "
                f"in {_where(first, table)}"
            )
    names = coordinates(table)
    again = table.duplicated(names)
    if again.any():
        first = table[again].iloc[0]
        raise InputError(
            f"validate: {again.sum()} rows repeat the coordinates of another, first "
            f"{_where(first, table)}; pool them or add the coordinate that tells them apart"
        )
    return table


def _is_text(column: pd.Series) -> bool:
    return (
        isinstance(column.dtype, pd.CategoricalDtype)
        or pd.api.types.is_string_dtype(column.dtype)
        or column.dtype == object
    )


def _where(row: pd.Series, table: pd.DataFrame) -> str:
    return ", ".join(f"{name}={row[name]}" for name in coordinates(table))


def one_metric(table: pd.DataFrame, asker: str) -> Metric:
    """The one metric a table holds; a plot of two units on one axis is refused.

    Raises:
        InputError: If the table is empty or holds several metrics.
    """
    keys = list(table["metric"].astype(str).unique())
    if len(keys) != 1:
        held = ", ".join(keys) if keys else "none"
        raise InputError(f"{asker}: needs rows of one metric, got {held}; select one first")
    return METRICS[keys[0]]


def save(table: pd.DataFrame, path: str | Path, *, passport: Mapping | None = None) -> Path:
    """Write a validated table as Parquet with its passport in the metadata, whole or not at all.

    Args:
        passport: Where the numbers come from: model source, revision and weight hash, items hash,
            seed, device, dtype, versions. JSON values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    data = pa.Table.from_pandas(validate(table), preserve_index=False)
    note = json.dumps({"version": VERSION, **(passport or {})}, sort_keys=True, default=str)
    data = data.replace_schema_metadata(
        {**(data.schema.metadata or {}), PASSPORT_KEY: note.encode()}
    )
    with whole_file(path) as temporary:
        pq.write_table(data, temporary, compression="zstd", write_page_checksum=True)
    return path


def load(path: str | Path) -> pd.DataFrame:
    """Read a table that :func:`save` wrote; its passport is in ``.attrs["passport"]``.

    Raises:
        InputError: No such file, or not a table of this version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise InputError(f"load: no table at {path}")
    try:
        data = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"load: {path} is not a whole Parquet file ({reason})") from None
    note = (data.schema.metadata or {}).get(PASSPORT_KEY)
    if note is None:
        raise InputError(
            f"load: {path} carries no passport, so it was not written by save(); read a panel from "
            "elsewhere with pandas.read_parquet and hand that on"
        )
    passport = json.loads(note)
    if passport.get("version") != VERSION:
        raise InputError(
            f"load: {path} has layout version {passport.get('version')}, this is {VERSION}; "
            "make it again"
        )
    table = validate(data.to_pandas())
    table.attrs["passport"] = passport
    return table


@contextlib.contextmanager
def whole_file(path: str | Path):
    """Give a temporary name beside ``path`` to write to; renamed on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files for the owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path):
    """Give a temporary folder beside ``path`` to fill; renamed on success, removed on failure.

    Raises:
        FileExistsError: If ``path`` is there already; nothing is overwritten.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        if path.exists():
            raise FileExistsError(f"whole_folder: {path} was made meanwhile")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders for the owner alone
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Where suites and converted models are kept: ``WORKBENCH_CACHE``, or the user's cache."""
    import platformdirs

    given = os.environ.get("WORKBENCH_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("memory-workbench"))
