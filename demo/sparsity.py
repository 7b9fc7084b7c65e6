"""A picture of what was read to answer one question: `python -m demo.sparsity --document demo/spec.txt --question "..." --plot FILE`.

For each layer, and each token of the answer, the tokens of the document that the indexer selected; those of the fact asked for (every
place where `--needle` stands) are lit. Runs the serving engine on the CPU.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo.patterns import token_id
from demo.quiz import CHECKPOINT, MAX_ANSWER_TOKENS, load_tokenizer
from demo.selections import Recorder
from workers.checkpoint import ASSISTANT, BOS, EOS, THINK_END, USER
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.request import Request, SamplingParams
from workers.start import make_engine


@dataclass(frozen=True)
class Reading:
    """What was selected while an answer was written.

    prompt_tokens: of document and question together; document_tokens: of the document, which comes first
    words:         the tokens of the answer as text
    selected:      int64 [layers, answer tokens, topk] positions, -1 padded: what the row that wrote each token saw
    needle:        positions of the tokens that are looked for
    """

    prompt_tokens: int
    document_tokens: int
    words: list[str]
    selected: torch.Tensor
    needle: list[int]


def read(checkpoint: Path, document: str, question: str, needle: str) -> Reading:
    """Asks greedily. Raises ValueError if the needle is not in the document."""
    tokenizer = load_tokenizer(checkpoint)
    body = [token_id(tokenizer, BOS), *tokenizer.encode(document).ids]
    asked = tokenizer.encode(question).ids
    turn = [token_id(tokenizer, USER), *asked, token_id(tokenizer, ASSISTANT), token_id(tokenizer, THINK_END)]
    prompt = body + turn
    recorder = Recorder()
    engine, _ = make_engine(checkpoint, EngineConfig(), ops=recorder.ops)
    request = Request(
        "question",
        list(prompt),
        len(prompt),
        SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0),
        namespace=b"sparsity",
    )
    engine.add(request)
    steps: list[torch.Tensor] = []
    layers = ModelConfig.load(checkpoint).num_hidden_layers
    recorder.on = True
    while engine.has_work():
        engine.step()
        last_rows = torch.stack([taken[-1] for taken in recorder.taken[-layers:]])
        recorder.taken.clear()
        if request.num_output_tokens:
            steps.append(last_rows)
    answer = request.tokens[len(prompt) :]
    return Reading(
        prompt_tokens=len(prompt),
        document_tokens=len(body),
        words=[tokenizer.decode([token], skip_special_tokens=False) for token in answer],
        selected=torch.stack(steps, dim=1),
        needle=_places(tokenizer, document, needle),
    )


def _places(tokenizer: Tokenizer, document: str, needle: str) -> list[int]:
    """Positions in the prompt of the tokens of every occurrence."""
    encoding = tokenizer.encode(document)
    places: list[int] = []
    start = document.find(needle)
    while start >= 0:
        end = start + len(needle)
        places += [1 + number for number, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
        start = document.find(needle, end)
    if not places:
        raise ValueError(f"needle {needle!r} is not in the document")
    return places


def found(reading: Reading) -> torch.Tensor:
    """bool [layers, answer tokens]: whether a token of the needle was selected."""
    return torch.isin(reading.selected, torch.tensor(reading.needle)).any(-1)


def plot(reading: Reading, question: str, path: Path) -> None:
    from matplotlib.figure import Figure  # here: it takes longer to import than all the rest

    layers, count, topk = reading.selected.shape
    figure = Figure(figsize=(11, 2.1 * layers), layout="constrained")
    axes = figure.subplots(layers, 1, sharex=True)
    needle = torch.tensor(reading.needle)
    for layer, axis in enumerate(axes):
        axis.axvspan(
            reading.document_tokens, reading.prompt_tokens + count, color="tab:blue", alpha=0.08, lw=0
        )
        axis.axvline(float(needle.float().mean()), color="tab:orange", lw=6, alpha=0.25)
        for row, picks in enumerate(reading.selected[layer]):
            seen = picks[picks >= 0]
            lit = torch.isin(seen, needle)
            axis.scatter(seen[~lit], [row] * int((~lit).sum()), s=4, color="0.45", lw=0)
            axis.scatter(seen[lit], [row] * int(lit.sum()), s=18, color="tab:orange", lw=0, zorder=3)
        axis.set_yticks(range(count), [_label(word) for word in reading.words], fontsize=6)
        axis.set_ylim(count - 0.5, -0.5)
        axis.set_ylabel(f"layer {layer}")
    axes[-1].set_xlabel("position; the fact in orange, question and answer shaded")
    figure.suptitle(
        f"{question}\nThe {topk} tokens that each layer reads of {reading.prompt_tokens}, for each token of the answer",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _label(word: str) -> str:
    return "end" if word == EOS else word.strip() or "(space)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sparsity", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--needle", required=True, help="the sentence of the document that has the answer")
    parser.add_argument("--plot", type=Path, required=True, help="PNG")
    arguments = parser.parse_args()
    reading = read(arguments.checkpoint, arguments.document.read_text(), arguments.question, arguments.needle)
    print("".join(reading.words))
    for layer, row in enumerate(found(reading).tolist()):
        hits = [word for word, hit in zip(reading.words, row, strict=True) if hit]
        print(f"layer {layer}: the fact was selected for {len(hits)} of {len(row)} tokens: {hits}")
    plot(reading, arguments.question, arguments.plot)


if __name__ == "__main__":
    main()
