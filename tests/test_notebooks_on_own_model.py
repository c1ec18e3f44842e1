"""Every notebook on a folder and a file of one's own: to its end, or one line on what it lacks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import workbench
from tests.conftest import run_notebook
from tests.test_capacity_stats import simulated
from workbench.parameters import read_notebook
from workbench.table import InputError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
EXTRACTED = {"prefix": 8, "suffix": 8}
SHORT = {  # what makes each notebook take about a second
    "capacity": {},
    "edit_stability": EXTRACTED | {"texts": 8, "corpus": "verses"},
    "explore": {"corpus": "verses", "results": "a report's"},
    "extraction": EXTRACTED | {"samples": 2},
    "facts": {"schedules": ["repeated", "single"], "injections": 2, "every": 3, "window": 2},
    "forgetting_curves": EXTRACTED | {"draws": 10},
    "membership": {"neighbours": 2},
    "memorization_profile": EXTRACTED,
    "retention_over_updates": {
        "n_items": 2, "tokens": 16, "exposures": 1, "lags": [0, 1], "learning_rate": 1e-3,
        "kinds": ["unrelated"], "relearn_limit": 0, "interference": "verses",
    },
    "sharpness": {"per_group": 2, "probes": 1, "texts": 6, "held_out": 2, "corpus": "verses"},
    "streams_of_tasks": {"updates": 3, "held_out": 4, "tokens": 16, "lags": [1, 2]},
    "weight_drift": {"texts": 2},
    "what_did_finetuning_forget": {},
}  # fmt: skip


def files(verses: list[str]) -> dict[str, list[dict]]:
    """Files as users bring them; every text is longer than the context."""
    texts = [verse for verse in verses if len(verse) > 100]
    pairs = [{"text": t, "group": ("seen", "unseen")[n % 2]} for n, t in enumerate(texts[:16])]
    met = [n for n in range(16) if n % 2 == 0]
    cohort = {n: {"cohort": (10, 50)[n // 2 % 2]} for n in met}
    dose = {n: {"dose": (1, 2, 4)[n // 2 % 3]} for n in met}
    return {
        "grouped": pairs,
        "plain": [{"text": each["text"]} for each in pairs],
        "cohort": [each | cohort.get(n, {}) for n, each in enumerate(pairs)],
        "doses": [each | cohort.get(n, {}) | dose.get(n, {"dose": 0}) for n, each in enumerate(pairs)],
        "named": [  # groups by names of one's own
            each | ({"group": ("mine", "yours")[n // 2 % 2]} | cohort[n] | dose[n] if n in met else {})
            for n, each in enumerate(pairs)
        ],
        "apart": [each | {"kind": each["group"]} for each in pairs],
        "held out": [each | {"group": "unseen"} for each in pairs],
        "tiny": [each | {"text": f"{n} a"} for n, each in enumerate(pairs)],
        "facts": [
            {
                "entity": f"E{n}", "passage": " ".join(words[:6]), "depth": "verbatim",
                "probe_prefix": " ".join(words[:4]), "probe_target": " ".join(words[4:6]),
            }
            for n, words in enumerate(text.split() for text in texts[:8])
        ],
        "tasks": [{"text": t, "task": "ab"[n % 2]} for n, t in enumerate(texts[:24])],
    }  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory, corpus_file, tokenizer) -> dict[str, str]:
    """A model that knows nothing, checkpoints of one that learns to recite, and the files."""
    folder = tmp_path_factory.mktemp("own")
    verses = Path(corpus_file).read_text(encoding="utf-8").splitlines()
    contents = files(verses)
    for name, entries in contents.items():
        lines = "\n".join(map(json.dumps, entries))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "mine")
    texts = [each["text"] for each in contents["grouped"] if each["group"] == "seen"]
    tokens = torch.tensor([tokenizer(text)["input_ids"][:64] for text in texts])
    module = LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-2)
    for update in range(1, 81):
        module(tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if update in (4, 40, 80):
            module.save_pretrained(folder / "run" / f"checkpoint-{update}")
    for name in ("mine", "run"):
        tokenizer.save_pretrained(folder / name)
    paths = {name: str(folder / f"{name}.jsonl") for name in contents}
    return paths | {
        "mine": str(folder / "mine"),
        "run": str(folder / "run"),
        "before": str(folder / "run" / "checkpoint-4"),
        "after": str(folder / "run" / "checkpoint-80"),
        "verses": corpus_file,
    }


def run(own: dict[str, str], name: str, given: dict, **more) -> dict:
    asked = {key: own.get(value, value) if isinstance(value, str) else value
             for key, value in (SHORT[name] | given).items()}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, few texts
        return run_notebook(name, **asked, **more)


def on(items: str, model: str = "mine", **more) -> dict:
    return {"model": model, "items": items} | more


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("capacity", on("plain"), "No reference: bits saved mean nothing alone."),
        ("capacity", on("grouped", reference="before"), "8 planted texts: "),
        ("capacity", on("named", reference="before"), "8 planted texts: "),
        ("edit_stability", on("grouped", "run"), ""),
        ("edit_stability", on("plain", "after"), "One checkpoint: how an edit carries over"),
        ("extraction", on("grouped"), "No book: add -p book=FILE"),
        ("extraction", on("plain", "run"), "No held-out texts: "),
        ("facts", on("facts", interference="verses"), "which answer is right is not known here"),
        ("forgetting_curves", on("grouped"), "Give a folder of step*/ or checkpoint-*/ folders."),
        ("forgetting_curves", on("plain", "run"), "it needs a column `cohort` in the items"),
        ("forgetting_curves", on("doses", "run"), "All exposures of a text are taken to lie at"),
        ("forgetting_curves", on("named", "run"), "of 8 texts were ever reproduced"),
        ("membership", on("grouped"), "Needs held-out texts and members of several numbers of"),
        ("membership", on("plain"), "No held-out texts: "),
        ("membership", on("held out"), "No held-out texts: "),
        ("membership", on("apart"), "No kind of text has both members and held-out texts"),
        ("memorization_profile", on("grouped"), "No dose and response: it needs controls, and a"),
        ("memorization_profile", on("plain"), "No held-out texts: "),
        ("memorization_profile", on("grouped", "run"), "it needs a column `cohort` in the items"),
        ("memorization_profile", on("cohort", "run"), "placebo cells"),
        ("memorization_profile", on("named", "run"), "placebo cells"),
        ("memorization_profile", on("named"), "One checkpoint: no causal profile"),
        ("retention_over_updates", on("plain"), "relearning left out"),
        ("sharpness", on("grouped"), "One checkpoint: give a folder of step*/"),
        ("sharpness", on("plain", "run"), "there is nothing to compare."),
        ("streams_of_tasks", {"model": "mine", "tasks": "tasks"}, "Nats per token gained"),
        ("weight_drift", on("plain"), "One checkpoint: nothing has moved yet."),
        ("weight_drift", on("grouped", "run", learning_rate=0.3), "A step of 0.3 is too long"),
        (
            "what_did_finetuning_forget",
            {"base": "before", "tuned": "after", "items": "grouped"},
            "Which texts should have changed is not known here.",
        ),
    ],
)  # fmt: skip
def test_it_runs_to_its_end_and_says_what_it_cannot_tell(
    own, tmp_path, monkeypatch, capsys, name, given, said
):
    if name == "capacity":  # half a minute of training that has nothing to do with the model
        draw = np.random.default_rng(0)
        sizes = [simulated(draw, capacity=3 * n, parameters=n, noise=0) for n in (1000, 2000)]
        runs = pd.concat(sizes, ignore_index=True)
        runs.attrs["passport"] = {"cpu_seconds": 1.0}
        monkeypatch.setattr(workbench, "load_capacity", lambda *size, **options: runs)
    run(own, name, given, results=str(tmp_path / "out"))
    assert (tmp_path / "out" / "table.parquet").is_file()
    assert said in capsys.readouterr().out


def test_texts_met_several_times_have_a_profile_of_their_own(own, capsys):
    space = run(own, "memorization_profile", on("doses", "run"))
    assert set(space["effects"]["dose"]) == {1, 2, 4}
    assert "All exposures of a text are taken to lie at its `cohort`" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, given, line",
    [
        ("edit_stability", on("grouped"), "recites none of 8 items of group 'seen'"),
        ("edit_stability", on("named"), "no items of group 'seen'; there are groups mine, "),
        ("facts", on("plain"), "has no column 'passage'"),
        ("memorization_profile", on("tiny"), "none of 16 texts has the 16 tokens asked for"),
        ("memorization_profile", on(""), "your own model needs your own texts: add -p items=FILE"),
        ("retention_over_updates", on("grouped", interference="tiny"), "give more text"),
        ("streams_of_tasks", {"model": "mine"}, "your own model needs your own tasks: add -p tas"),
        ("streams_of_tasks", {"model": "mine", "tasks": "grouped"}, "has no column 'task'"),
        ("what_did_finetuning_forget", {"base": "mine", "items": "plain"}, "add -p tuned=..."),
    ],
)  # fmt: skip
def test_or_says_in_one_line_what_it_lacks(own, name, given, line):
    with pytest.raises(InputError) as caught:
        run(own, name, given)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "items, model, says",
    [
        ("grouped", "mine", ["", "One checkpoint: ", "One checkpoint: ", "", "holds no reports"]),
        (
            "plain",
            "run",
            ["", "needs a column `cohort`", "needs a column `cohort`", "", "holds no"],
        ),
        ("named", "run", ["", "", "", "", "holds no reports"]),
    ],
)
def test_explorers_draw_or_say_in_one_line_what_they_lack(own, tmp_path, items, model, says):
    space = run(own, "explore", on(items, model, reports=str(tmp_path)))
    explorers = [space[name] for name in ("lives", "forgetting", "profile", "curvature", "runs")]
    for explorer, said in zip(explorers, says, strict=True):
        assert said in explorer.message and bool(said) == bool(explorer.message), explorer.message
        assert "Error: " not in explorer.message and "\n" not in explorer.message


def test_no_notebook_is_left_out():
    told = {path.stem: read_notebook(path).parameters for path in NOTEBOOKS.glob("*.ipynb")}
    asks = {stem for stem, each in told.items() if {"model", "items"} <= {p.name for p in each}}
    assert asks - set(SHORT) == {"loss_curvature"}  # tests/test_probe_curvature.py runs it
