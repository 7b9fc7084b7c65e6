"""Questions about a document, put to an engine as the service would put them: the document once, then every question after it.

`python -m demo.quiz --tokens 4096 --to spec.txt` writes a document and prints questions about it with their answers.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo.documents import ABSENT, DOUBLE, KIND_WEIGHTS, SINGLE, Documents, Writer
from demo.patterns import HOLE, token_id
from demo.stages import SENTENCE_TOKENS
from workers.checkpoint import ASSISTANT, BOS, EOS, THINK_END, USER
from workers.engine import Engine
from workers.request import Request, SamplingParams

CHECKPOINT = Path(__file__).parent / "checkpoint"
MAX_ANSWER_TOKENS = 40
KINDS = {SINGLE: "fact", DOUBLE: "two facts", ABSENT: "absent"}
PARTS = ("start", "middle", "end")


@dataclass(frozen=True)
class Question:
    """prompt: the tokens after the document, up to the answer. part: where in the document the fact stands, if there is one."""

    kind: str
    part: str | None
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Quiz:
    """A document as the system message, and questions that are asked independently of each other."""

    document: list[int]
    questions: list[Question]


def make_quiz(
    tokenizer: Tokenizer, *, tokens: int, questions: int, seed: int, writer: Writer | None = None
) -> Quiz:
    """A document such that it and a question take at most, and almost, `tokens` tokens. Facts are half of its sentences."""
    writer = writer or Writer(tokenizer, "cpu")
    room = tokens - 2 * MAX_ANSWER_TOKENS
    sentences = int(room / SENTENCE_TOKENS)
    while True:
        generator = torch.Generator().manual_seed(seed)
        written = writer.write(
            1,
            sentences=sentences,
            facts=sentences // 2,
            questions=questions,
            generator=generator,
            kinds=(*KIND_WEIGHTS[:3], 0.0),
        )
        document = [token_id(tokenizer, BOS), *_full(written.sentences[0])]
        if len(document) <= room:
            return Quiz(document, list(_questions(tokenizer, written)))
        sentences = int(sentences * room / len(document))


def _questions(tokenizer: Tokenizer, written: Documents) -> Iterator[Question]:
    user, assistant, opened, end = (token_id(tokenizer, name) for name in (USER, ASSISTANT, THINK_END, EOS))
    count = written.sentences.shape[1]
    for number, kind in enumerate(written.kinds[0].tolist()):
        place = int(written.places[0, number])
        yield Question(
            kind=KINDS[kind],
            part=PARTS[place * len(PARTS) // count] if place >= 0 else None,
            prompt=[user, *_full(written.questions[0, number]), assistant, opened],
            answer=[*_full(written.answers[0, number]), end],
        )


def _full(ids: torch.Tensor) -> list[int]:
    return [token for token in ids.flatten().tolist() if token != HOLE]


def ask(engine: Engine, quiz: Quiz) -> list[list[int]]:
    """The greedy answers. The first question reads the document, the others find it in the prefix cache."""
    first, *others = (
        Request(
            str(number),
            [*quiz.document, *question.prompt],
            len(quiz.document) + len(question.prompt),
            SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0),
            namespace=b"quiz",
        )
        for number, question in enumerate(quiz.questions)
    )
    for requests in ([first], others):
        for request in requests:
            engine.add(request)
        while engine.has_work():
            engine.step()
    return [request.tokens[request.num_prompt_tokens :] for request in (first, *others)]


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.quiz", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the document and a question")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True, help="file for the document")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(CHECKPOINT)
    quiz = make_quiz(tokenizer, tokens=arguments.tokens, questions=arguments.questions, seed=arguments.seed)
    arguments.to.write_text(tokenizer.decode(quiz.document) + "\n")
    for question in quiz.questions:
        asked, answer = (tokenizer.decode(ids) for ids in (question.prompt[1:-2], question.answer[:-1]))
        print(f"{question.kind}: {asked}\n    {answer}")


if __name__ == "__main__":
    main()
