"""A bundle's graphs on ONNX Runtime.

Owns the two inference sessions and the KV cache's memory, which is bound to input and output alike so that the
attention operator updates it in place. Every exception of ONNX Runtime is mapped here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge import contract
from edge.bundle import Bundle
from edge.errors import BackendError, MemoryBudgetError
from edge.memory import available_bytes

_FIRST_WITH_INT8_BLOCKS = (1, 24)  # 1.23 does not fuse 8-bit blocked weights into MatMulNBits


class OrtBackend:
    """Runs both graphs on ONNX Runtime's CPU provider.

    Args:
      bundle: an open bundle.
      threads: threads inside one operator; None leaves the choice to ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._manifest = bundle.manifest
        manifest = bundle.manifest
        self._vision = _load(bundle.file(manifest.vision.file), manifest.vision.weights, threads)
        self._decoder = _load(bundle.file(manifest.decoder.file), manifest.decoder.weights, threads)
        self._binding = self._decoder.io_binding()
        self._logits = np.empty((1, bundle.manifest.decoder_facts.vocab_size), np.float32)
        self._cache: list[np.ndarray] = []
        _bind(self._binding.bind_output, contract.LOGITS, self._logits)

    def allocate_cache(self, capacity_tokens: int) -> None:
        facts = self._manifest.decoder_facts
        shape = (1, facts.num_kv_heads, capacity_tokens, facts.head_dim)
        wanted_bytes = capacity_tokens * self._manifest.kv_bytes_per_token
        free_bytes = available_bytes()
        if free_bytes is not None and wanted_bytes > free_bytes:  # before the kernel ends the process instead
            raise MemoryBudgetError(
                f"The KV cache needs {wanted_bytes / 2**20:.0f} MiB for {facts.layers} layers x {capacity_tokens} "
                f"tokens, {free_bytes / 2**20:.0f} MiB is free",
                hint="Use a smaller window",
            )
        # Filled, because pages of numpy.zeros are only taken when first written: what lacks should lack at the start.
        self._cache = [np.full(shape, 0, dtype) for dtype in self._manifest.kv_dtypes for _ in ("key", "value")]
        for layer in range(facts.layers):
            for name, array in (
                (contract.key_cache_name(layer), self._cache[2 * layer]),
                (contract.value_cache_name(layer), self._cache[2 * layer + 1]),
            ):
                _bind(self._binding.bind_input, name, array)
                _bind(self._binding.bind_output, contract.updated(name), array)

    def encode(
        self, patches: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, window_mask: np.ndarray
    ) -> np.ndarray:
        feeds = {
            contract.PATCHES: patches,
            contract.VISION_COS: rope_cos,
            contract.VISION_SIN: rope_sin,
            contract.WINDOW_MASK: window_mask,
        }
        try:
            return np.asarray(self._vision.run([contract.IMAGE_EMBEDS], feeds)[0])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"The vision graph failed: {error}") from None

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, cache_length: int
    ) -> np.ndarray:
        length = np.array([cache_length], np.int32)
        _bind(self._binding.bind_input, contract.INPUTS_EMBEDS, inputs_embeds)
        _bind(self._binding.bind_input, contract.ROPE_COS, rope_cos)
        _bind(self._binding.bind_input, contract.ROPE_SIN, rope_sin)
        _bind(self._binding.bind_input, contract.CACHE_LENGTH, length)
        try:
            self._decoder.run_with_iobinding(self._binding)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"The decoder graph failed: {error}") from None
        return self._logits[0]


def _load(path: Path, weights: str, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be loaded: {error}", hint="pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # turns differ in length; patterns would be kept for every one
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", contract.MATMUL_ACCURACY_LEVEL)
    if weights == "int8" and _version(onnxruntime.__version__) < _FIRST_WITH_INT8_BLOCKS:
        # Else 8-bit blocks would be dequantised again on every run; so they become float32 once, at load.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load `{path.name}`: {error}",
            hint="Export the checkpoint again with this version of streamo-edge",
        ) from None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _bind(bind: Any, name: str, array: np.ndarray) -> None:
    """Bind memory that the caller keeps alive until the run is over."""
    bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
