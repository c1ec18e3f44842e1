"""Reading what other tools have written; all numbers are made up, the shapes are the real ones."""

import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from statsmodels.stats.proportion import proportion_confint

from workbench.plots import plot_results
from workbench.results import (
    audit_checkpoints,
    load_results,
    recover_n,
    write_example_results,
)
from workbench.table import InputError, load, save, validate


def stderr(right, n):
    return math.sqrt(right / n * (1 - right / n) / (n - 1))


def form_3(accuracy, *, model_args, shots=0, **more):
    """As version 0.3 writes it: no n anywhere, the shots once for the file."""
    scores = {task: {"acc": k / n, "acc_stderr": stderr(k, n)} for task, (k, n) in accuracy.items()}
    config = {"model": "hf-causal", "model_args": model_args, "num_fewshot": shots, "limit": None}
    return {"results": scores, "versions": dict.fromkeys(scores, 0), "config": config} | more


def form_4(results, *, model_args, n=None, shots=None, **more):
    """As version 0.4 writes it: filters in the keys, n and shots by task."""
    counts = {task: {"original": 999, "effective": count} for task, count in (n or {}).items()}
    return {
        "results": results,
        "n-shot": shots or {},
        "n-samples": counts,
        "versions": dict.fromkeys(results, 1.0),
        "config": {"model": "hf", "model_args": model_args, "limit": None},
        "date": 1_700_000_000.5,
        "lm_eval_version": "0.4.9",
    } | more


def put(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def refused(message, *args, **options):
    with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
        load_results(*args, **options)


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


# --- lm-evaluation-harness


def test_form_3_by_hand(tmp_path):
    # 150 of 400: se = sqrt(.375 * .625 / 399) = .0242366, so n = 1 + .234375 / .00058741 = 400.
    # Wilson: centre (.375 + 3.8414588 / 800) / (1 + 3.8414588 / 400) = .3761895, half-width
    # 1.959964 sqrt(.234375 / 400 + 3.8414588 / 640000) / 1.0096036 = .0472321
    path = put(
        tmp_path / "160m_step3000.json",
        form_3({"arc_easy": (150, 400)}, model_args="pretrained=a/b,revision=step2000", shots=5),
    )
    row = one(load_results(path))
    assert row["value"] == 0.375
    assert row["n"] == 400
    np.testing.assert_allclose([row["lo"], row["hi"]], [0.3289574, 0.4234216], atol=1e-6)
    said = [row[k] for k in ("run", "step", "group", "task", "metric", "source_metric", "how")]
    assert said == ["a/b", 2000, "arc_easy, 5-shot", "arc_easy", "accuracy", "acc",
                    "wilson, n from stderr"]  # fmt: skip
    assert (row["shots"], row["declared_step"], row["chance"]) == (5.0, 3000.0, 0.25)
    assert row["file"] == "160m_step3000.json"


def test_form_4_by_hand(tmp_path):
    results = {
        "sums": {"alias": "sums", "exact_match,strict-match": 0.2, "exact_match_stderr,strict-match":
                 stderr(10, 50), "exact_match,flexible-extract": 0.4,
                 "exact_match_stderr,flexible-extract": "N/A", "samples": 50},
        "colours": {"acc,none": 0.5, "acc_stderr,none": stderr(20, 40), "f1,none": 0.31,
                    "f1_stderr,none": "N/A", "oddity,none": 3.0, "bits_per_byte,none": 0.9},
    }  # fmt: skip
    document = form_4(
        results,
        model_args={"pretrained": "a/b", "revision": "step7-tokens4B", "dtype": "bfloat16"},
        n={"sums": 50, "colours": 40},
        shots={"sums": 8, "colours": 0},
        configs={"colours": {"doc_to_choice": ["red", "green", "blue"]}},
        higher_is_better={"colours": {"oddity": False}},
    )
    document["config"]["limit"] = 50
    table = load_results(put(tmp_path / "results_2024-01-02T03-04-05.678.json", document))
    strict = one(table, group="sums, 8-shot, strict-match")
    assert (strict["metric"], strict["n"], strict["how"]) == ("exact_match", 50, "wilson")
    assert strict["source_metric"] == "exact_match,strict-match"
    loose = one(table, group="sums, 8-shot, flexible-extract")
    # 20 of 50 without a standard error: n is enough for Wilson's
    np.testing.assert_allclose(
        [loose["lo"], loose["hi"]], proportion_confint(20, 50, method="wilson"), atol=1e-12
    )
    acc = one(table, source_metric="acc")
    assert acc["chance"] == pytest.approx(1 / 3)  # three answers are offered
    kept = table.set_index("source_metric")["metric"].astype(str)
    assert one(table, source_metric="f1")["group"] == "colours, 0-shot, f1"
    assert acc["group"] == "colours, 0-shot"
    assert kept[["f1", "oddity", "bits_per_byte"]].tolist() == [
        "task_score",
        "task_loss",
        "task_loss",
    ]
    assert one(table, source_metric="f1")["how"] == ""
    assert set(table["step"]) == {7}
    assert set(table["harness"]) == {"0.4.9"}
    assert set(table["limit"]) == {50.0}
    assert set(table["precision"]) == {"bfloat16"}
    assert set(table["task_version"]) == {"1.0"}
    assert table.attrs == {"dropped": {}, "files": 1}


def test_a_mean_of_probabilities_is_no_share(tmp_path):
    # .45 of 100 as 0 or 1 has se .05; a mean of probabilities spreads less, and its own se counts
    results = {"truths": {"acc,none": 0.45, "acc_stderr,none": 0.02}}
    document = form_4(results, model_args="pretrained=a/b,revision=step1", n={"truths": 100})
    row = one(load_results(put(tmp_path / "r.json", document)))
    assert row["how"] == "stderr"
    np.testing.assert_allclose(
        [row["lo"], row["hi"]], [0.45 - 1.959964 * 0.02, 0.45 + 1.959964 * 0.02], atol=1e-7
    )
    assert row["n"] == 100


def test_groups_of_tasks_have_the_items_of_their_parts_and_no_binomial(tmp_path):
    each = {t: {"acc,none": 0.5, "acc_stderr,none": stderr(30, 60)} for t in ("mmlu_a", "mmlu_b")}
    results = {
        "mmlu": {"acc,none": 0.5, "acc_stderr,none": stderr(60, 120), "alias": "mmlu"},
        **each,
    }
    results["empty"] = {" ": " ", "alias": "empty"}
    document = form_4(
        results, model_args="pretrained=a/b,revision=step1", n={"mmlu_a": 60, "mmlu_b": 60},
        shots={"mmlu_a": 0, "mmlu_b": 0},
        group_subtasks={"mmlu": ["mmlu_a", "mmlu_b"], "mmlu_a": [], "mmlu_b": []},
    )  # fmt: skip
    table = load_results(put(tmp_path / "r.json", document))
    whole = one(table, task="mmlu")
    assert (whole["n"], whole["how"]) == (120, "stderr")
    assert math.isnan(whole["shots"])
    assert list(table["task"]) == ["mmlu", "mmlu_a", "mmlu_b"]


def test_neox_and_prompt_lists(tmp_path):
    # an older fork: results are a list of task and prompt; the step is the trainer's iteration
    entry = {"task_name": "pronouns", "prompt_name": "refers to", "em": 0.25, "em_stderr": 0.05,
             "prompt_original_task": True, "subset": None, "comment": ""}  # fmt: skip
    document = {
        "results": [entry, entry | {"prompt_name": "stands for", "em": 0.5}],
        "config": {"model": "neox", "model_args": {"iteration": 135000, "seed": 1234}},
    }
    path = tmp_path / "410M" / "eval_results_02-16-2023-00-59-19.json"
    table = load_results(put(path, document).parent)
    assert list(table["group"]) == ["pronouns+refers to", "pronouns+stands for"]
    assert set(table["step"]) == {135000}
    assert set(table["run"]) == {"410M"}
    assert set(table["metric"]) == {"exact_match"}
    assert table.attrs["dropped"] == {}


def test_mixed_vintages_in_one_folder(tmp_path):
    for step in (0, 512):
        put(tmp_path / "zero-shot" / f"m_step{step}.json",
            form_3({"piqa": (60 + step // 8, 200)}, model_args=f"pretrained=a/b,revision=step{step}"))  # fmt: skip
    results = {"piqa": {"acc,none": 0.75, "acc_stderr,none": stderr(150, 200)}}
    put(tmp_path / "a__b" / "results_2024-01-02T03-04-05.6.json",
        form_4(results, model_args="pretrained=a/b,revision=step1000", shots={"piqa": 0}))  # fmt: skip
    table = load_results(tmp_path).sort_values("step")
    assert list(table["step"]) == [0, 512, 1000]
    assert list(table["n"]) == [200] * 3
    assert set(table["group"]) == {"piqa, 0-shot"}
    assert list(table["declared_shots"])[:2] == [0.0, 0.0]


def test_all_right_takes_n_from_other_steps(tmp_path):
    # se is 0 where all or none are right; the same task's other steps tell how many items it has
    for step, right in ((1, 0), (2, 30), (3, 80)):
        put(tmp_path / f"step{step}.json",
            form_3({"words": (right, 80)}, model_args=f"pretrained=a/b,revision=step{step}"))  # fmt: skip
    table = load_results(tmp_path).sort_values("step")
    assert list(table["n"]) == [80, 80, 80]
    low, high = proportion_confint(np.array([0, 30, 80]), 80, method="wilson")
    np.testing.assert_allclose(table["lo"], low, atol=1e-12)
    np.testing.assert_allclose(table["hi"], high, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 100_000), st.data())
def test_n_is_recovered_from_any_standard_error(n, data):
    right = data.draw(st.integers(1, n - 1))
    assert recover_n(np.array([right / n]), np.array([stderr(right, n)]))[0] == n


def test_n_is_not_recovered_from_what_does_not_fit():
    # rounded to three digits, a mean of probabilities, no error, certainty
    values, errors = np.array([0.375, 0.37, 0.4, 1.0]), np.array([0.024, 0.0242, np.nan, 0.0])
    assert np.isnan(recover_n(values, errors)).all()


def test_percentages_and_unknown_names_are_kept_as_they_came(tmp_path):
    results = {"quiz": {"exact_match": 81.5, "ppl": 12.5, "pct_stereotype": 0.4, "mcc": None,
                        "likelihood_diff": float("inf"), "acc": "N/A"}}  # fmt: skip
    document = {"results": results, "config": {"model_args": "pretrained=a/b,revision=step5"}}
    with pytest.warns(UserWarning, match=r"load_results: left out 1 x no number; see \.attrs"):
        table = load_results(put(tmp_path / "r.json", document))
    got = table.set_index("source_metric")
    assert got.loc["exact_match", ["metric", "value"]].tolist() == ["task_score", 81.5]
    assert got.loc["ppl", "metric"] == "task_loss"
    assert got.loc["pct_stereotype", "metric"] == "outcome"
    assert math.isnan(got.loc["mcc", "value"])
    assert got.loc["mcc", "reason"] == "the file gives no finite number"
    assert math.isnan(got.loc["likelihood_diff", "value"])
    assert table.attrs["dropped"] == {"no number": 1}


def test_samples_are_read_on_request(tmp_path):
    date = "2024-05-01T10-00-00.123456"
    document = form_4({"piqa": {"acc,none": 0.5, "acc_stderr,none": stderr(1, 2)}}, n={"piqa": 2},
                      model_args="pretrained=a/b,revision=step9", shots={"piqa": 3})  # fmt: skip
    put(tmp_path / f"results_{date}.json", document)
    lines = [
        {"doc_id": 17, "acc": 1.0, "filter": "none", "metrics": ["acc"]},
        {"doc_id": 4, "acc": 0},
    ]
    put(tmp_path / f"samples_piqa_{date}.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    assert load_results(tmp_path).attrs["dropped"] == {"single items (items=True reads them)": 1}
    table = load_results(tmp_path, items=True)
    single = table[table["item"] != "all"].set_index("item")
    assert single["value"].to_dict() == {"piqa/17": 1.0, "piqa/4": 0.0}
    assert set(single["step"]) == {9}
    assert set(single["run"]) == {"a/b"}
    assert set(single["group"]) == {"piqa, 3-shot"}
    assert set(single["n"]) == {1}
    assert single["lo"].isna().all()


# --- OpenUnlearning, Trainer, CSV


def unlearning(probabilities):
    return {
        "forget_Q_A_Prob": {
            "agg_value": float(np.mean(probabilities)),
            "value_by_index": {str(i): {"prob": p, "avg_loss": -math.log(p)}
                               for i, p in enumerate(probabilities)},
        },
        "forget_Q_A_ROUGE": {"agg_value": 0.5, "value_by_index": {
            "0": {"rougeL_recall": 0.25, "generation": "made up"}, "1": {"rougeL_recall": 0.75}}},
        "extraction_strength": {"agg_value": 0.1, "value_by_index": {"0": None}},
        "mia_loss": {"agg_value": 0.6, "auc": 0.6},
        # pooled by another rule than the mean, so its items do not say how sure it is
        "forget_truth_ratio": {"agg_value": 0.9, "value_by_index": {"0": {"score": 0.5},
                                                                    "1": {"score": 0.7}}},
        "many": {"agg_value": {"steps": []}},
    }  # fmt: skip


def test_unlearning_by_hand(tmp_path):
    # probabilities .2, .4, .9: mean .5, sd sqrt((.09 + .01 + .16) / 2) = .3605551, se .2081666
    folder = tmp_path / "tofu_GradDiff" / "checkpoint-50" / "evals"
    put(folder / "TOFU_EVAL.json", unlearning([0.2, 0.4, 0.9]))
    put(folder / "TOFU_SUMMARY.json", {"forget_Q_A_Prob": 0.5})
    with pytest.warns(UserWarning, match="1 x no number"):
        table = load_results(tmp_path)
    row = one(table, group="forget_Q_A_Prob")
    assert (row["run"], row["step"], row["metric"]) == ("tofu_GradDiff", 50, "task_score")
    assert (row["value"], row["n"], row["how"]) == (0.5, 3, "stderr")
    np.testing.assert_allclose(row["se"], 0.2081666, atol=1e-7)
    np.testing.assert_allclose(row["lo"], 0.5 - 1.959964 * 0.2081666, atol=1e-6)
    ratio = one(table, group="forget_truth_ratio")
    assert (ratio["metric"], ratio["how"], ratio["n"]) == ("outcome", "", 2)
    metrics = table.set_index("group")["metric"].astype(str)
    assert metrics["extraction_strength"] == "extraction_strength"
    assert metrics["mia_loss"] == "outcome"  # which way an attack's score points is not recorded
    assert table.attrs["dropped"] == {
        "no number": 1,
        "single items (items=True reads them)": 8,
        "summary beside its full EVAL file": 1,
    }
    with pytest.warns(UserWarning):
        items = load_results(tmp_path, items=True)
    assert (
        one(items, source_metric="forget_Q_A_Prob.prob", item="forget_Q_A_Prob/2")["value"] == 0.9
    )
    loss = one(items, source_metric="forget_Q_A_Prob.avg_loss", item="forget_Q_A_Prob/0")
    assert loss["metric"] == "task_loss"
    assert loss["value"] == pytest.approx(-math.log(0.2))


def test_a_summary_alone_is_read(tmp_path):
    put(
        tmp_path / "run" / "checkpoint-5" / "MUSE_SUMMARY.json",
        {"privleak": -40.0, "retain_Q_A_ROUGE": 0.6},
    )
    table = load_results(tmp_path).set_index("group")
    assert table["metric"].astype(str).to_dict() == {
        "privleak": "outcome",
        "retain_Q_A_ROUGE": "task_score",
    }
    assert set(table["step"]) == {5}


def trainer_state(step, log):
    return {"global_step": step, "epoch": 1.0, "log_history": log}


def test_trainer_logs(tmp_path):
    log = [
        {"step": 10, "epoch": 0.1, "loss": 3.5, "learning_rate": 1e-4, "grad_norm": 1.5},
        {
            "step": 20,
            "eval_loss": 3.25,
            "eval_books_loss": 4.0,
            "eval_accuracy": 0.25,
            "eval_runtime": 9.0,
        },
    ]
    late = [{"step": 30, "loss": 9.0}, {"step": 30, "loss": 3.0}]  # resumed: the later one counts
    put(tmp_path / "tuned" / "checkpoint-20" / "trainer_state.json", trainer_state(20, log))
    put(tmp_path / "tuned" / "checkpoint-30" / "trainer_state.json", trainer_state(30, log + late))
    put(tmp_path / "tuned" / "checkpoint-30" / "config.json", {"model_type": "gpt_neox"})
    table = load_results(tmp_path).sort_values(["step", "group"])
    got = table[["step", "group", "metric", "value"]].astype({"group": str, "metric": str})
    assert got.to_numpy().tolist() == [
        [10, "train", "loss", 3.5],
        [20, "books", "loss", 4.0],
        [20, "eval", "loss", 3.25],
        [20, "eval", "accuracy", 0.25],
        [30, "train", "loss", 3.0],
    ]
    assert set(table["run"]) == {"tuned"}
    assert set(table["n"]) == {0}  # a Trainer's log does not say
    assert table["declared_step"].isna().all()
    again = "the same row of a Trainer's log, written again by a later checkpoint"
    assert table.attrs["dropped"][again] == 4
    assert table.attrs["dropped"]["logged twice at one step"] == 1


def test_csv(tmp_path):
    path = put(tmp_path / "scores.csv",
               "step,task,metric,value,n,stderr,run\n100,sums,acc,0.375,400,,mine\n"
               "200,sums,acc,0.4,400,0.0245,mine\n200,sums,ppl,7.5,,0.5,mine\n")  # fmt: skip
    table = load_results(path)
    np.testing.assert_allclose(table["lo"][0], 0.3289574, atol=1e-6)
    assert list(table["metric"].astype(str)) == ["accuracy", "accuracy", "task_loss"]
    np.testing.assert_allclose(table["hi"][2], 7.5 + 1.959964 * 0.5, atol=1e-6)
    assert set(table["run"]) == {"mine"}


# --- steps, runs, repeats


@pytest.mark.parametrize(
    ("arguments", "run", "step"),
    [
        ("pretrained=a/b,revision=step143000", "a/b", 143000),
        ("use_accelerate=True,pretrained=/runs/x/checkpoint-500", "/runs/x", 500),
        ("pretrained=a/b,peft=/runs/y/step40,dtype=float16", "/runs/y", 40),
        ("pretrained=out/global_step12", "out", 12),
        ("pretrained=a/b,revision=stage1-step2000-tokens9B", "a/b", 2000),
    ],
)
def test_what_a_file_records_goes_before_names(tmp_path, arguments, run, step):
    path = put(tmp_path / "iter_77" / "r.json", form_3({"t": (1, 4)}, model_args=arguments))
    row = one(load_results(path))
    assert (row["run"], row["step"], row["declared_step"]) == (run, step, 77)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("pythia-19m-step33000_eval_results_01-20-2023-15-59-05.json", 33000),
        ("global_step0012/r.json", 12),
        ("ckpt-7/evals/r.json", 7),
        ("checkpoint_8/step9.json", 9),
        ("from_step100_step250.json", 250),
        ("five-shot/160m-5shot_step103000.json", 103000),
    ],
)
def test_steps_from_names(tmp_path, name, step):
    path = put(tmp_path / name, form_3({"t": (1, 4)}, model_args="pretrained=a/b,revision=main"))
    assert set(load_results(path)["step"]) == {step}


def test_a_far_folder_declares_nothing(tmp_path):
    arguments = "pretrained=a/b,revision=step5"
    path = put(tmp_path / "step9" / "5-shot" / "a" / "b" / "c" / "r.json",
               form_3({"t": (1, 4)}, model_args=arguments))  # fmt: skip
    row = one(load_results(path))
    assert np.isnan([row["declared_step"], row["declared_shots"]]).all()
    # but where nothing else says it, it is the step
    path = put(path, form_3({"t": (1, 4)}, model_args="pretrained=a/b"))
    assert set(load_results(path)["step"]) == {9}


def test_the_way_out_where_there_is_no_step(tmp_path):
    path = put(tmp_path / "after_900.json", form_3({"t": (1, 4)}, model_args="pretrained=a/b"))
    refused(
        "load_results: after_900.json: no step. The model arguments of 'a/b' name no revision or "
        "iteration with a step, and no name in its path reads like step1000 or checkpoint-500. "
        "Give steps={'after_900.json': 1000}, or step=r'...(\\d+)' to find it in the path",
        path,
    )
    assert set(load_results(path, step=r"after_(\d+)")["step"]) == {900}
    assert set(load_results(path, steps={"after_900.json": 3})["step"]) == {3}
    # the more particular goes first
    assert set(load_results(path, steps={"after_900.json": 3}, step=r"(\d+)")["step"]) == {3}
    assert set(load_results(path, step=r"(\d+)", run="mine")["run"]) == {"mine"}


def test_repeats(tmp_path):
    for day, right in ((3, 20), (1, 10)):
        document = form_3({"t": (right, 40)}, model_args="pretrained=a/b,revision=step5")
        put(tmp_path / f"results_2024-01-0{day}T00-00-00.json", document)
    assert sorted(load_results(tmp_path)["value"]) == [0.25, 0.5]
    latest = load_results(tmp_path, repeats="latest")
    assert list(latest["value"]) == [0.5]
    assert latest.attrs["dropped"] == {"older evaluation of the same (repeats='latest')": 1}


def test_the_table_is_the_one_table(tmp_path):
    write_example_results(tmp_path / "made")
    table = load_results(tmp_path / "made")
    again = load(save(table, tmp_path / "t.parquet"))
    pd.testing.assert_frame_equal(validate(again), validate(table))
    # read in any order and from any list of files, the rows are the same
    files = sorted((tmp_path / "made").rglob("*.json"), reverse=True)
    other = load_results(files)
    keys = ["step", "group", "value", "lo", "hi", "n"]
    order = ["step", "group"]
    pd.testing.assert_frame_equal(
        other[keys].astype({"group": str}).sort_values(order, ignore_index=True),
        table[keys].astype({"group": str}).sort_values(order, ignore_index=True),
    )


# --- what cannot be read


def test_bad_input(tmp_path):
    whole = json.dumps(form_3({"t": (1, 4)}, model_args="pretrained=a/b,revision=step1"))
    put(tmp_path / "a" / "r.json", whole[:60])
    refused(
        f"load_results: no file or folder {tmp_path / 'none'}", tmp_path / "none"
    )  # fmt: skip
    with pytest.raises(InputError, match=r"^load_results: r\.json is not whole JSON \(line 1 of 60 "
                       r"bytes: .*\); copy it again or take it out of the folder$"):  # fmt: skip
        load_results(tmp_path / "a")
    put(tmp_path / "b" / "r.json", {"loss": 3})
    refused(
        "load_results: r.json is JSON of no known form (it has loss); it reads results of "
        "lm-evaluation-harness, OpenUnlearning's *_EVAL.json and trainer_state.json",
        tmp_path / "b" / "r.json",
    )
    put(tmp_path / "b" / "s.json", {"loss": 3})
    refused(
        f"load_results: no results in {tmp_path / 'b'} (saw r.json, s.json; 2 x file of another "
        "kind); it reads lm-evaluation-harness results, OpenUnlearning *_EVAL.json, "
        "trainer_state.json and CSV",
        tmp_path / "b",
    )
    refused("load_results: no file or folder was given", [])
    refused(
        "load_results: repeats is 'all', but must be 'keep' or 'latest'", tmp_path, repeats="all"
    )
    path = put(tmp_path / "c.csv", "step,score\n1,2\n")
    refused(
        "load_results: c.csv has the columns step, score; it needs value, and task or metric, one "
        "measure a line, beside step",
        path,
    )
    path = put(tmp_path / "d.csv", "step,task,value\n1.5,t,2\n")
    refused("load_results: d.csv, line 2: step is '1.5', needs a whole number", path)
    path = put(tmp_path / "e.csv", "step,task,value\n1,t,much\n")
    refused("load_results: e.csv, line 2: value is 'much', needs a number", path)
    path = put(tmp_path / "f" / "r.json", whole)
    refused("load_results: step='\\\\d+' has no group; put the number in ( )", path, step=r"\d+")
    refused("load_results: step='at(\\\\d+)' finds no number in r.json", path, step=r"at(\d+)")
    refused(
        "load_results: steps names 'x.json', but no such file was read", path, steps={"x.json": 1}
    )
    path = put(tmp_path / "samples_t_2024-01-01T00-00-00.jsonl", '{"doc_id": 1, "acc": 1}\n{"doc')
    with pytest.raises(
        InputError, match=r"^load_results: samples_t_.*, line 2, is no whole sample"
    ):
        load_results(path, items=True, step="(2024)")


def test_other_files_are_counted_and_one_bad_one_is_named(tmp_path):
    put(tmp_path / "step1" / "r.json", form_3({"t": (1, 4)}, model_args="pretrained=a/b"))
    put(tmp_path / "step1" / "notes.json", {"text": "mine"})
    put(tmp_path / "step1" / "tokenizer.json", "{" * 9)  # a checkpoint's own file is not opened
    put(tmp_path / "step1" / ".hidden" / "r.json", "{")
    with pytest.warns(UserWarning, match="1 x file of another kind"):
        table = load_results(tmp_path)
    assert table.attrs["dropped"] == {"file of another kind": 1}
    assert len(table) == 1


# --- the example and its figure


def test_the_example_is_reproducible(tmp_path):
    first = write_example_results(tmp_path / "a", seed=3)
    write_example_results(tmp_path / "b", seed=3)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.json"))
    assert len(names) == 30  # 31 steps, one of which is missing on purpose
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )
    assert list(first.columns) == ["kind", "step", "group"]


def test_plot_results(tmp_path):
    write_example_results(tmp_path)
    table = load_results(tmp_path)
    figure = plot_results(table)
    titles = [a.text for a in figure.layout.annotations]
    assert len(titles) == 9
    assert "piqa, 0-shot" in titles
    # per panel a band and a line, and a dotted line where guessing is known (not for `capitals`)
    assert len(figure.data) == 18
    assert len(figure.layout.shapes) == 8
    line = figure.data[1]
    mine = table[table["group"] == titles[0]].sort_values("step")
    np.testing.assert_allclose(line.y, mine["value"].round(6))
    np.testing.assert_allclose(line.x, mine["step"] + 1)
    with pytest.raises(InputError, match="plot_results: several values of a run at one step"):
        plot_results(pd.concat([table, table.assign(file="again")]))
    many = [table[table["task"] == "piqa"].assign(group=f"g{i}") for i in range(61)]
    with pytest.raises(InputError, match="^plot_results: 61 tasks, a page shows 60; select some$"):
        plot_results(pd.concat(many))


# --- checkpoints by content


def weights(seed, *, frozen=7.0, body=None):
    torch.manual_seed(seed)
    made = {
        "a.weight": torch.randn(3, 2),
        "b.weight": torch.randn(4),
        "buffer": torch.full((2,), frozen),
    }
    return made | ({"a.weight": torch.as_tensor(body)} if body is not None else {})


def checkpoint(folder, tensors, **metadata):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata=metadata or None)


def test_checkpoints_by_content(tmp_path):
    run = tmp_path / "run"
    checkpoint(run / "step1", weights(1))
    checkpoint(run / "step2", weights(2), format="pt")
    checkpoint(run / "step3", weights(1), format="pt")  # step 1 under another name and metadata
    checkpoint(run / "step4", weights(4, body=weights(2)["a.weight"].numpy()))
    # shards of step 2 are step 2
    pieces = weights(2)
    checkpoint(run / "step5", {"a.weight": pieces.pop("a.weight")})
    save_file(pieces, run / "step5" / "model-2.safetensors")
    put(run / "step4" / "trainer_state.json", {"global_step": 40})
    (run / "step6").mkdir()
    found = audit_checkpoints(run)
    got = found[["kind", "step", "what"]].astype({"kind": str, "what": str}).to_numpy().tolist()
    assert got == [
        ["identical_weights", 1, "all tensors equal those of step 3"],
        ["identical_weights", 2, "all tensors equal those of step 5"],
        ["identical_weights", 3, "all tensors equal those of step 1"],
        ["identical_weights", 5, "all tensors equal those of step 2"],
        ["partly_identical", 2, "1 of 2 tensors that change elsewhere equal those of step 4"],
        ["partly_identical", 4, "1 of 2 tensors that change elsewhere equal those of step 2"],
        ["step_record", 4, "the folder says step 4, its trainer_state.json 40"],
        ["frozen", 1, "1 of 3 tensors are the same at all 5 checkpoints, first buffer"],
        ["not_read", 6, "no *.safetensors file, so its weights were not compared"],
    ]
    assert set(found["run"]) == {"run"}
    assert found["value"].isna().all()


def test_checkpoints_of_several_runs_and_other_types(tmp_path):
    same = weights(1)
    checkpoint(tmp_path / "one" / "checkpoint-10", same)
    checkpoint(tmp_path / "two" / "checkpoint-10", same)
    # the same bytes as another type are other weights
    checkpoint(tmp_path / "two" / "checkpoint-20",
               {k: v.view(torch.int32) for k, v in same.items()})  # fmt: skip
    found = audit_checkpoints(tmp_path)
    got = found[["kind", "run", "step", "what"]].astype(str).to_numpy().tolist()
    assert got == [
        ["identical_weights", "one", "10", "all tensors equal those of two step 10"],
        ["identical_weights", "two", "10", "all tensors equal those of one step 10"],
    ]


def test_checkpoints_refused(tmp_path):
    with pytest.raises(InputError, match="^audit_checkpoints: no folder "):
        audit_checkpoints(tmp_path / "none")
    checkpoint(tmp_path / "step1", weights(1))
    with pytest.raises(InputError, match="holds 1 folders named like step1000 or checkpoint-500"):
        audit_checkpoints(tmp_path)
    checkpoint(tmp_path / "step2", weights(2))
    path = tmp_path / "step2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"^audit_checkpoints: .*model\.safetensors is not a whole "
                       r"safetensors file \(it ends before its last tensor\); fetch it again$"):  # fmt: skip
        audit_checkpoints(tmp_path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="its header is longer than the file"):
        audit_checkpoints(tmp_path)


def test_no_warning_where_nothing_is_lost(tmp_path):
    write_example_results(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_results(tmp_path)
