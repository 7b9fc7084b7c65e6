"""A quick look at a network in training: the share of answers that are right to the last token, given what was said before."""

import torch

from demo.attend import Dense, Sparse
from demo.documents import KIND_WEIGHTS, Chats, Writer
from demo.network import Attend, Network

LENGTHS = (64, 256, 1024, 2048, 4096, 8900)  # sentences
QUESTIONS = 64


def check(
    network: Network, writer: Writer, *, sparse: bool, lengths: tuple[int, ...] = LENGTHS
) -> list[dict[str, float]]:
    """One line for each length: tokens of a chat, answers, share of them that are right."""
    generator = torch.Generator(writer.device).manual_seed(10**6)
    lines = []
    for sentences in lengths:
        documents = writer.write(
            max(1, min(16, 8900 // sentences)),
            sentences=sentences,
            facts=max(2, sentences // 2),
            questions=min(QUESTIONS, sentences // 2),
            generator=generator,
            kinds=KIND_WEIGHTS,
        )
        chats = writer.chats(documents, generator)
        attend: Attend = Sparse(network.config.index_topk, writer.device) if sparse else Dense()
        right = answered_right(network, chats, attend, end=writer.end)
        kinds = documents.kinds.flatten()
        line = {"tokens": chats.tokens.shape[1], "answers": len(right), "right": float(right.mean())}
        for kind, name in enumerate(("single", "double", "absent", "other")):
            if bool((kinds == kind).any()):
                line[name] = float(right[kinds == kind].mean())
        lines.append(line)
    return lines


@torch.no_grad()
def answered_right(network: Network, chats: Chats, attend: Attend, *, end: int) -> torch.Tensor:
    """fp32 [answers], 1 where all tokens of an answer have the highest logit; answers end with token `end`."""
    wanted = chats.answers[:, 1:]
    with torch.autocast(chats.tokens.device.type, torch.bfloat16, enabled=chats.tokens.is_cuda):
        logits = network(chats.tokens[:, :-1], wanted, attend)
    target = chats.tokens[:, 1:][wanted]
    ends = (target == end).long()
    answer = ends.cumsum(0) - ends
    right = torch.ones(int(ends.sum()), device=target.device)
    return right.scatter_reduce(0, answer, (logits.argmax(-1) == target).float(), "amin")
