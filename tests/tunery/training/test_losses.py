"""Losses of supervised tokens: right, equal on every path, and paid for by what is learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import LabelSmoother

from tunery.training import packing
from tunery.training.collate import collate
from tunery.training.losses import HeadPolicy, TokenLossComputer, token_losses

if TYPE_CHECKING:
    from tunery.training.types import Batch

CHUNKED = HeadPolicy(path="chunked", chunk_rows=7)
POLICIES = [HeadPolicy(), HeadPolicy(compact=False), CHUNKED]


def rows(examples: Any) -> Batch:
    return collate(examples, layout="rows", pad_id=0)


def by_hand(model: Any, examples: Any) -> torch.Tensor:
    """Document by document, the plainest way."""
    parts = []
    for example in examples:
        for document in example.documents:
            ids = torch.tensor(document.input_ids, dtype=torch.int64)
            labels = torch.tensor(document.labels, dtype=torch.int64)[1:]
            logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            kept = labels != -100
            parts.append(-logprobs[kept].gather(1, labels[kept][:, None]).squeeze(1))
    return torch.cat(parts)


@pytest.mark.parametrize("policy", POLICIES)
def test_losses_are_those_of_each_document_alone(lab: Any, policy: HeadPolicy) -> None:
    model = lab.lora(random_b=True)
    examples = lab.examples(6)
    losses = TokenLossComputer(model.get_base_model(), policy)(model, rows(examples))
    torch.testing.assert_close(losses.nll, by_hand(model, examples), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_equal_on_every_path(lab: Any, policy: HeadPolicy) -> None:
    model = lab.lora(random_b=True)
    examples = lab.examples(6)
    by_hand(model, examples).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    losses = TokenLossComputer(model.get_base_model(), policy)
    losses(model, rows(examples)).nll.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_the_chunked_head_scales_with_what_flows_back(lab: Any) -> None:
    model = lab.lora(random_b=True)
    batch = rows(lab.examples(6))
    slopes = torch.linspace(-1, 2, batch.supervised)
    grads = []
    for policy in (HeadPolicy(), CHUNKED):
        model.zero_grad()
        nll = TokenLossComputer(model.get_base_model(), policy)(model, batch).nll
        (nll * slopes).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(plain, chunked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_chunked_head_agrees_with_finite_differences(smoothing: float) -> None:
    from tunery.training.losses import _ChunkedHead

    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64)
    targets = torch.randint(0, 11, (5,))

    def total(x: torch.Tensor) -> torch.Tensor:
        # The losses leave the function in float32, so the differences are taken by hand.
        return torch.nn.functional.cross_entropy(
            x @ weight.T, targets, reduction="sum", label_smoothing=smoothing
        )

    nll, _ = _ChunkedHead.apply(hidden, weight, None, targets, 2, smoothing)
    nll.sum().backward()
    eps = 1e-6
    for i, j in ((0, 0), (3, 2), (4, 3)):
        step = torch.zeros_like(hidden)
        step[i, j] = eps
        slope = (total(hidden + step) - total(hidden - step)) / (2 * eps)
        assert hidden.grad[i, j].item() == pytest.approx(slope.item(), abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_smoothed_losses_are_those_of_transformers(lab: Any, policy: HeadPolicy) -> None:
    model = lab.lora(random_b=True)
    batch = rows(lab.examples(6))
    losses = TokenLossComputer(model.get_base_model(), policy)(model, batch, label_smoothing=0.2)
    logits = model(**batch.inputs()).logits.flatten(0, 1)[batch.target_positions]
    theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, batch.target_ids)
    assert losses.nll.mean().item() == pytest.approx(theirs.item(), abs=1e-5)


def test_accuracy_counts_the_most_likely_token() -> None:
    logits = torch.tensor([[0.1, 2.0, 0.3], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    losses = token_losses(logits, torch.tensor([1, 2, 2]))
    assert losses.correct.tolist() == [1.0, 0.0, 1.0]
    assert losses.nll[1].item() == pytest.approx(5.0134, abs=1e-4)


def head_flops(lab: Any, supervised: float, policy: HeadPolicy) -> int:
    """Of the head alone: the same step with and without it."""
    model = lab.lora(lab.llama(vocab_size=997))
    examples = lab.examples(8, shortest=20, longest=20, supervised=supervised)
    batch = rows(examples)
    with FlopCounterMode(display=False) as counter:
        TokenLossComputer(model.get_base_model(), policy)(model, batch).nll.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("path", ["plain", "chunked"])
def test_the_head_is_paid_for_by_supervised_tokens_only(lab: Any, path: Any) -> None:
    policy = HeadPolicy(path=path)
    quarter, half, whole = (head_flops(lab, share, policy) for share in (0.25, 0.5, 1.0))
    # 8 documents of 20 tokens; 5, 10 and 19 are predicted; forward and backward, 2 VH each.
    per_token = 2 * 2 * 997 * 32
    assert half - quarter == 8 * 5 * per_token
    assert whole - half == 8 * 9 * per_token


def test_without_compaction_the_head_runs_everywhere(lab: Any) -> None:
    everywhere = HeadPolicy(compact=False)
    assert head_flops(lab, 0.25, everywhere) == head_flops(lab, 1.0, everywhere)


def test_no_logits_are_made_where_there_is_no_label(lab: Any) -> None:
    model = lab.lora()
    batch = rows(lab.examples(6))
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    TokenLossComputer(model.get_base_model())(model, batch)
    assert shapes == [(1, batch.supervised, 97)]
    shapes.clear()
    TokenLossComputer(model.get_base_model(), CHUNKED)(model, batch)
    assert shapes == [(6, 0, 97)]


def test_the_head_is_chosen_by_memory(lab: Any) -> None:
    model = lab.lora()
    batch = rows(lab.examples(6))
    need = batch.supervised * 97 * 4
    for room, used in ((need, {"plain"}), (need - 1, {"chunked"})):
        losses = TokenLossComputer(model.get_base_model(), HeadPolicy(max_logits_bytes=room))
        losses(model, batch)
        assert losses.used == used


def test_a_head_that_trains_is_never_chunked(lab: Any) -> None:
    model = lab.llama().requires_grad_(True)
    losses = TokenLossComputer(model, CHUNKED)
    losses(model, rows(lab.examples(2)))
    assert losses.used == {"plain"}


def test_no_gradient_is_formed_below_the_first_adapter(lab: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    model = get_peft_model(lab.llama(), config)
    seen: list[bool] = []
    layers = model.get_base_model().model.layers
    layers[0].register_forward_hook(lambda m, i, out: seen.append(out.requires_grad))
    layers[1].register_forward_hook(lambda m, i, out: seen.append(out.requires_grad))
    TokenLossComputer(model.get_base_model())(model, rows(lab.examples(2)))
    assert seen == [False, True]


def test_prompt_tokens_in_front_shift_the_positions(lab: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        lab.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    examples = lab.examples(5)
    compact = TokenLossComputer(model.get_base_model())(model, rows(examples)).nll
    every = TokenLossComputer(model.get_base_model(), HeadPolicy(compact=False))
    alone = torch.cat([every(model, rows([example])).nll for example in examples])
    torch.testing.assert_close(compact, alone, rtol=0, atol=1e-5)
    logits = model(input_ids=torch.tensor(examples[0].documents[0].input_ids)[None].long()).logits
    batch = rows(examples[:1])
    by_position = token_losses(logits[0, 3:][batch.target_positions], batch.target_ids).nll
    torch.testing.assert_close(alone[: len(by_position)], by_position, rtol=0, atol=1e-5)


def test_documents_logprobs_are_sums_by_document(lab: Any) -> None:
    model = lab.lora()
    examples = lab.examples(3, documents=2)
    batch = rows(examples)
    losses = TokenLossComputer(model.get_base_model())(model, batch)
    expected = []
    for example in examples:
        for document in example.documents:
            one = type(example)(documents=(document,), target=None, index=0)
            expected.append(-by_hand(model, [one]).sum())
    torch.testing.assert_close(
        losses.document_logprobs(batch), torch.stack(expected), rtol=0, atol=1e-4
    )


# Packed rows


def packed_model(lab: Any, **shape: Any) -> Any:
    model = lab.lora(lab.llama(**shape), random_b=True)
    assert packing.switch_on(model.get_base_model())
    return model


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}])
def test_a_packed_document_never_sees_its_neighbours(lab: Any, shape: Any) -> None:
    model = packed_model(lab, **shape)
    examples = lab.examples(6)
    losses = TokenLossComputer(model.get_base_model())
    together = losses(model, collate(examples, layout="packed", pad_id=0)).nll
    alone = torch.cat([losses(model, rows([example])).nll for example in examples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_what_stands_before_a_packed_document_does_not_matter(lab: Any) -> None:
    model = packed_model(lab)
    losses = TokenLossComputer(model.get_base_model())
    last = lab.examples(1, seed=8)
    answers = []
    for seed in (1, 2):
        before = lab.examples(2, seed=seed)
        out = losses(model, collate([*before, *last], layout="packed", pad_id=0)).nll
        answers.append(out[-last[0].documents[0].supervised :])
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-6)


def test_the_self_test_passes_where_documents_are_kept_apart(lab: Any) -> None:
    model = packed_model(lab)
    assert packing.isolates(model, TokenLossComputer(model.get_base_model()), 97)


def test_the_self_test_finds_attention_that_ignores_the_borders(lab: Any) -> None:
    """Plain SDPA, told by the placeholder mask that everything may be seen: the leak itself."""
    model = lab.lora()
    assert not packing.isolates(model, TokenLossComputer(model.get_base_model()), 97)


def test_the_self_test_finds_positions_that_run_on(lab: Any, monkeypatch: Any) -> None:
    model = packed_model(lab)
    monkeypatch.setattr("tunery.training.collate._restarting", lambda lengths: None)
    # Rotary positions are relative, so a constant shift is no leak; learnt positions are not.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    assert packing.switch_on(gpt2)
    assert not packing.isolates(gpt2, TokenLossComputer(gpt2), 97)
    monkeypatch.undo()
    assert packing.isolates(gpt2, TokenLossComputer(gpt2), 97)
    del model


def test_a_sliding_window_is_kept_inside_a_packed_document(lab: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=4,
            initializer_range=0.2,
        )
    ).eval()
    examples = lab.examples(4, shortest=10)
    losses = TokenLossComputer(model)
    alone = torch.cat([losses(model, rows([example])).nll for example in examples])
    assert packing.switch_on(model)
    together = losses(model, collate(examples, layout="packed", pad_id=0)).nll
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    padded = losses(model, rows(examples)).nll
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
