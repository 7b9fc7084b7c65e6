"""What is trained is what is served: the training forward against the engine's model, on random weights and beyond top-k."""

from pathlib import Path

import pytest
import torch

from demo import attend as ways
from demo.attend import Dense, Sparse, WarmUp, divergence, select
from demo.export import tensors
from demo.network import Network
from demo.shape import CONFIG
from demo.tokenizer import make_tokenizer
from kernels.reference import top_k
from kernels.rows import Rows
from workers.checkpoint import write_checkpoint
from workers.config import EngineConfig
from workers.model import load_model
from workers.model_config import ModelConfig
from workers.paged_cache import PagedCache

LENGTH = 200
SMALL = CONFIG | {"index_topk": 64, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def network() -> Network:
    """Random enough that every part matters: norms and biases too, and attention that is not flat."""
    torch.manual_seed(3)
    network = Network(ModelConfig.from_json(SMALL), "cpu")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[1] ** -0.5 * (3 if "q_b_proj" in name else 1))
            else:
                tensor += torch.randn_like(tensor) * 0.1
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(5))


def served(network: Network, tokens: torch.Tensor, folder: Path) -> torch.Tensor:
    """fp32 [B, L, V] of the engine's model, one sequence after the other."""
    write_checkpoint(folder, SMALL, make_tokenizer(), tensors(network, "fp32"))
    model = load_model(folder, EngineConfig(precision="fp32"))
    pages = -(-LENGTH // 64)
    every = torch.arange(LENGTH)
    logits = []
    for row in tokens:
        cache = PagedCache(model.layout, num_layers=SMALL["num_hidden_layers"], num_pages=pages, device="cpu")
        rows = Rows.of((0, LENGTH), every, torch.arange(pages, dtype=torch.int32).view(1, -1))
        logits.append(model.forward(row, rows, every, cache, every))
    return torch.stack(logits)


def lowest_of_ties(scores: torch.Tensor, count: int) -> torch.Tensor:
    lengths = (scores[0] > -torch.inf).sum(-1)
    return torch.stack([top_k(row, lengths, count).long() for row in scores])


def test_training_and_serving_give_the_same_logits(
    network: Network, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "best", lowest_of_ties)  # heads that all score below zero make many exact zeros
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    ours = network(tokens, everywhere, Sparse(64, "cpu")).view(*tokens.shape, -1)
    theirs = served(network, tokens, tmp_path)
    assert (ours - theirs).abs().max() < 2e-4
    dense = network(tokens, everywhere, Dense()).view(*tokens.shape, -1)
    assert (dense - theirs)[:, :64].abs().max() < 2e-4
    assert (dense - theirs)[:, 64:].abs().max() > 0.1, "beyond top-k a selection must matter"


def test_masked_and_gathered_attention_agree(
    network: Network, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, gathered = Sparse(64, "cpu"), Sparse(64, "cpu")
    by_mask = network.hidden(tokens, masked)
    monkeypatch.setattr(ways, "SHORT", 0)
    torch.testing.assert_close(network.hidden(tokens, gathered), by_mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gathered.loss, masked.loss, atol=1e-5, rtol=1e-5)


def test_a_selection_of_everything_is_dense_attention(network: Network, tokens: torch.Tensor) -> None:
    dense, sparse = network.hidden(tokens, Dense()), network.hidden(tokens, Sparse(LENGTH, "cpu"))
    assert (dense - sparse).abs().max() < 1e-4


def test_selection_is_the_top_k_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 90, 3, 16, generator=generator)
    key, weights = torch.randn(2, 90, 16, generator=generator), torch.randn(2, 90, 3, generator=generator)
    picks = select(query, key, weights, 8)
    for b in range(2):
        for t in range(90):
            scores = torch.stack(
                [weights[b, t, h] * (key[b, : t + 1] @ query[b, t, h]).relu() for h in range(3)]
            ).sum(0)
            found = picks[b, t][picks[b, t] >= 0]
            assert len(found.unique()) == min(8, t + 1)
            torch.testing.assert_close(scores[found].sort().values, scores.topk(len(found)).values.flip(0))


def test_the_two_losses_do_not_mix(network: Network, tokens: torch.Tensor) -> None:
    """The indexer learns from its own loss only, and nothing else learns from that."""
    network.requires_grad_(True)
    attend = Sparse(64, "cpu")
    logits = network(tokens, torch.ones_like(tokens, dtype=torch.bool), attend)
    names = [name for name, _ in network.named_parameters() if "layers.4." not in name]
    parameters = [parameter for name, parameter in network.named_parameters() if name in names]
    for loss, learns in ((logits.square().mean(), "main"), (attend.loss, "indexer")):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            touched = gradient is not None and bool(gradient.any())
            assert touched == (("indexer" in name) == (learns == "indexer")) or ".experts." in name, name
    network.requires_grad_(False)


def test_warm_up_pulls_towards_the_attention_of_all_heads(network: Network, tokens: torch.Tensor) -> None:
    """The loss against the definition, with scores and attention written out."""
    rows = torch.tensor([[70, 199], [0, 150]])
    attend = WarmUp(rows)
    seen = []
    network.hidden(tokens, lambda inputs: (seen.append(inputs), attend(inputs))[1])
    total = 0.0
    for inputs in seen:
        index_query, index_key, index_weights = inputs.index()
        per_head = torch.einsum("blc,hdc->blhd", inputs.latent, inputs.latent_up)[..., :64]
        for b in range(2):
            for t in rows[b].tolist():
                nope = torch.einsum("hd,lhd->hl", inputs.query_nope[b, t], per_head[b, : t + 1])
                pe = torch.einsum("hd,ld->hl", inputs.query_pe[b, t], inputs.key_pe[b, : t + 1])
                target = ((nope + pe) * inputs.config.softmax_scale).softmax(-1).mean(0)
                scores = (index_key[b, : t + 1] @ index_query[b, t].T).relu() @ index_weights[b, t]
                total += float((target * (target.log() - scores.log_softmax(-1))).sum()) / 4
    assert float(attend.loss) == pytest.approx(total, rel=1e-4)


def test_divergence_ignores_what_is_hidden() -> None:
    target = torch.tensor([[0.25, 0.75, 0.0]])
    scores = torch.tensor([[0.3, 0.3, 5.0]], requires_grad=True)
    loss = divergence(target, scores.masked_fill(target == 0, -torch.inf).log_softmax(-1))
    expected = (target[0, :2] * (target[0, :2] / 0.5).log()).sum()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([[0.25, -0.25, 0.0]]))
