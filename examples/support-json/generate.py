"""Writes train.jsonl and validation.jsonl beside itself. Same seed, same bytes.

Each row is a chat: a short support message, and the answer as one strict JSON object. Every
phrasing belongs to one side only: the validation rows ask what the training rows ask, in words that
were never trained on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SEED = 20
ROWS = {"train": 320, "validation": 48}
SYSTEM = "Answer with one JSON object: intent, product, urgency, order_id."

PRODUCTS = [
    "headphones",
    "kettle",
    "backpack",
    "desk-lamp",
    "keyboard",
    "blender",
    "tent",
    "yoga-mat",
    "smartwatch",
    "coffee-grinder",
    "rice-cooker",
    "monitor",
]
SPOKEN = {
    "desk-lamp": "desk lamp",
    "yoga-mat": "yoga mat",
    "coffee-grinder": "coffee grinder",
    "rice-cooker": "rice cooker",
}

# Per intent: phrasings to train on, and phrasings held out.
PHRASINGS: dict[str, tuple[list[str], list[str]]] = {
    "refund": (
        [
            "I want my money back for the {p}.",
            "Please refund the {p}.",
            "The {p} is not what I expected, I'd like a refund.",
            "How do I get reimbursed for the {p} I returned?",
            "I sent the {p} back two weeks ago and the money never came.",
            "Can you return the payment for my {p}?",
            "Refund for the {p}, please, it does not suit me.",
        ],
        [
            "I'm unhappy with the {p} and would like to be paid back.",
            "When will I see my money for the {p} again?",
        ],
    ),
    "replacement": (
        [
            "The {p} arrived broken, send me a new one.",
            "My {p} came with a crack, can I swap it?",
            "I got the wrong {p}, please exchange it.",
            "Can I have a replacement for the damaged {p}?",
            "You shipped a {p} in the wrong colour, I need the right one.",
            "The {p} was dented in the box. Please replace it.",
            "One part of the {p} is missing, could you send another {p}?",
        ],
        [
            "This {p} was smashed on arrival; I'd like another in its place.",
            "Please swap the faulty {p} for a working one.",
        ],
    ),
    "delivery_status": (
        [
            "Where is my {p}?",
            "Has the {p} been shipped yet?",
            "The tracking page for the {p} shows nothing.",
            "When will the {p} arrive?",
            "My {p} should have been here on Monday.",
            "Could you check where the parcel with the {p} is?",
            "Still waiting for the {p}, any news?",
        ],
        [
            "I have heard nothing about the {p} on its way to me.",
            "Is the {p} out for delivery?",
        ],
    ),
    "cancel_order": (
        [
            "Please cancel the {p}.",
            "I no longer want the {p}, stop the order.",
            "I ordered the {p} by mistake, cancel it.",
            "Can I still call off the {p} order?",
            "Don't send the {p}, I changed my mind.",
            "I'd like to withdraw my order of the {p}.",
            "Cancel my {p} before it ships.",
        ],
        [
            "Scrap the {p} order, I bought one elsewhere.",
            "I have second thoughts about the {p}; please do not ship it.",
        ],
    ),
    "change_address": (
        [
            "Please send the {p} to my new address.",
            "I moved, can the {p} go to another street?",
            "The address for the {p} is wrong, please correct it.",
            "Could the {p} be delivered to my office instead?",
            "I typed the wrong house number for the {p}.",
            "Change where the {p} is delivered, please.",
            "Ship the {p} to my neighbour's place.",
        ],
        [
            "The {p} is going to my old flat, please redirect it.",
            "Can you deliver the {p} at a different door?",
        ],
    ),
    "invoice": (
        [
            "I need an invoice for the {p}.",
            "Please email me the receipt of the {p}.",
            "The bill for the {p} lacks our tax number.",
            "Where can I download the invoice for my {p}?",
            "Our accountant wants the receipt for the {p}.",
            "Send me a copy of the {p} invoice.",
            "The invoice of the {p} shows the wrong company.",
        ],
        [
            "Could I have the paperwork showing what I paid for the {p}?",
            "My bookkeeper is missing the bill for the {p}.",
        ],
    ),
    "technical_issue": (
        [
            "The {p} does not turn on.",
            "My {p} stopped working after a day.",
            "The {p} makes a strange noise.",
            "How do I reset the {p}? It is stuck.",
            "The {p} gets very hot, is that normal?",
            "I can't get the {p} to work, what am I doing wrong?",
            "The {p} worked fine and now it does nothing.",
        ],
        [
            "Something is off with the {p}: it quits by itself.",
            "The {p} won't start however often I try.",
        ],
    ),
}

# Per urgency: words to train on, and words held out. Nothing said means normal.
CUES: dict[str, tuple[list[str], list[str]]] = {
    "high": (
        ["It is urgent.", "I need it by tomorrow.", "Please hurry.", "Today, please!"],
        ["This can't wait.", "As fast as you can, please."],
    ),
    "normal": ([""], [""]),
    "low": (
        ["No rush.", "Whenever you find the time.", "It is not urgent.", "Take your time."],
        ["There is no hurry at all.", "Any time this month is fine."],
    ),
}
ORDER_WORDS = (
    ["Order {o}.", "My order is {o}.", "Order number: {o}."],
    ["The order was {o}.", "Reference {o}."],
)
GREETINGS = (["", "", "Hi,", "Hello.", "Good morning."], ["", "Hey there,", "Dear team,"])


def row(chance: random.Random, side: int) -> dict[str, Any]:
    """One chat. `side` 0 draws from the training phrasings, 1 from the held-out ones."""
    intent = chance.choice(list(PHRASINGS))
    urgency = chance.choice(list(CUES))
    product = chance.choice(PRODUCTS)
    order = f"{chance.choice('ABCD')}-{chance.randrange(1000, 10000)}"
    order_id = order if chance.random() < 0.7 else None
    parts = [
        chance.choice(GREETINGS[side]),
        chance.choice(PHRASINGS[intent][side]).format(p=SPOKEN.get(product, product)),
        chance.choice(CUES[urgency][side]),
        chance.choice(ORDER_WORDS[side]).format(o=order) if order_id else "",
    ]
    answer = {"intent": intent, "product": product, "urgency": urgency, "order_id": order_id}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": " ".join(part for part in parts if part)},
            {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
        ]
    }


def rows(split: str) -> list[dict[str, Any]]:
    """The split's rows, no message twice."""
    side = 0 if split == "train" else 1
    chance = random.Random(SEED + side)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < ROWS[split]:
        one = row(chance, side)
        found.setdefault(one["messages"][1]["content"], one)
    return list(found.values())


def main() -> None:
    for split in ROWS:
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in rows(split)]
        path = Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
