"""How many bits a model can hold: small models trained on random tokens until no more go in.

Uniform random tokens have nothing to generalise from, so every bit that a model saves on them it
has memorized (Morris et al. 2025, "How much do language models memorize?"). Each (shape, number of
sequences, seed) is a run of its own, kept in the cache when it is done; a killed experiment goes on
where it stopped, and a long run within it from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from workbench.cache import keep, look
from workbench.models import LanguageModel, versions
from workbench.table import InputError, cache_folder, load, rows, save, validate
from workbench.training import TextStream, Trainer, load_states, save_states

VERSION = 1  # raise it when the same run gives other numbers
DECAY = 0.4  # share of the updates over which the learning rate falls to 0
CHECKPOINT = 60.0  # seconds of training that a kill may cost
SIZES = ("mini", "default", "full")
MINI = {4: (4, 16, 48), 8: (8, 40, 120)}  # width to numbers of sequences
DEFAULT = {8: (16, 32, 64, 96, 144), 16: (48, 96, 160, 256, 384)}


@dataclass(frozen=True)
class Run:
    """All that decides a run's numbers, but for machine and thread count.

    A GPT-NeoX model without tied embeddings is trained on ``sequences`` sequences of ``length``
    tokens drawn uniformly from ``vocabulary``; one more id begins each sequence and is never a
    target, so that all ``length`` tokens are predicted and counted.
    """

    width: int
    sequences: int
    seed: int
    updates: int
    layers: int = 1
    heads: int = 2
    vocabulary: int = 256
    length: int = 32
    rows: int = 512  # sequences of a batch, all of them where there are fewer
    learning_rate: float = 0.03
    warmup: int = 25
    version: int = VERSION

    def __post_init__(self):
        for name in ("width", "sequences", "layers", "heads", "length", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"Run: {name} is {getattr(self, name)}, needs at least 1")
        if self.vocabulary < 2:
            raise InputError(f"Run: vocabulary is {self.vocabulary}, needs at least 2")
        if self.updates < 4:
            raise InputError(
                f"Run: updates is {self.updates}, needs at least 4: half of them, too, must end "
                "with a falling learning rate"
            )
        if self.width % (2 * self.heads):
            raise InputError(
                f"Run: a width of {self.width} does not give each of {self.heads} heads an even "
                "share; rotary positions need one"
            )

    @property
    def hash(self) -> str:
        data = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(data.encode(), digest_size=8).hexdigest()

    @property
    def work(self) -> int:
        """Tokens that all its updates take, the fork at half of them included."""
        half = self.updates // 2
        fork = half - _stable(half)
        return (self.updates + fork) * min(self.rows, self.sequences) * self.length


def capacity_runs(size: str = "default") -> list[Run]:
    """The runs of an experiment: some widths, for each a geometric grid of data sets, some seeds.

    Args:
        size: ``mini`` (two toy models, half a minute on two cores), ``default`` (5,000 and 11,500
            parameters, ten minutes on two cores), ``full`` (five widths up to 29,000 parameters and
            four times the updates: a night).

    Raises:
        InputError: Another word.
    """
    if size == "mini":
        grid, seeds, most = MINI, (0, 1), 300
        shape = {"vocabulary": 64, "warmup": 10}
    elif size == "default":
        grid, seeds, most = DEFAULT, (0, 1), 1500
        shape = {}
    elif size == "full":
        widths = (8, 12, 16, 24, 32)
        grid = {w: tuple(w * 2**k for k in range(1, 6)) for w in widths}
        seeds, most, shape = (0, 1, 2), 6000, {}
    else:
        raise InputError(f"capacity_runs: size {size!r}; choose {', '.join(SIZES)}")
    return [
        Run(width=width, sequences=n, seed=seed, updates=most, **shape)
        for width, sequences in grid.items()
        for n in sequences
        for seed in seeds
    ]


def load_capacity(size: str | Sequence[Run] = "default", *, progress: bool = True) -> pd.DataFrame:
    """The runs of an experiment, each trained first if it is not cached.

    Memorized bits are ``N S log2 V - sum(-log2 p)`` over all N sequences of S tokens. A model of
    the *set* of sequences cannot know which of them comes next, so the most that any model can
    save is ``ceiling_bits = N S log2 V - N H``, H the entropy of drawing one of the sequences:
    log2 N where all differ.

    Args:
        size: A word that :func:`capacity_runs` knows, or runs of one's own.
        progress: Show a bar with the time left.

    Returns:
        Two rows a run, ``group`` "random": ``memorized_bits`` (0 for a model that says all tokens
        are equally likely, below 0 for a worse one, ``ceiling_bits`` at best) and
        ``doubling_gain``, the share of them that the second half of the updates added: the same
        run, ended at half its updates by a decay of its own, is what it is compared with. NaN with
        a reason where nothing was memorized. ``step`` counts updates. Coordinates ``parameters``
        (all trainable ones, both embeddings included), ``non_embedding`` (without the two),
        ``sequences``, ``dataset_bits`` (N S log2 V), ``ceiling_bits`` and ``seed``.
        ``.attrs["passport"]`` has the versions and ``cpu_seconds`` of the training (of a run that
        was killed, from its last checkpoint on).

    Raises:
        InputError: Unknown size, no runs or one twice, a training that breaks.
    """
    runs = capacity_runs(size) if isinstance(size, str) else list(size)
    if not runs:
        raise InputError("load_capacity: no runs; give some, or a size such as default")
    if len({run.hash for run in runs}) < len(runs):
        raise InputError("load_capacity: the same run is asked for twice; leave one out")
    found = {run.hash: look(_place(run), load)[0] for run in runs}
    left = [run for run in runs if found[run.hash] is None]
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    with tqdm(
        total=sum(run.work for run in left),
        desc="capacity",
        unit="token",
        unit_scale=True,
        disable=not progress or not left,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    ) as bar:
        for run in left:
            bar.set_postfix(width=run.width, sequences=run.sequences, refresh=False)
            found[run.hash] = _ensure(run, bar.update)
    tables = [found[run.hash] for run in runs]
    table = validate(pd.concat([t.astype({"metric": str}) for t in tables], ignore_index=True))
    seconds = sum(t.attrs["passport"]["cpu_seconds"] for t in tables)
    table.attrs["passport"] = {
        "runs": hashlib.blake2b(
            "".join(run.hash for run in runs).encode(), digest_size=8
        ).hexdigest(),
        "cpu_seconds": round(seconds, 1),
        **versions(),
    }
    return table


def memorized_bits(log_probability: Float[np.ndarray, "sequence token"], vocabulary: int) -> float:
    """``N S log2 V - sum(-log2 p)`` of uniform random tokens, from log-probabilities in nats.

    0 where every token has probability 1/V, ``N S log2 V`` where every one has 1; two sequences
    of one letter each from an alphabet of 4, said with .5 and .25, give 4 - 3 = 1 bit.
    """
    nats = log_probability.sum(dtype=np.float64)
    return float(log_probability.size * math.log2(vocabulary) + nats / math.log(2))


def random_sequences(run: Run) -> Int[np.ndarray, "sequence pos"]:
    """The sequences of a run, each begun by the id ``vocabulary`` that is no token of its own."""
    drawn = np.random.default_rng([run.seed, run.sequences, 6]).integers(
        0, run.vocabulary, (run.sequences, run.length)
    )
    return np.insert(drawn, 0, run.vocabulary, axis=1)


def _ceiling(run: Run, tokens: Int[np.ndarray, "sequence pos"]) -> float:
    _, count = np.unique(tokens, axis=0, return_counts=True)
    entropy = -(count * np.log2(count / run.sequences)).sum()  # N H, in bits
    return run.sequences * run.length * math.log2(run.vocabulary) - float(entropy)


def _new_module(run: Run) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        module = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=run.vocabulary + 1,
                hidden_size=run.width,
                num_hidden_layers=run.layers,
                num_attention_heads=run.heads,
                intermediate_size=4 * run.width,
                max_position_embeddings=run.length + 1,
                # heads this narrow have no dimension to spare that knows no position
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                },
                hidden_dropout=0.0,
                attention_dropout=0.0,
                tie_word_embeddings=False,
                bos_token_id=run.vocabulary,
                eos_token_id=run.vocabulary,
            )
        )
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


# --- one run -------------------------------------------------------------------------------------


def _stable(updates: int) -> int:
    """Updates before the learning rate begins to fall."""
    return updates - round(DECAY * updates)


def rate(run: Run, update: int, until: int) -> float:
    """Learning rate of an update, from 1: warm-up, constant, then linearly to 0 after ``until``."""
    falling = until - _stable(until)
    return (
        run.learning_rate
        * min(1.0, update / run.warmup if run.warmup else 1.0)
        * min(1.0, (until + 1 - update) / (falling + 1))
    )


def train_run(
    run: Run, place: Path | None = None, progress: Callable[[int], object] | None = None
) -> dict[str, float]:
    """Train one run, with a fork that ends at half of the updates.

    Up to where the half's learning rate begins to fall both are one, so the fork costs a fifth
    more and tells what doubling the updates gained.

    Args:
        place: File for checkpoints of a run that takes long; it is gone when the run is done.
        progress: Called with the tokens each update took.

    Returns:
        ``memorized_bits`` at the end and ``half``, the same of the fork.

    Raises:
        InputError: The loss is not finite.
    """
    tokens = random_sequences(run)
    batch = min(run.rows, run.sequences)
    stream = TextStream(tokens.ravel(), batch, run.length + 1, run.seed).batch
    trainer = Trainer(_new_module(run), run.learning_rate)
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0  # it would trade memory away
    model = LanguageModel(trainer.module, None, "capacity")
    half = run.updates // 2
    at = _resume(place, trainer, run, progress, batch * run.length)
    saved = time.monotonic()
    while trainer.update < run.updates:
        if trainer.update == _stable(half) and at["fork"] is None:
            at["fork"] = trainer.state()
        until = half if at["fork"] is not None and at["half"] is None else run.updates
        update = trainer.update + 1
        trainer.learning_rate = rate(run, update, until)
        try:
            trainer.step(stream(update))
        except FloatingPointError as error:
            raise InputError(f"load_capacity: {error} of the run of {run}") from None
        if progress:
            progress(batch * run.length)
        if until == half and trainer.update == half:
            at["half"] = _held(model, tokens, run)
            trainer.restore(at["fork"])
        if place and time.monotonic() - saved > CHECKPOINT:
            states = {"trainer": trainer.state()} | ({"fork": at["fork"]} if at["fork"] else {})
            save_states(place, states, about={"half": at["half"]})
            saved = time.monotonic()
    return {"memorized_bits": _held(model, tokens, run), "half": at["half"]}


def _held(model: LanguageModel, tokens: np.ndarray, run: Run) -> float:
    # the first id is context: what is scored are all tokens that were drawn
    scores = model.score(tokens, start=1, keep=("log_probability",))
    return memorized_bits(scores.log_probability, run.vocabulary)


def _resume(place, trainer: Trainer, run: Run, progress, tokens: int) -> dict:
    """Where a killed run stood, or the beginning."""
    at = {"fork": None, "half": None}
    if place is None or not place.is_file():
        return at
    try:
        states, about = load_states(place)
    except InputError as error:
        warnings.warn(
            f"load_capacity: the checkpoint {str(error).removeprefix('load_states: ')}; "
            "from the beginning",
            stacklevel=2,
        )
        return at
    trainer.restore(states["trainer"])
    at = {"fork": states.get("fork"), "half": about["half"]}
    if progress:
        half = run.updates // 2
        fork = half - _stable(half) if at["half"] is not None else 0
        progress((trainer.update + fork) * tokens)
    return at


# --- the cache -----------------------------------------------------------------------------------


def _place(run: Run) -> Path:
    return cache_folder() / "capacity" / f"{run.hash}.parquet"


def _ensure(run: Run, progress: Callable[[int], object]) -> pd.DataFrame:
    """A run's rows, trained into the cache if they are not there."""
    place, trained = _place(run), []

    def make() -> pd.DataFrame:
        trained.append(run)
        checkpoint = place.with_suffix(".checkpoint")
        began = time.process_time()
        held = train_run(run, checkpoint, progress)
        seconds = time.process_time() - began
        made = _rows(run, held)
        made.attrs["passport"] = {"run": asdict(run), "cpu_seconds": seconds, **versions()}
        return made

    def write(made: pd.DataFrame, at: Path) -> None:
        save(made, at, passport=made.attrs["passport"])
        place.with_suffix(".checkpoint").unlink(missing_ok=True)

    made = keep(place, make, read=load, write=write, asker="load_capacity", again="training again")
    if not trained:  # by another process, meanwhile
        progress(run.work)
    return made


def _rows(run: Run, held: dict[str, float]) -> pd.DataFrame:
    module = _new_module(run)
    count = sum(p.numel() for p in module.parameters())
    embeddings = (module.get_input_embeddings(), module.get_output_embeddings())
    bits = held["memorized_bits"]
    gain = (bits - held["half"]) / bits if bits > 0 else np.nan
    found = {"memorized_bits": (bits, ""), "doubling_gain": (gain, "")}
    if not bits > 0:
        found["doubling_gain"] = (gain, "nothing was memorized")
    beside = {
        "parameters": count,
        "non_embedding": count - sum(each.weight.numel() for each in embeddings),
        "sequences": run.sequences,
        "dataset_bits": run.sequences * run.length * math.log2(run.vocabulary),
        "ceiling_bits": _ceiling(run, random_sequences(run)),
        "seed": run.seed,
    }
    name = f"random-{run.width}x{run.layers}-{run.vocabulary}"
    item = f"{run.sequences}x{run.length}-{run.seed}"
    parts = [
        rows(metric, value, run=name, step=run.updates, group="random", item=item,
             beside=beside | {"reason": reason})
        for metric, (value, reason) in found.items()
    ]  # fmt: skip
    return validate(pd.concat(parts, ignore_index=True))
