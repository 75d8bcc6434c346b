"""Whether a model still speaks: one score of what it writes behind fixed prompts, greedily and sampled.

    score = words · steadiness · variety · length [· likeness]

words: share of common English words among all, divided by the original's share, or 0.58 without it; 1 where
    the original does not write English.
steadiness: 1 − 2 × the share of tokens that repeat the token before.
variety: distinct among all runs of three tokens, mean over sampled texts; greedy ones of healthy small models
    go in circles too. Divided by the original's.
length: share of texts of at least 4 tokens; a broken model may end at once.
likeness: exp((a − b)/2) for the mean log-likelihoods that the original gives to its own sampled text (b) and
    to this (a), nats a token. Only with an original.

Each is at most 1. Scores of SmolLM2-135M (smol768, quantized with an imatrix), and its mean KL divergence on
wikitext-2:

                   F16   Q4_K_M  IQ3_XXS  IQ2_M   Q2_K   IQ1_M  IQ2_XXS  IQ1_S   TQ1_0
    alone          0.90   0.88    0.82    0.70    0.57    0.55    0.45    0.07    0.05
    with original  0.90   0.93    0.56    0.43    0.48    0.20    0.20    0.01    0.00
    KL divergence         0.02    0.64    0.95            3.5     2.1             12.5

stories15M has 0.97 to 0.99 at F16, Q4_0 and Q4_K_M. The last of these files that writes sentences is IQ2_M,
the first with hardly any words IQ1_S. The threshold lies between them on both scales; IQ1_M and IQ2_XXS,
which write words but go in circles, fail with the original beside them. The prompts are English: a model that
knows none is judged fairly only with its original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

THRESHOLD = 0.3
PROMPTS = (
    "Once upon a time, there was a little girl who",
    "The capital of France is",
    "The weather was cold and the children",
    "Water is important for life because",
    "My favourite food is",
    "In the morning, the man went to the",
    "A computer is a machine that",
    "She opened the door and saw",
)
SAMPLED = 2  # texts for each prompt, beside the greedy one
LENGTH = 48  # tokens of a text
SEED = 0
TEMPERATURE = 0.7
TOP_K = 40  # llama.cpp's own default
SHORT = 4  # tokens; a text of fewer has ended early
ENGLISH = 0.3  # share of common words below which a healthy model does not write English
USUAL_WORDS = 0.58  # share of common words in what SmolLM2-135M writes at 16 bits

# What half of any English text consists of.
_COMMON = """
the of and to a in is it you that he was for on are with as i his they be at one have this from or had by
not but what some we can out other were all there when up use your how said an each she which do their time
if will way about many then them would like so these her make thing him into has look more day could go come
did my no most who over know than first been now find any new take get place made live where after back only
work came show every good give our under name very through just much great think say help before line right
too means old same tell boy want girl around house man woman world people children water food also because
two three little big small long own down should well being still while never
"""
COMMON = frozenset(_COMMON.split())
_WORD = re.compile(r"[^\W\d_]+(?:['’]\w+)?")

REASONS = {
    "words": "few words of what it writes are common ones",
    "steadiness": "it repeats single tokens",
    "variety": "it repeats phrases",
    "length": "it ends texts at once",
    "likeness": "the original would not write what it writes",
}


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    tokens: tuple[int, ...]
    sampled: bool  # or greedy
    ended: bool  # before LENGTH


@dataclass(frozen=True)
class Reference:
    """What the original's texts are like."""

    words: float | None = USUAL_WORDS  # None: the original does not write English
    variety: float = 1.0


@dataclass(frozen=True)
class Coherence:
    parts: Mapping[str, float]
    samples: tuple[Sample, ...]

    @property
    def score(self) -> float:
        return float(np.prod(list(self.parts.values())))

    @property
    def passed(self) -> bool:
        return self.score >= THRESHOLD

    @property
    def reason(self) -> str:
        """The weakest part, in words."""
        name = min(self.parts, key=lambda part: self.parts[part])
        return f"{REASONS[name]} ({name} {self.parts[name]:.2f})"

    @property
    def verdict(self) -> str:
        return f"{self.score:.2f} {'pass' if self.passed else 'FAIL'}"

    @property
    def failure(self) -> str:
        """What a user is told of a file that does not pass."""
        return (
            f"makes no sense when it writes: coherence {self.score:.2f}, below {THRESHOLD}, for "
            f"{self.reason}; "
            "choose a larger type, pass --imatrix, or give some tensors more bits: --rule 'ffn_down=Q4_K'."
        )

    def report(self) -> dict[str, object]:
        """As JSON values."""
        shown = [
            {"prompt": s.prompt, "text": s.text, "sampled": s.sampled, "ended": s.ended} for s in self.samples
        ]
        return {
            "score": self.score,
            "threshold": THRESHOLD,
            "passed": self.passed,
            "weakest": self.reason,
            "parts": dict(self.parts),
            "texts": shown,
        }


def prompts() -> list[tuple[str, bool]]:
    """(prompt, whether sampled) of every text, in the order in which they are generated."""
    return [(p, False) for p in PROMPTS] + [(p, True) for p in PROMPTS for _ in range(SAMPLED)]


def sampler(seed: int = SEED) -> Callable[[int, np.ndarray, Sequence[int]], list[int]]:
    """Chooses tokens for the texts of `prompts`: (step, logits [n, vocab], which texts [n]) → tokens [n].

    Greedy, or by the Gumbel trick: argmax of logits/temperature + noise among the best TOP_K. Noise depends
    on seed, text and step alone.
    """
    is_sampled = [sampled for _, sampled in prompts()]

    def choose(step: int, logits: np.ndarray, texts: Sequence[int]) -> list[int]:
        return [
            _draw(row, np.random.default_rng([seed, text, step])) if is_sampled[text] else int(row.argmax())
            for row, text in zip(logits, texts, strict=True)
        ]

    return choose


def _draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    k = min(TOP_K, logits.size)
    best = np.argsort(-logits, kind="stable")[:k]
    return int(best[np.argmax(logits[best].astype(np.float64) / TEMPERATURE + rng.gumbel(size=k))])


def common_words(texts: Sequence[str]) -> float:
    """Share of words that are common ones, from 0 to 1; what is no letter makes no word."""
    words = [word for text in texts for word in _WORD.findall(text.lower())]
    return sum(word in COMMON for word in words) / max(len(words), 1)


def stutter(tokens: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are equal to the one before."""
    pairs = [pair for text in tokens for pair in pairwise(text)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def distinct_runs(tokens: Sequence[Sequence[int]], n: int = 3) -> float:
    """Distinct among all runs of n tokens of a text, mean over the texts that have one; 1 where none has."""
    runs = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in tokens]
    shares = [len(set(found)) / len(found) for found in runs if found]
    return sum(shares) / len(shares) if shares else 1.0


def reference(samples: Sequence[Sample]) -> Reference:
    """What to compare with, of the original's texts."""
    sampled = [s.tokens for s in samples if s.sampled]
    words = common_words([s.text for s in samples])
    return Reference(words if words >= ENGLISH else None, max(distinct_runs(sampled), 0.05))


def judge(samples: Sequence[Sample], compared: Reference, likeness: float | None = None) -> Coherence:
    """likeness: log-likelihood of the sampled texts under the original less that of its own, nats a token."""
    every = [s.tokens for s in samples]
    sampled = [s.tokens for s in samples if s.sampled]
    words = common_words([s.text for s in samples])
    parts = {
        "words": 1.0 if compared.words is None else min(words / compared.words, 1.0),
        "steadiness": max(1 - 2 * stutter(every), 0.0),
        "variety": min(distinct_runs(sampled) / compared.variety, 1.0),
        "length": sum(len(text) >= SHORT for text in every) / max(len(every), 1),
    }
    if likeness is not None:
        parts["likeness"] = float(min(np.exp(likeness / 2), 1.0))
    return Coherence(parts, tuple(samples))
