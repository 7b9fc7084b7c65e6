"""Seeded documents full of facts, and questions about them, as token ids: on any device, fast enough to train on.

A fact says the value of one attribute of one service. The services of a document share the words of their names, so that only the
whole name and the attribute together find a fact. Knows nothing of models. Text is made by decoding.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from demo import words
from demo.patterns import HOLE, Fields, Patterns, Table, token_id, widen
from workers.checkpoint import ASSISTANT, BOS, EOS, THINK_END, USER

SECTION_SENTENCES = 24
SINGLE, DOUBLE, ABSENT, OTHER = range(4)  # kinds of questions
KIND_WEIGHTS = (0.72, 0.10, 0.10, 0.08)
SHORT_DOCUMENT = 64  # sentences; in training, some chats without any document go among such
BARE_SHARE = 0.03
LOWER_CASE_SHARE = 0.15  # of questions that write the service's name without capitals
NOISE_SHARE = 0.3  # of OTHER questions that are random tokens
NOISE_TOKENS = 12
NAME_BITS = 6  # 64 first and 64 second parts
NUM_ATTRIBUTES = sum(map(len, words.ATTRIBUTES.values()))


@dataclass(frozen=True)
class Documents:
    """B documents of S sentences and Q questions about each. Token ids int64, HOLE where there is none.

    sentences: [B, S, W], with the headings
    questions: [B, Q, W'] and answers [B, Q, W''], without markers
    values:    bool [B, Q, W''], the tokens of an answer that only the document tells
    kinds:     [B, Q], SINGLE, DOUBLE, ABSENT or OTHER
    places:    [B, Q], the sentence with the (first) fact asked for; -1 if there is none
    """

    sentences: torch.Tensor
    questions: torch.Tensor
    answers: torch.Tensor
    values: torch.Tensor
    kinds: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class Chats:
    """Each document with all its questions and answers as one chat, padded at the end.

    tokens:  int64 [B, L]
    answers: bool [B, L], what the assistant says; values: that of it which only the document tells
    """

    tokens: torch.Tensor
    answers: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class _Facts:
    """The F facts of each of B documents: `each` of a service, service after service, and room for services without facts.

    The facts are about few or many of the attributes: `common` of them.

    first, second: [B, services and more], parts of names; attributes: [B, services and more, all], the common ones first;
    values: [B, F]
    """

    each: int
    common: int
    services: int
    first: torch.Tensor
    second: torch.Tensor
    attributes: torch.Tensor
    values: torch.Tensor


class Writer:
    """Makes documents out of `demo.words`. On one kind of device the same generator state gives the same documents."""

    def __init__(self, tokenizer: Tokenizer, device: str) -> None:
        self.device = device

        def table(texts: list[str]) -> Table:
            return Table.of(tokenizer, [f" {text}" for text in texts], device)

        self._first, self._second = (
            table([*parts, *(part.lower() for part in parts)])
            for parts in (words.FIRST_PARTS, words.SECOND_PARTS)
        )
        self._attributes = table([attribute for group in words.ATTRIBUTES.values() for attribute in group])
        values = {kind: words.values(kind) for kind in words.ATTRIBUTES}
        self._values = table([value for group in values.values() for value in group])
        counts = torch.tensor([len(values[kind]) for kind, group in words.ATTRIBUTES.items() for _ in group])
        begins = {kind: sum(map(len, list(values.values())[:place])) for place, kind in enumerate(values)}
        self._value_counts = counts.to(device)  # of each attribute
        self._value_begins = torch.tensor(
            [begins[kind] for kind, group in words.ATTRIBUTES.items() for _ in group], device=device
        )
        self._words = {
            "noun": table(words.NOUNS),
            "verb": table(words.VERBS),
            "adjective": table(words.ADJECTIVES),
            "number": table([str(number) for number in range(1000)]),
        }
        self._fields = Fields(
            {
                "first": self._first.width,
                "second": self._second.width,
                "attribute": self._attributes.width,
                "value": self._values.width,
                "attribute2": self._attributes.width,
                "value2": self._values.width,
            }
            | {name + digit: self._words[name].width for name in self._words for digit in ("", "2", "3")}
        )

        def patterns(texts: tuple[str, ...], before: str = "") -> Patterns:
            expanded = [before + text.replace("{service}", "{first} {second}") for text in texts]
            return Patterns(tokenizer, expanded, self._fields, device)

        self._statements = patterns(words.STATEMENTS, " ")
        self._fillers = patterns(words.FILLERS, " ")
        self._headings = patterns((words.TITLE + words.SECTION, words.SECTION))
        self._single, self._double = patterns(words.QUESTIONS), patterns(words.DOUBLE_QUESTIONS)
        self._other = patterns((*words.GREETINGS, *words.REQUESTS))
        self._answers = patterns((words.ANSWER, words.DOUBLE_ANSWER, words.ABSENT_ANSWER, words.HELP_ANSWER))
        self._blank_line = tokenizer.encode("\n\n").ids
        self._marker = {name: token_id(tokenizer, name) for name in (BOS, EOS, USER, ASSISTANT, THINK_END)}
        self.end = self._marker[EOS]  # of an answer
        self._first_plain, self._vocab_size = tokenizer.encode("A").ids[0], tokenizer.get_vocab_size()

    def write(
        self,
        num: int,
        *,
        sentences: int,
        facts: int,
        questions: int,
        generator: torch.Generator,
        kinds: tuple[float, ...] = KIND_WEIGHTS,
        bare: bool = False,
    ) -> Documents:
        """`num` documents of equal shape; `facts` is rounded to what services with equally many facts allow.

        kinds: how often each kind of question comes. bare: some have no document at all, and questions to match.
        """
        draw = _Draw(self.device, generator)
        known = self._facts(num, min(facts, sentences), draw)
        order = draw.permutation(num, sentences)
        written = self._sentences(known, order, draw)
        asked = draw.choice(kinds, num, questions)
        if known.each == 1:
            asked = asked.masked_fill(asked == DOUBLE, SINGLE)
        if bare:
            empty = draw.share(BARE_SHARE, num, 1)
            written = written.masked_fill(empty.unsqueeze(-1), HOLE)
            asked = torch.where(empty & (asked < ABSENT), ABSENT + draw.below(2, num, questions), asked)
        return self._ask(known, order, written, asked, draw)

    def _facts(self, num: int, count: int, draw: "_Draw") -> _Facts:
        fewest = -(-count // 2 ** (2 * NAME_BITS - 1))  # half of all names stay without facts
        each = next(size for size in draw.shuffled(1, 2, 4, 8) if size >= fewest or size == 8)
        each = min(each, count)
        services = count // each
        bits = max(2, (2 * services - 1).bit_length())
        if draw.coin():  # names from a few words, each in many of them, or from all words
            bits = 2 * NAME_BITS
        numbers = draw.distinct(num, 2**bits)
        low = bits // 2
        first = draw.permutation(num, 2**NAME_BITS).gather(1, numbers >> low)
        second = draw.permutation(num, 2**NAME_BITS).gather(1, numbers & (2**low - 1))
        # With few attributes many services have the same: then the name decides, also where there are few facts.
        common = next(size for size in draw.shuffled(1, 2, 4, 8, 16, NUM_ATTRIBUTES) if size >= each)
        attributes = self._attribute_rows(num, 2**bits, common, draw)
        used = attributes[:, :services, :each].flatten(1)
        values = self._value_begins[used] + draw.up_to(self._value_counts[used])
        return _Facts(each, common, services, first, second, attributes, values)

    def _attribute_rows(self, num: int, services: int, common: int, draw: "_Draw") -> torch.Tensor:
        """int64 [B, services, all]: each row the document's common attributes in some order, then the others."""
        rare = torch.arange(common, NUM_ATTRIBUTES, device=self.device).expand(num, services, -1)
        order = torch.cat((draw.distinct(num * services, common).view(num, services, common), rare), dim=-1)
        return draw.permutation(num, NUM_ATTRIBUTES).gather(1, order.flatten(1)).view_as(order)

    def _sentences(self, known: _Facts, order: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """order [B, S]: the sentence in which each fact stands, then those of fillers."""
        num, count = order.shape
        facts = torch.arange(known.values.shape[1], device=self.device).expand(num, -1)
        fields = self._columns(known, facts // known.each, facts % known.each, draw)
        stated = self._statements.fill(draw.below(len(words.STATEMENTS), *facts.shape), fields)
        others = count - facts.shape[1]
        mentioned = draw.below(known.services, num, others), draw.below(NUM_ATTRIBUTES, num, others)
        filled = self._fillers.fill(
            draw.below(len(words.FILLERS), num, others), self._columns(known, *mentioned, draw)
        )
        width = max(stated.shape[-1], filled.shape[-1])
        by_fact = torch.cat([widen(part, width) for part in (stated, filled)], dim=1)
        by_place = torch.empty_like(by_fact).scatter_(1, order.unsqueeze(-1).expand_as(by_fact), by_fact)
        return torch.cat((self._headlines(num, count), by_place), dim=-1)

    def _headlines(self, num: int, count: int) -> torch.Tensor:
        place = torch.arange(count, device=self.device)
        fields = self._fields.empty(count, device=self.device)
        self._fields.put(fields, "number", self._words["number"].ids[place // SECTION_SENTENCES + 1])
        lines = self._headings.fill(place.clamp(max=1), fields)
        return lines.masked_fill((place % SECTION_SENTENCES > 0).unsqueeze(-1), HOLE).expand(num, -1, -1)

    def _ask(
        self, known: _Facts, order: torch.Tensor, written: torch.Tensor, asked: torch.Tensor, draw: "_Draw"
    ) -> Documents:
        shape = asked.shape
        # No fact is asked for twice, as long as there are enough: the answer must not stand in the chat already.
        facts = known.values.shape[1]
        fact = draw.permutation(shape[0], facts)[:, torch.arange(shape[1], device=self.device) % facts]
        service, number = fact // known.each, fact % known.each
        other_number = (number + 1 + draw.below(max(1, known.each - 1), *shape)) % known.each
        # What is absent: another attribute of a service that is there, or a service that is not.
        strangers = known.first.shape[1] - known.services
        no_service = draw.share(0.5, *shape)
        missing = asked == ABSENT
        service = torch.where(missing & no_service, known.services + draw.below(strangers, *shape), service)
        number = torch.where(missing, self._unsaid(known, no_service, draw), number)
        fields = self._columns(known, service, number, draw, other_number)
        answers, is_value = (
            self._answers.fill(asked, fields),
            self._answers.filled_by(asked, "value", "value2"),
        )
        lower = draw.share(LOWER_CASE_SHARE, *shape)
        self._put_name(fields, known, service, lower)
        options = [
            patterns.fill(draw.below(len(patterns), *shape), fields)
            for patterns in (self._single, self._double, self._single, self._other)
        ]
        noise = self._noise(shape, draw)
        width = max(option.shape[-1] for option in [*options, noise])
        stacked = torch.stack([widen(option, width) for option in options])
        questions = stacked.gather(0, asked.view(1, *shape, 1).expand(1, -1, -1, width)).squeeze(0)
        noisy = (asked == OTHER) & draw.share(NOISE_SHARE, *shape)
        questions = torch.where(noisy.unsqueeze(-1), widen(noise, width), questions)
        places = order.gather(1, fact).masked_fill(asked >= ABSENT, -1)
        return Documents(written, questions, answers, is_value & (answers != HOLE), asked, places)

    def _unsaid(self, known: _Facts, no_service: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """Numbers of attributes that are not said of a service, half of them of those common in the document."""
        said = known.each * (~no_service).long()  # nothing is said of services that are not there
        rare = draw.share(0.5, *no_service.shape) | (said == known.common)
        end = torch.where(rare, NUM_ATTRIBUTES, known.common)
        return said + draw.up_to(end - said)

    def _noise(self, shape: torch.Size, draw: "_Draw") -> torch.Tensor:
        tokens = self._first_plain + draw.below(self._vocab_size - self._first_plain, *shape, NOISE_TOKENS)
        lengths = 1 + draw.below(NOISE_TOKENS, *shape, 1)
        return tokens.masked_fill(torch.arange(NOISE_TOKENS, device=self.device) >= lengths, HOLE)

    def _columns(
        self,
        known: _Facts,
        service: torch.Tensor,
        number: torch.Tensor,
        draw: "_Draw",
        other_number: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The fields of sentences about some services [B, n] and their attributes by number [B, n]: [B, n, F]."""
        fields = self._fields.empty(*service.shape, device=self.device)
        self._put_name(fields, known, service)
        self._put_fact(fields, known, service, number, "")
        if other_number is not None:
            self._put_fact(fields, known, service, other_number, "2")
        for name, table in self._words.items():
            for digit in ("", "2", "3"):
                limit = 60 if name == "number" else len(table.ids)
                self._fields.put(fields, name + digit, table.ids[draw.below(limit, *service.shape)])
        return fields

    def _put_name(
        self, fields: torch.Tensor, known: _Facts, service: torch.Tensor, lower: torch.Tensor | None = None
    ) -> None:
        shift = 0 if lower is None else lower.long() << NAME_BITS
        self._fields.put(fields, "first", self._first.ids[known.first.gather(1, service) + shift])
        self._fields.put(fields, "second", self._second.ids[known.second.gather(1, service) + shift])

    def _put_fact(
        self, fields: torch.Tensor, known: _Facts, service: torch.Tensor, number: torch.Tensor, digit: str
    ) -> None:
        attribute = known.attributes.flatten(1).gather(1, service * NUM_ATTRIBUTES + number)
        self._fields.put(fields, "attribute" + digit, self._attributes.ids[attribute])
        fact = (service * known.each + number.clamp(max=known.each - 1)).clamp(max=known.values.shape[1] - 1)
        self._fields.put(fields, "value" + digit, self._values.ids[known.values.gather(1, fact)])

    def chats(self, documents: Documents, generator: torch.Generator) -> Chats:
        """The document is the system message, or opens the first question; by chance."""
        num, count = documents.kinds.shape
        marker = self._marker

        def constant(*ids: int) -> torch.Tensor:
            return torch.tensor(ids, device=self.device).expand(num, count, -1)

        as_system = _Draw(self.device, generator).share(0.5, num, 1)
        user = torch.full((num, 1), marker[USER], device=self.device)
        blank = torch.tensor(self._blank_line, device=self.device).expand(num, -1)
        head = torch.cat(
            (
                torch.full_like(user, marker[BOS]),
                user.masked_fill(as_system, HOLE),
                documents.sentences.flatten(1),
                torch.where(
                    as_system,
                    torch.cat((user, user.new_full((num, len(self._blank_line) - 1), HOLE)), 1),
                    blank,
                ),
            ),
            dim=1,
        )
        between = constant(marker[USER]).clone()
        between[:, 0] = HOLE  # the first question's is in the head
        turns = [
            between,
            documents.questions,
            constant(marker[ASSISTANT], marker[THINK_END]),
            documents.answers,
            constant(marker[EOS]),
        ]
        no, yes = torch.zeros_like, torch.ones_like
        said = [no(turns[0]), no(turns[1]), no(turns[2]), yes(turns[3]), yes(turns[4])]
        told = [no(turns[0]), no(turns[1]), no(turns[2]), documents.values.long(), no(turns[4])]
        rows = [torch.cat(parts, dim=-1).flatten(1) for parts in (turns, said, told)]
        tokens = torch.cat((head, rows[0]), dim=1)
        masks = [torch.cat((torch.zeros_like(head), row), dim=1) for row in rows[1:]]
        return Chats(*_compact(tokens, masks))


def _compact(
    tokens: torch.Tensor, masks: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves all holes to the end of each row, and cuts most of what is padding in every row. Padding becomes token 0.

    Widths are rounded up by at most a sixteenth: what runs on them meets few different shapes.
    """
    full = tokens != HOLE
    longest = int(full.sum(1).max())
    grain = max(8, 1 << longest.bit_length() >> 5)
    width = -(-longest // grain) * grain
    target = (full.cumsum(1) - 1).masked_fill(~full, width)

    def moved(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(len(values), width + 1)
        return out.scatter_(1, target, values)[:, :width]

    return moved(tokens), moved(masks[0]).bool(), moved(masks[1]).bool()


class _Draw:
    """Random tensors from one generator."""

    def __init__(self, device: str, generator: torch.Generator) -> None:
        self._device = device
        self._generator = generator

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, device=self._device, generator=self._generator)

    def up_to(self, limits: torch.Tensor) -> torch.Tensor:
        """A number below each of the limits."""
        return self.below(2**31, *limits.shape) % limits

    def share(self, probability: float, *shape: int) -> torch.Tensor:
        return self._uniform(*shape) < probability

    def coin(self) -> bool:
        return bool(self.share(0.5, 1))

    def choice(self, weights: tuple[float, ...], *shape: int) -> torch.Tensor:
        bounds = torch.tensor(weights, device=self._device).cumsum(0)
        drawn = self._uniform(*shape) * bounds[-1]
        return torch.searchsorted(bounds, drawn, right=True).clamp(max=len(weights) - 1)

    def permutation(self, num: int, size: int) -> torch.Tensor:
        """[num, size]: the numbers below `size` in random order, `num` times."""
        return self._uniform(num, size).argsort(dim=1)

    def shuffled(self, *options: int) -> list[int]:
        return [options[place] for place in self.permutation(1, len(options))[0].tolist()]

    def distinct(self, num: int, size: int) -> torch.Tensor:
        """[num, size], size a power of two: like permutation, less random, but cheap for very many."""
        bits = size.bit_length() - 1
        half = (bits + 1) // 2
        odd, shift = 2 * self.below(size, num, 1) + 1, self.below(size, num, 1)
        x = (torch.arange(size, device=self._device) * odd + shift) & (size - 1)
        x = ((x ^ (x >> half)) * 0x2545F491) & (size - 1)
        return x ^ (x >> half)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self._device, generator=self._generator)
