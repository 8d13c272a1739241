"""A small bundle folder without graphs, for tests of the session's logic with `ScriptedBackend`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from edge.bundle import Bundle, open_bundle
from edge.contract import (
    MANIFEST_SCHEMA,
    Component,
    DecoderFacts,
    EmbeddingTable,
    FileFacts,
    Manifest,
    StreamDefaults,
    TokenIds,
    VisionFacts,
    manifest_to_json,
)
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
STATES = ["</Silence>", "</Standby>", "</Response>"]
FRAME = np.zeros((28, 28, 3), np.uint8)


def byte_tokenizer() -> str:
    """A byte-level tokenizer without merges: one token a byte, plus the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in [*SPECIAL, *STATES]])
    return tokenizer.to_str()


def scripted_bundle(folder: Path, *, state_pieces: bool = False, max_pixels: int = 28 * 28) -> Bundle:
    """Write and open a bundle whose graphs are empty files; `state_pieces` spells the states in several tokens."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = byte_tokenizer()
    tokenizer = Tokenizer.from_str(text)
    rows, hidden = tokenizer.get_vocab_size(), 8

    def ids(name: str) -> tuple[int, ...]:
        if state_pieces:
            return tuple(tokenizer.token_to_id(character) for character in name)
        return (tokenizer.token_to_id(name),)

    (folder / "tokenizer.json").write_text(text)
    (folder / "vision.onnx").write_bytes(b"")
    (folder / "decoder.onnx").write_bytes(b"")
    np.zeros((rows, hidden), np.float32).tofile(folder / "embeddings.bin")
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        tool="test",
        source={"name": "scripted"},
        decoder_facts=DecoderFacts(1, hidden, 8, 1, 1, 8, rows, 1e-6, 1e4, (1, 1, 2), True),
        vision_facts=VisionFacts(1, 8, 8, 1, hidden, 112, (0,)),
        preprocess=PreprocessConfig(min_pixels=28 * 28, max_pixels=max_pixels),
        protocol=STREAMO,
        tokens=TokenIds(
            *(ids(state) for state in STATES),
            image_pad=tokenizer.token_to_id("<|image_pad|>"),
            im_end=tokenizer.token_to_id("<|im_end|>"),
            end_of_text=tokenizer.token_to_id("<|endoftext|>"),
        ),
        embedding=EmbeddingTable("embeddings.bin", rows, hidden, "float32"),
        vision=Component("vision.onnx", "fp32", 0, (), ()),
        decoder=Component("decoder.onnx", "fp32", 0, (), ()),
        kv_dtypes=("float32",),
        files={
            path.name: FileFacts(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in folder.iterdir()
            if path.name != "manifest.json"
        },
        stream=StreamDefaults(window_turns=4, max_reply_tokens=16),
    )
    (folder / "manifest.json").write_text(json.dumps(manifest_to_json(manifest)))
    return open_bundle(folder)


def reply_ids(bundle: Bundle, text: str) -> list[int]:
    """Token ids of a reply such as `</Response> Hello`."""
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(bundle.file("tokenizer.json"))).encode(text).ids)
