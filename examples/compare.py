"""Loads a downloaded adapter with PEFT alone, and shows what it changed.

    python examples/compare.py BASE_FOLDER ADAPTER_FOLDER VALIDATION_JSONL [--rows 3]

Nothing of Tunery is imported: what the service hands back is a PEFT adapter like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 8


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of a row up to the end of the answer, and where the answer begins."""
    messages = row["messages"]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


@torch.inference_mode()
def held_out_loss(model: Any, examples: list[tuple[list[int], int]]) -> float:
    """Mean loss per token of the answers, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
        labels_BT = torch.full((len(batch), length), -100)
        mask_BT = torch.zeros(len(batch), length, dtype=torch.long)
        for i, (ids, answer) in enumerate(batch):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
            labels_BT[i, answer : len(ids)] = torch.tensor(ids[answer:])
            mask_BT[i, : len(ids)] = 1
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        total += torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), reduction="sum"
        ).item()
        count += int((labels_BT[:, 1:] != -100).sum())
    return total / count


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """The model's own greedy answer."""
    prompt = torch.tensor([ids])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=56,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()


def load(base: Path, adapter: Path) -> tuple[Any, Any]:
    """The tuned model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


def show(name: str, text: str) -> None:
    sys.stdout.write(f"  {name:<6} {' '.join(text.split())}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("data", type=Path, help="held-out rows, chat JSONL")
    parser.add_argument("--rows", type=int, default=3, help="rows whose answers are shown")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the libraries, about each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load(options.base, options.adapter)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    examples = [encode(tokenizer, row) for row in rows]
    for row, (ids, begins) in list(zip(rows, examples, strict=True))[: options.rows]:
        sys.stdout.write(f"\n{row['messages'][-2]['content']}\n")
        show("wanted", row["messages"][-1]["content"])
        with model.disable_adapter():
            show("base", answer(model, tokenizer, ids[:begins]))
        show("tuned", answer(model, tokenizer, ids[:begins]))
    with model.disable_adapter():
        before = held_out_loss(model, examples)
    after = held_out_loss(model, examples)
    sys.stdout.write(
        f"\nheld-out loss over {len(rows)} rows: base {before:.3f}, tuned {after:.3f}\n\n"
    )


if __name__ == "__main__":
    main()
