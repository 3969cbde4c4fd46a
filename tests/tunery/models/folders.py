"""Model folders and GGUF files that tests write themselves."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = "{{ messages }}"


def write_llama(folder: Path) -> Path:
    """A folder with the outside of a Llama: a config, one six-number tensor, a tokenizer config."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    header = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 24)
    return folder


def write_gguf(path: Path) -> Any:
    """A random two-layer Llama of 257 tokens; returns layer 1's down projection, (out, in)."""
    import gguf
    import numpy as np

    hidden, middle, heads, layers = 32, 64, 4, 2
    numbers = np.random.default_rng(3)
    tokens = [*(chr(0x100 + i) for i in range(253)), "a", "b", "ab", "</s>"]

    def weights(*size: int) -> Any:
        return numbers.standard_normal(size, dtype=np.float32)

    out = gguf.GGUFWriter(str(path), "llama")
    out.add_block_count(layers)
    out.add_context_length(128)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(middle)
    out.add_head_count(heads)
    out.add_head_count_kv(heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_merges(["a b"])
    out.add_token_types([1] * 256 + [3])
    out.add_eos_token_id(256)
    out.add_bos_token_id(256)
    out.add_chat_template("{{ messages[0]['content'] }}")
    out.add_tensor("token_embd.weight", weights(len(tokens), hidden))
    out.add_tensor("output_norm.weight", weights(hidden))
    down: Any = None
    for layer in range(layers):
        for name, size in (
            ("attn_q", (hidden, hidden)),
            ("attn_k", (hidden, hidden)),
            ("attn_v", (hidden, hidden)),
            ("attn_output", (hidden, hidden)),
            ("ffn_gate", (middle, hidden)),
            ("ffn_up", (middle, hidden)),
            ("attn_norm", (hidden,)),
            ("ffn_norm", (hidden,)),
        ):
            out.add_tensor(f"blk.{layer}.{name}.weight", weights(*size))
        down = weights(hidden, middle)
        out.add_tensor(f"blk.{layer}.ffn_down.weight", down)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return down
