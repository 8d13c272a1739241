"""A second opinion on the decoder: optimum's own ONNX export of the same weights, under stock ONNX Runtime.

The language part of the checkpoint is a Qwen2 model where there is only text: then time, row and column of a position
are one number. optimum traces that model by itself, and shares no code with our graphs. Skipped without optimum, which
the extra `export` brings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from edge.backends.ort import OrtBackend
from edge.bundle import Bundle, open_bundle
from edge.decoder import Decoder
from edge.prompt import STREAMO
from edge.tokenizer import Tokenizer
from export.api import export_checkpoint

pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx, which the extra `export` brings")

RELATIVE_ERROR = 2e-5
PROMPTS = (
    STREAMO.system_text(),
    "<|im_start|>user\nWhat is on the table?<|im_end|>\n<|im_start|>assistant\n</Response> A red circle.<|im_end|>\n",
    "a",
)
DEMO = Path(__file__).resolve().parent.parent / "apps" / "demo" / "checkpoint"

Logits = Callable[[list[int]], np.ndarray]


def optimum_logits(checkpoint: Path, folder: Path) -> Logits:
    """Logits (T, V) of token ids, by optimum's export of the checkpoint's language part."""
    import onnxruntime
    import torch
    from optimum.exporters.onnx import main_export
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    text = whole.config.text_config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")  # fmt: skip
    shape = {name: getattr(text, name) for name in same}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=text.tie_word_embeddings))
    weights = {name.replace("language_model.", ""): value for name, value in whole.state_dict().items()}
    model.load_state_dict({name: value for name, value in weights.items() if "visual" not in name}, strict=True)
    model.save_pretrained(folder / "text")
    main_export(str(folder / "text"), output=folder / "onnx", task="text-generation", do_validation=False)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(ids: list[int]) -> np.ndarray:
        row = np.array([ids], np.int64)
        feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        named = {value.name: feeds[value.name] for value in session.get_inputs()}
        return np.asarray(session.run(["logits"], named)[0][0])

    return logits


def our_logits(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """Logits (T, V), token by token in the runtime's own decoder."""
    table = bundle.file(bundle.manifest.embedding.file)
    decoder = Decoder(bundle.manifest, table, OrtBackend(bundle, threads=1), len(ids))
    return np.stack([decoder.decode_step(token).copy() for token in ids])


def prefilled(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """Logits (V,) after all tokens, given to the runtime's decoder at once."""
    table = bundle.file(bundle.manifest.embedding.file)
    return Decoder(bundle.manifest, table, OrtBackend(bundle, threads=1), len(ids)).prefill([ids]).copy()


@pytest.fixture(scope="module", params=["random", "tied", "shipped"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Logits]:
    folder = tmp_path_factory.mktemp("second")
    checkpoint = folder / "checkpoint"
    if request.param == "shipped":
        checkpoint = DEMO
    else:
        write_checkpoint(checkpoint, layers=3, tied=request.param == "tied")
    export_checkpoint(checkpoint, folder / "bundle")
    return open_bundle(folder / "bundle"), optimum_logits(checkpoint, folder)


@pytest.mark.parametrize("native", [True, False])
def test_text_prompts_have_the_logits_of_optimums_own_export(
    models: tuple[Bundle, Logits], native: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    bundle, theirs = models
    if not native:
        monkeypatch.setattr("edge.native.available", lambda: "not wanted here")
    tokenizer = Tokenizer(bundle.file("tokenizer.json"))
    worst = 0.0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)[:200]
        expected = theirs(ids)
        stepped, whole = our_logits(bundle, ids), prefilled(bundle, ids)
        errors = [np.abs(stepped - expected).max(), np.abs(whole - expected[-1]).max()]
        worst = max(worst, float(max(errors) / np.abs(expected).max()))
        assert np.array_equal(stepped.argmax(axis=1), expected.argmax(axis=1))
    record_property("relative_error", worst)
    print(f"relative error {worst:.2g}")
    assert worst <= RELATIVE_ERROR
