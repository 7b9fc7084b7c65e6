"""How often the demonstration model answers right, by length and by what attention may look at: `python -m demo.evaluate`.

Runs the serving engine. Every way to attend answers the same questions about the same documents; an answer counts only if it is right
to the last token. Prints a table, and writes JSON and a plot if asked.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from demo import selections
from demo.documents import Writer
from demo.quiz import CHECKPOINT, KINDS, PARTS, Quiz, ask, load_tokenizer, make_quiz
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.start import make_engine

LENGTHS = (1024, 4096, 16_384, 32_768, 65_536, 131_072)
WAYS: dict[str, Callable[[], Ops | None]] = {
    "dsa": lambda: None,
    "dense": selections.dense,
    "window": selections.window,
    "random": lambda: selections.at_random(0),
}
MAX_RUNNING = 128
BATCHED_TOKENS = {True: 2048, False: 8192}  # on a CPU or not


@dataclass(frozen=True)
class Score:
    """Right answers to questions of one kind, about facts in one part of documents of one length."""

    way: str
    precision: str
    tokens: int
    kind: str
    part: str | None
    right: int
    asked: int


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    z = 1.96
    if not asked:
        return 0.0, 1.0
    share, spread = right / asked, z * z / asked
    centre = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def score(quizzes: Sequence[Quiz], answers: Sequence[Sequence[list[int]]], **what: str | int) -> list[Score]:
    """One Score for each kind of question and part of the document."""
    counts: dict[tuple[str, str | None], list[int]] = {}
    for quiz, given in zip(quizzes, answers, strict=True):
        for question, answer in zip(quiz.questions, given, strict=True):
            tally = counts.setdefault((question.kind, question.part), [0, 0])
            tally[0] += answer == question.answer
            tally[1] += 1
    return [
        Score(kind=kind, part=part, right=right, asked=asked, **what)  # type: ignore[arg-type]
        for (kind, part), (right, asked) in sorted(counts.items(), key=str)
    ]


def evaluate(
    checkpoint: Path, way: str, precision: str, quizzes: dict[int, list[Quiz]], *, device: str
) -> list[Score]:
    """Puts all quizzes, by length in tokens, to one engine."""
    engine, _ = make_engine(checkpoint, _settings(checkpoint, precision, quizzes, device), ops=WAYS[way]())
    scores = []
    for tokens, documents in quizzes.items():
        started = time.monotonic()
        answers = [ask(engine, quiz) for quiz in documents]
        found = score(documents, answers, way=way, precision=precision, tokens=tokens)
        right, asked = (sum(getattr(part, name) for part in found) for name in ("right", "asked"))
        seconds = time.monotonic() - started
        print(f"{way} {precision} {tokens}: {right} of {asked} right, {seconds:.1f} s", file=sys.stderr)
        scores += found
    return scores


def _settings(checkpoint: Path, precision: str, quizzes: dict[int, list[Quiz]], device: str) -> EngineConfig:
    """Room for one document and for all questions about it at once."""
    model = ModelConfig.load(checkpoint)
    most = max(len(quiz.questions) for documents in quizzes.values() for quiz in documents)
    tokens = max(quizzes) + most * 4 * PAGE_SIZE
    token_bytes = model.cache_layout(precision == "fp8").token_bytes
    return EngineConfig(
        precision=precision,  # type: ignore[arg-type]
        device=device,
        cache_bytes=tokens * token_bytes * model.num_hidden_layers,
        max_waiting=most,
        max_running=min(most, MAX_RUNNING),
        max_batched_tokens=BATCHED_TOKENS[device == "cpu"],
    )


def total(scores: Sequence[Score], **wanted: str | int) -> tuple[int, int]:
    """(right, asked) of all scores that have these values."""
    chosen = [one for one in scores if all(getattr(one, name) == value for name, value in wanted.items())]
    return sum(one.right for one in chosen), sum(one.asked for one in chosen)


def tables(scores: Sequence[Score]) -> list[Table]:
    """For people: each way by length; then, for the way that is served, kinds of questions and parts of the document."""
    runs = list(dict.fromkeys((one.way, one.precision) for one in scores))
    lengths = sorted({one.tokens for one in scores})
    ways = Table(title="Facts answered right, % (95 % confidence)", title_justify="left")
    ways.add_column("tokens", justify="right")
    for way, precision in runs:
        ways.add_column(f"{way} {precision}", justify="right")
    for tokens in lengths:
        cells = (
            _cell(*total(scores, way=way, precision=precision, tokens=tokens, kind="fact"))
            for way, precision in runs
        )
        ways.add_row(str(tokens), *cells)
    kinds = Table(title="DSA in FP8, by kind of question and place of the fact, %", title_justify="left")
    kinds.add_column("tokens", justify="right")
    slices: list[tuple[str, dict[str, str]]] = [
        *((kind, {"kind": kind}) for kind in KINDS.values()),
        *((f"fact at {part}", {"kind": "fact", "part": part}) for part in PARTS),
    ]
    for name, _ in slices:
        kinds.add_column(name, justify="right")
    for tokens in lengths:
        cells = (
            _cell(*total(scores, way="dsa", precision="fp8", tokens=tokens, **wanted)) for _, wanted in slices
        )
        kinds.add_row(str(tokens), *cells)
    return [ways, kinds]


def _cell(right: int, asked: int) -> str:
    if not asked:
        return "-"
    low, high = interval(right, asked)
    return f"{right / asked:.1%} ({100 * low:.1f}-{100 * high:.1f}) of {asked}"


def plot(scores: Sequence[Score], path: Path) -> None:
    """Accuracy by length, one line for each way."""
    from matplotlib.figure import Figure  # here: it takes longer to import than all the rest

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for way, precision in dict.fromkeys((one.way, one.precision) for one in scores):
        lengths = sorted({one.tokens for one in scores if (one.way, one.precision) == (way, precision)})
        counts = [
            total(scores, way=way, precision=precision, tokens=tokens, kind="fact") for tokens in lengths
        ]
        shares = [100 * right / asked for right, asked in counts]
        bounds = [interval(*count) for count in counts]
        axis.plot(lengths, shares, marker="o", label=f"{way} {precision}")
        axis.fill_between(
            lengths, [100 * low for low, _ in bounds], [100 * high for _, high in bounds], alpha=0.15
        )
    axis.set(
        title="Facts answered right, to the last token",
        xlabel="tokens of document and question",
        ylabel="%",
        xscale="log",
        ylim=(-2, 102),
    )
    axis.set_xticks(lengths, [f"{tokens // 1024}k" for tokens in lengths])
    axis.minorticks_off()
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = _arguments()
    tokenizer = load_tokenizer(arguments.checkpoint)
    writer = Writer(tokenizer, "cpu")
    quizzes = {
        tokens: [
            make_quiz(tokenizer, tokens=tokens, questions=arguments.questions, seed=seed, writer=writer)
            for seed in range(arguments.documents)
        ]
        for tokens in arguments.lengths
    }
    torch.set_float32_matmul_precision("high")
    scores = [Score(**one) for path in arguments.add for one in json.loads(path.read_text())["scores"]]
    for way in arguments.ways:
        scores += evaluate(arguments.checkpoint, way, "fp8", quizzes, device=arguments.device)
    if arguments.fp32_checkpoint:
        scores += evaluate(arguments.fp32_checkpoint, "dsa", "fp32", quizzes, device=arguments.device)
    console = Console(width=200)
    for table in tables(scores):
        console.print(table)
    result = {
        "questions": arguments.questions,
        "documents": arguments.documents,
        "scores": [asdict(one) for one in scores],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(scores, arguments.plot)
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--fp32-checkpoint", type=Path, help="the same model before it was quantised")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="TOKENS")
    parser.add_argument("--documents", type=int, default=8, help="of each length")
    parser.add_argument("--questions", type=int, default=64, help="about each document")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--add", nargs="+", type=Path, default=[], metavar="JSON", help="scores to show too, from other runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
