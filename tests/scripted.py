"""A small bundle folder without graphs, for tests of the session's logic with `ScriptedBackend`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
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
from edge.prompt import STREAMO, Protocol

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
STATES = ["</Silence>", "</Standby>", "</Response>"]
FRAME = np.zeros((28, 28, 3), np.uint8)


def byte_tokenizer(merges: Sequence[tuple[str, str]] = (), split: str | None = None) -> str:
    """A byte-level tokenizer: one token a byte, plus the merges given, plus the special tokens.

    Args:
      merges: pairs in the byte-level alphabet, where a newline is `Ċ`.
      split: regular expression of the pieces that no merge crosses; None lets merges cross anything.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in [*SPECIAL, *STATES]])
    return tokenizer.to_str()


def scripted_bundle(
    folder: Path,
    *,
    state_pieces: bool = False,
    max_pixels: int = 28 * 28,
    tokenizer_json: str | None = None,
    protocol: Protocol = STREAMO,
    decoder_facts: DecoderFacts | None = None,
) -> Bundle:
    """Write and open a bundle whose graphs are empty files.

    Args:
      state_pieces: the states are spelt in several tokens.
      tokenizer_json: instead of `byte_tokenizer`.
      decoder_facts: of a decoder that the caller brings; the embedding table is random then, else zeros.
    """
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer_json or byte_tokenizer()
    tokenizer = Tokenizer.from_str(text)
    rows = tokenizer.get_vocab_size()
    facts = replace(decoder_facts or DecoderFacts(1, 8, 8, 1, 1, 8, 0, 1e-6, 1e4, (1, 1, 2), True), vocab_size=rows)
    hidden = facts.hidden_size

    def ids(name: str) -> tuple[int, ...]:
        if state_pieces:
            return tuple(tokenizer.token_to_id(character) for character in name)
        return (tokenizer.token_to_id(name),)

    (folder / "tokenizer.json").write_text(text)
    (folder / "vision.onnx").write_bytes(b"")
    (folder / "decoder.onnx").write_bytes(b"")
    table = np.random.default_rng(0).standard_normal((rows, hidden)) * (decoder_facts is not None)
    table.astype(np.float32).tofile(folder / "embeddings.bin")
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        tool="test",
        source={"name": "scripted"},
        decoder_facts=facts,
        vision_facts=VisionFacts(1, 8, 8, 1, hidden, 112, (0,)),
        preprocess=PreprocessConfig(min_pixels=28 * 28, max_pixels=max_pixels),
        protocol=protocol,
        tokens=TokenIds(
            *(ids(state) for state in STATES),
            image_pad=tokenizer.token_to_id("<|image_pad|>"),
            im_end=tokenizer.token_to_id("<|im_end|>"),
            end_of_text=tokenizer.token_to_id("<|endoftext|>"),
        ),
        embedding=EmbeddingTable("embeddings.bin", rows, hidden, "float32"),
        vision=Component("vision.onnx", "fp32", 0, (), ()),
        decoder=Component("decoder.onnx", "fp32", 0, (), ()),
        kv_dtypes=("float32",) * facts.layers,
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
