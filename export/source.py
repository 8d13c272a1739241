"""Everything that is read of a checkpoint folder before its tensors are: shape, small files, the probe of the proof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.contract import TokenIds
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO
from export.adapter import open_adapter
from export.checkpoint import Checkpoint, open_checkpoint
from export.merge import with_adapter
from export.probe import Probe, build_probe
from export.stream_config import StreamFile, read_preprocess, read_stream_file
from export.tokens import read_tokenizer, token_ids


@dataclass(frozen=True)
class Source:
    """A checkpoint with its small files read."""

    checkpoint: Checkpoint
    tokenizer: bytes
    tokens: TokenIds
    stream: StreamFile
    preprocess: PreprocessConfig
    notes: list[str]
    probe: Probe


def open_source(folder: Path, adapter: str | Path | None = None) -> Source:
    """Open and check a checkpoint folder, with an adapter's folder merged into it as its tensors are read.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
    """
    checkpoint = open_checkpoint(folder)
    merge_notes: list[str] = []
    if adapter is not None:
        checkpoint, merge_notes = with_adapter(checkpoint, open_adapter(Path(adapter)))
    tokenizer = read_tokenizer(checkpoint)
    stream = read_stream_file(checkpoint)
    rows = checkpoint.facts.decoder.vocab_size
    tokens = token_ids(tokenizer, STREAMO, rows, spelled_states=stream.spelled_states)
    preprocess, notes = read_preprocess(checkpoint)
    probe = build_probe(preprocess, tokens, tokenizer)
    return Source(checkpoint, tokenizer, tokens, stream, preprocess, [*merge_notes, *notes], probe)
