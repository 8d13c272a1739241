"""The demonstration's checkpoint through every precision: bytes, how far its decisions move, quality, time for a turn.

Owns the list of precisions and the measurement. Everything is measured through the runtime with the bundle as it is:
the native kernels, 8-bit activations, the KV cache that the export chose.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.bench.machine import available_cores, machine_card

if TYPE_CHECKING:
    from apps.demo.world import Stream
    from edge.bundle import Bundle
    from edge.contract import TokenIds
    from export.turns import Conversation

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Setting:
    """One export."""

    weights: str
    kv: str
    method: str | None = None
    block: int = 32

    @property
    def name(self) -> str:
        rounding = f" {self.method}, blocks of {self.block}" if self.method else ""
        return f"{self.weights}{rounding}, KV {self.kv}"

    @property
    def folder(self) -> str:
        return "-".join(str(part) for part in (self.weights, self.method or "", self.block, self.kv) if part)


SETTINGS = (
    Setting("fp32", "fp32"),
    Setting("fp32", "int8"),
    Setting("fp16", "fp32"),
    Setting("int8", "fp32", "nearest"),
    Setting("int8", "int8", "nearest"),
    Setting("int4", "fp32", "nearest"),
    Setting("int4", "int8", "nearest"),
    Setting("int4", "fp32", "gptq"),
    Setting("int4", "int8", "gptq"),
    Setting("int4", "int8", "nearest", 128),
    Setting("int4", "int8", "gptq", 128),
)


def measure(
    checkpoint: Path, workdir: Path, seeds: range, *, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Export and measure every setting.

    Args:
      workdir: where the bundles go; those of an earlier run are made again.
      seeds: streams of the demonstration's world for the free-running figures; none: they are left out.

    Returns:
      machine card, settings of the measurement, and `rows`.
    """
    from apps.demo.clips import demo_clips
    from edge.bundle import open_bundle
    from export.api import conversations, export_checkpoint
    from export.checkpoint import open_checkpoint
    from export.diagnosis import float_logits
    from export.float_model import FloatModel

    report = progress or (lambda what, done, total: None)
    clips = demo_clips()
    talks = conversations(checkpoint, [clip for clip in clips if clip.held_out])
    model = FloatModel(open_checkpoint(checkpoint))
    expected = [float_logits(model, talk) for talk in talks]
    rows = []
    for i, setting in enumerate(SETTINGS):
        report("precisions", i, len(SETTINGS))
        folder = workdir / setting.folder
        export_checkpoint(
            checkpoint,
            folder,
            weights=setting.weights,
            kv=setting.kv,
            method=setting.method,
            block_size=setting.block,
            clips=clips if setting.method == "gptq" else None,
            overwrite=True,
            allow_mismatch=True,
        )
        bundle = open_bundle(folder)
        row = {"name": setting.name, **asdict(setting), **_bytes(bundle)}
        found = [_logits(bundle, talk, threads) for talk in talks]
        row |= held_out_figures(talks, expected, found, bundle.manifest.tokens)
        rows.append(row | (free_running(bundle, seeds, threads) if seeds else {}))
    report("precisions", len(SETTINGS), len(SETTINGS))
    held_out = {"clips": [talk.name for talk in talks], "turns": sum(len(talk.frames) for talk in talks)}
    return {
        "machine": machine_card(threads or available_cores()),
        "held_out": held_out,
        "seeds": [seeds.start, seeds.stop],
        "rows": rows,
    }


def _logits(bundle: Bundle, talk: Conversation, threads: int | None) -> np.ndarray:
    """Logits (n, V) behind the held-out parts, by the runtime's own decoder, the conversation given as it is."""
    from edge.backends import load_backend
    from edge.decoder import Decoder, FrameTokens

    manifest, backend = bundle.manifest, load_backend("cpu", bundle, threads=threads)
    table = bundle.file(manifest.embedding.file)
    decoder = Decoder(manifest, table, backend, capacity_tokens=len(talk.ids))
    merge, frames, found = manifest.preprocess.merge_size, iter(talk.frames), []
    for part in talk.parts:
        segments: list[Any] = []
        for visual, ids in groupby(part.tolist(), lambda token: token == talk.image_pad):
            if visual:
                patches, rows, columns = next(frames)
                embeds = backend.encode(patches, rows, columns).copy()
                segments.append(FrameTokens(embeds, rows // merge, columns // merge))
            else:
                segments.append(list(ids))
        found.append(np.array(decoder.prefill(segments)))
    return np.stack([found[i] for i in talk.held_out_parts])


def held_out_figures(
    talks: Sequence[Conversation], expected: Sequence[np.ndarray], found: Sequence[np.ndarray], tokens: TokenIds
) -> dict[str, float]:
    """How far decisions move on the held-out turns, every one after the unquantised model's own conversation."""
    from export.held_out import Tally

    tally = Tally(tokens)
    for talk, wanted, given in zip(talks, expected, found, strict=True):
        tally.add(talk, wanted, given)
    figures = tally.figures()
    return {
        **{name: figures[name] for name in ("kl_mean", "kl_max", "top1_agreement")},
        "kl_p99": float(f"{np.quantile(tally.divergences, 0.99):.4g}"),
        "state_flips": sum(figures["state_flips"].values()),
        "decisions": len(tally.agreed),
        "turns": tally.turns,
    }


def free_running(bundle: Bundle, seeds: range, threads: int | None) -> dict[str, Any]:
    """The scores of `eval demo`, and the median time of a turn in which the model said nothing."""
    from apps.demo.evaluate import evaluate, run_session
    from edge import StreamSession

    session = StreamSession(bundle, threads=threads)
    times_ms: list[float] = []

    def run_stream(stream: Stream) -> list[tuple[str, str]]:
        turns = run_session(session, stream)
        times_ms.extend(turn.timing_ms["turn"] for turn in turns if not turn.text and turn.logits is not None)
        return [(turn.state.value, turn.text) for turn in turns]

    scores = evaluate(run_stream, seeds)
    figures = {name: round(scores[name], 4) for name in ("response_f1", "state_accuracy", "answer_accuracy")}
    return {**figures, "turn_ms": round(statistics.median(times_ms), 2), "turn_ms_min": round(min(times_ms), 2)}


def _bytes(bundle: Bundle) -> dict[str, int]:
    manifest = bundle.manifest
    return {
        "bundle_bytes": sum(facts.bytes for facts in manifest.files.values()),
        "decoder_bytes": manifest.decoder.weights_bytes,
        "kv_bytes_per_token": manifest.kv_bytes_per_token,
    }
