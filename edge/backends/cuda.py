"""A bundle's native graphs on ONNX Runtime's CUDA provider, with our operators' GPU kernels.

Owns what has to be there for that, what it takes of the GPU's memory, and what becomes of its errors. The cache, the
frame's tokens and every activation stay on the device; a run is given the tokens' embeddings, angles and small tables,
and gives back the logits, or the token that was chosen from them there. Runs of one token are recorded as CUDA graphs:
see `step_graphs`.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from edge import contract
from edge.backends.base import CacheView
from edge.backends.cuda_provider import PROVIDER, check_provider, provider_options
from edge.backends.device_patches import device_patches
from edge.backends.lost_device import keep_for_ever
from edge.backends.ort import OrtBackend, uses_native_graph
from edge.backends.ort_session import OrtSession, Provider, onnxruntime_module
from edge.backends.place import DevicePlace
from edge.backends.step_graphs import NO_GRAPH, StepGraphs
from edge.backends.step_table import StepTable
from edge.bundle import Bundle
from edge.contract import Manifest
from edge.decoder import MAX_PREFILL_TOKENS
from edge.device_frames import FrameOnDevice
from edge.errors import BackendError, DeviceLostError, EdgeError, MemoryBudgetError
from edge.gpu import Gpu
from edge.gpu_abi import cubin_folder
from edge.gpu_arrays import DeviceArray
from edge.memory import bytes_text
from edge.preprocess import PreprocessConfig
from edge.sampling import Logits

_HOST_INPUTS = frozenset((contract.NEW_SLOTS, contract.SPANS, contract.WINDOW_STARTS))
_FIXED_BYTES = 512 << 20  # ONNX Runtime's own kernels, cuBLAS, and the driver's context
_TRIAL_TOKENS = 64  # of a cache
_TRIAL_ERROR = 1e-3  # relative; only ONNX Runtime's own products may take another way while they are recorded
_NO_CODE = re.compile(r"no kernel image|CUDA (failure|error) 209", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|failed to allocate|allocate.*failed|no memory", re.IGNORECASE)


class CudaBackend(OrtBackend):
    """Runs both native graphs on one GPU.

    Args:
      bundle: an open bundle.
      threads: for what ONNX Runtime does on the CPU.
      device: number of the GPU.
      exclusive: refuse graphs of which any node would run on the CPU.
      on_host: the operators launch the GPU kernels from ONNX Runtime's CPU provider; for tests with a driver whose
        device memory is the host's.

    Raises:
      DeviceError: no GPU, no driver, too old a driver, or no kernels for this GPU.
      BackendError: the bundle has no native graphs, or ONNX Runtime is a build without CUDA or cannot load it.
      MemoryBudgetError: the weights do not fit in the GPU's memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        device: int = 0,
        exclusive: bool = False,
        on_host: bool = False,
    ) -> None:
        _check_graphs(bundle)
        this = weakref.ref(self)
        self.gpu = Gpu(device, on_loss=lambda: keep_for_ever(this()))
        facts = self.gpu.facts
        if not on_host:
            check_provider()
        check_weights_fit(bundle.manifest, facts.free_bytes, facts.name)
        self._stream = self.gpu.make("stream")
        name = f"{facts.name} (SM {facts.sm // 10}.{facts.sm % 10})"
        place = DevicePlace(self.gpu, self._stream, ("cpu" if on_host else "cuda", device), _HOST_INPUTS, name)
        self._table = StepTable(place, None if on_host else self._stream)
        self._sent: tuple[int, ...] = ()  # what `_table` says of the run that comes next
        self._graphs: StepGraphs | None = StepGraphs()
        self._records = False  # the run that is under way
        entries = {"streamo.gpu": "host" if on_host else str(device), "streamo.gpu.kernels": str(cubin_folder())}
        provider = Provider(entries=entries, diagnose=self._diagnose)
        if not on_host:
            options = provider_options(bundle.manifest, device, self._stream)
            provider = Provider(PROVIDER, options, entries, exclusive, self._diagnose)
        self._open(bundle, threads, provider, place)
        self.identity |= {
            "gpu": facts.name,
            "sm": str(facts.sm),
            "driver": facts.driver_version,
            "gpu kernels": _archive_digest(facts.kernel_sm),
        }

    def _open(self, bundle: Bundle, threads: int | None, provider: Provider, place: DevicePlace) -> None:
        """Load the graphs, the decoder's so that its steps are recorded, if ONNX Runtime can."""
        if provider.name != PROVIDER:  # nothing is recorded; the numbers are given all the same
            super().__init__(bundle, threads=threads, provider=provider, place=place)
            return
        recording = replace(provider, options={**provider.options, "enable_cuda_graph": "1"})
        try:
            super().__init__(bundle, threads=threads, provider=provider, place=place, decoder_provider=recording)
            self._try_recording()
            return
        except DeviceLostError:
            raise
        except BackendError as error:
            refusal = f"ONNX Runtime does not record decode steps here, and takes longer for each: {error.message}"
        self._end_recording()  # before the session that began it is ended
        for name in ("_decoder", "_vision"):  # so that there is memory for the weights of the next
            vars(self).pop(name, None)
        self._graphs = None
        super().__init__(bundle, threads=threads, provider=provider, place=place)
        self.notices.append(refusal)

    def _try_recording(self) -> None:
        """Two steps launched, then the first recorded and repeated for the second: to see now, not in a stream.

        Raises:
          BackendError: ONNX Runtime cannot record, or what it repeats is not the second step.
        """
        facts, random = self._manifest.decoder_facts, np.random.default_rng(0)
        angles = random.uniform(0, 6, (2, facts.head_dim // 2)).astype(np.float32)
        cos, sin = np.cos(angles), np.sin(angles)
        embeds = self.embeds_buffer(1)
        tokens = random.standard_normal((2, facts.hidden_size)).astype(np.float32)
        still = (np.ones_like(cos[:1]), np.zeros_like(sin[:1]))

        def second_of_two() -> np.ndarray:
            for i in range(2):
                embeds[0:1] = tokens[i : i + 1]
                spans = np.array([(0, i, 0)] if i else [], np.int32).reshape(-1, 3)
                view = CacheView(np.array([i], np.int32), spans, *still)
                logits = self._run_once(embeds[0:1], cos[i : i + 1], sin[i : i + 1], view)
            return np.array(logits)

        self.allocate_cache(_TRIAL_TOKENS)
        self._graphs = StepGraphs(0)
        launched = second_of_two()
        self._graphs = StepGraphs()
        repeated = second_of_two()
        if not np.linalg.norm(repeated - launched) <= _TRIAL_ERROR * np.linalg.norm(launched):
            raise BackendError("what it repeats is not what was launched")

    def run_decoder(self, inputs_embeds: Any, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView) -> Logits:
        try:
            return self._run_once(inputs_embeds, rope_cos, rope_sin, view)
        except DeviceLostError:
            raise
        except BackendError:
            if not self._records:
                raise
        # What another thread asks of the device can spoil a recording. The step is done again, and none is recorded.
        self._end_recording()
        self._graphs = StepGraphs(0)
        return self._run_once(inputs_embeds, rope_cos, rope_sin, view)

    def _run_once(self, inputs_embeds: Any, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView) -> Logits:
        self._sent = self._table.send(view, self._first_keys.shape[2])
        return super().run_decoder(inputs_embeds, rope_cos, rope_sin, view)

    @property
    def _first_keys(self) -> DeviceArray:
        """The first layer's keys (1, Hkv, C, D); the rest of the cache lies behind them."""
        found: DeviceArray = self.cache[contract.key_cache_name(0)]
        return found

    def _end_recording(self) -> None:
        """Else the stream would go on to record whatever it is given."""
        with suppress(BackendError):
            self.gpu.destroy("graph", self.gpu.end_graph(self._stream))

    def _graph_of(self, session: OrtSession, given: Mapping[str, Any]) -> int | None:
        self._records = False
        if self._graphs is None or session is not self._decoder:
            return None
        if given[contract.ROPE_COS].shape[0] != 1:
            return NO_GRAPH
        inputs = [(array.pointer, *array.shape) for array in given.values() if isinstance(array, DeviceArray)]
        key = (self._first_keys.pointer, *self._first_keys.shape, *self._sent, *inputs)
        is_new = not self._graphs.has(key)
        number = self._graphs.number(key)
        self._records = is_new and number != NO_GRAPH
        return number

    def patches_of_frame(
        self, frame: FrameOnDevice, size: tuple[int, int], preprocess: PreprocessConfig
    ) -> DeviceArray:
        """See `device_patches`."""
        assert isinstance(self._place, DevicePlace)
        return device_patches(self._place, frame, size, preprocess)

    def _diagnose(self, error: Exception) -> EdgeError | None:
        """What is behind an exception of ONNX Runtime: the device is lost, its memory is full, or something else."""
        try:
            self.gpu.synchronize(self._stream)
        except DeviceLostError as lost:
            return lost
        except EdgeError:
            pass  # ONNX Runtime's own words say more
        facts = self.gpu.facts
        if _NO_CODE.search(str(error)):
            return BackendError(
                f"ONNX Runtime {onnxruntime_module().__version__} has no machine code of its own for {facts.name} "
                f"(SM {facts.sm // 10}.{facts.sm % 10})",
                hint="Use `--backend tensorrt`, or a build of ONNX Runtime for this GPU; docs/gpu.md has the table",
            )
        if not _NO_MEMORY.search(str(error)):
            return None
        return MemoryBudgetError(
            f"The memory of {facts.name} is full: a run needs more than the {bytes_text(facts.free_bytes)} that are "
            f"free of {bytes_text(facts.memory_bytes)}",
            hint="Use a smaller `--window`, a bundle with fewer bits, or end other programs on the GPU",
        )


def check_weights_fit(manifest: Manifest, free_bytes: int, device: str) -> None:
    """Refuse a bundle whose weights and workspace are more than the device has free, before anything is loaded.

    Raises:
      MemoryBudgetError: with both numbers and the parts.
    """
    weights, workspace = weights_bytes(manifest), workspace_bytes(manifest)
    if weights + workspace > free_bytes:
        raise MemoryBudgetError(
            f"The bundle needs {bytes_text(weights + workspace)} on {device}: {bytes_text(weights)} for weights and "
            f"{bytes_text(workspace)} to work in, before any cache; {bytes_text(free_bytes)} is free",
            hint="Export with `--weights int4`, end other programs on the GPU, or use `--backend cpu`",
        )


def weights_bytes(manifest: Manifest) -> int:
    """Bytes of both components' weights on the device; float16 ones become float32 there."""
    parts = (manifest.vision, manifest.decoder)
    return sum(part.weights_bytes * (2 if part.weights == "fp16" else 1) for part in parts)


def workspace_bytes(manifest: Manifest) -> int:
    """An estimate of what runs take besides weights and cache: a few of each layer's activations, and the libraries."""
    decoder, vision = manifest.decoder_facts, manifest.vision_facts
    merge = manifest.preprocess.merge_size**2
    text = MAX_PREFILL_TOKENS * (4 * decoder.hidden_size + 3 * decoder.intermediate_size)
    frame = manifest.max_visual_tokens * merge * (6 * vision.hidden_size + 3 * vision.intermediate_size)
    return 4 * (text + frame + decoder.vocab_size) + _FIXED_BYTES


def _check_graphs(bundle: Bundle) -> None:
    from edge import native

    missing = native.available()
    if missing is not None:
        raise BackendError(f"Backend cuda needs the native library: {missing}", hint="Install streamo-edge again")
    for name, part in (("vision", bundle.manifest.vision), ("decoder", bundle.manifest.decoder)):
        if not uses_native_graph(part):
            raise BackendError(
                f"Backend cuda runs native graphs, and bundle `{bundle.path.name}` has none of its {name}",
                hint="Use `--backend cpu`",
            )


def _archive_digest(sm: int) -> str:
    """Of the kernels in use."""
    try:
        content = (cubin_folder() / f"sm_{sm}.cubins").read_bytes()
    except OSError:
        return "unknown"
    return hashlib.sha256(content).hexdigest()[:12]
