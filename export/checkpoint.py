"""A Hugging Face checkpoint folder: its config, and its tensors by one set of names whatever wrote the files.

Owns the folder's files and what is wrong with them; which tensors there have to be is `tensor_names`'s. Knows no graph,
and holds no tensor: each is read when asked for, with the update of an adapter where there is one (see `merge`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import CheckpointError
from export.config import ModelFacts, facts_from_config
from export.low_rank import LowRank
from export.safetensors_file import DTYPE_NAMES, TensorEntry, read_entries, read_raw, require_finite, to_float32
from export.tensor_names import COMPUTED, EMBEDDING, HEAD, canonical_name, expected_shapes

if TYPE_CHECKING:
    from export.adapter import Adapter

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_LISTED = 5

TILE_ROWS = 256
"""Rows that are transposed together, so that what is read and what is written both stay in cache."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, every tensor present and of the right shape.

    Args:
      entries: by the names of transformers' current model class.
      updates: of the tensors that an adapter changes, what is added when they are read.
      adapter: the adapter that `updates`, and some of `entries`, are from.
    """

    folder: Path
    config: dict[str, Any]
    config_sha256: str
    facts: ModelFacts
    entries: dict[str, TensorEntry]
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def head_name(self) -> str:
        """The tensor that turns hidden states into logits."""
        return EMBEDDING if self.facts.decoder.tied_embeddings else HEAD

    @property
    def parameters(self) -> int:
        return sum(entry.count for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """The dtype of the tensors, or of most of their bytes where it differs."""
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
        return DTYPE_NAMES[max(sorted(counts), key=lambda dtype: counts[dtype])]

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        files = {entry.path for entry in self.entries.values()}
        return sorted(files | set(self.adapter.files if self.adapter else []))

    def folder_of(self, name: str) -> Path:
        """Where a small file lies: in the adapter's folder, if training left one there, else in the checkpoint's."""
        own = self.adapter is not None and (self.adapter.folder / name).is_file()
        return self.adapter.folder if own and self.adapter else self.folder

    def read(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        entry = self.entries[name]
        return self._read_rows(name, 0, entry.shape[0]) if name in self.updates else to_float32(read_raw(entry), entry)

    def token_rows(self, first: int, last: int) -> np.ndarray:
        """Embeddings of the tokens `first` to `last`, (last - first, W) float32."""
        return self._read_rows(EMBEDDING, first, last)

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (T, W) float32 of tokens (T,), each row read once."""
        rows = {token: self.token_rows(token, token + 1)[0] for token in sorted({int(i) for i in ids})}
        return np.stack([rows[int(token)] for token in ids])

    def head_rows(self, rows_at_a_time: int) -> Iterator[np.ndarray]:
        """The head's rows as float32, `rows_at_a_time` at a time."""
        return self.rows(self.head_name, rows_at_a_time)

    def rows(self, name: str, rows_at_a_time: int) -> Iterator[np.ndarray]:
        """A tensor's rows as float32, `rows_at_a_time` at a time."""
        count = self.entries[name].shape[0]
        for first in range(0, count, rows_at_a_time):
            yield self._read_rows(name, first, min(first + rows_at_a_time, count))

    def columns(self, name: str) -> ColumnReader:
        """A matrix (N, K), to be read some columns at a time."""
        return ColumnReader(self, name)

    def _read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        entry, update = self.entries[name], self.updates.get(name)
        if update is None:
            return to_float32(read_raw(entry, first, last), entry)
        return update.opened().rows(entry, first, last)


class ColumnReader:
    """A matrix (N, K) that is held while its columns are read, as stored where that is smaller than float32.

    The file is read at the first use, so that a reader that is not used costs nothing.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._entry = checkpoint.entries[name]
        self._update = checkpoint.updates.get(name)
        self._held: np.ndarray | None = None
        self.shape = self._entry.shape

    def read_into(self, rows: np.ndarray, first: int) -> None:
        """Columns from `first` on, each as a row of `rows` (columns, N) float32, which holds zeros.

        Raises:
          CheckpointError: a value is infinite or not a number; names the tensor.
        """
        held, last = self._hold(), first + len(rows)
        if held.dtype != np.uint16:
            part = held[:, first:last]
            rows[:] = (part if self._update else to_float32(part, self._entry)).T
            return
        upper = rows.view(np.uint16)[:, 1::2]  # bfloat16 is the upper half of a float32
        for start in range(0, len(held), TILE_ROWS):
            upper[:, start : start + TILE_ROWS] = held[start : start + TILE_ROWS, first:last].T
        require_finite(rows, f"Tensor `{self._entry.name}`")

    def _hold(self) -> np.ndarray:
        if self._held is None:
            entry, update = self._entry, self._update
            self._held = read_raw(entry) if update is None else update.opened().rows(entry, 0, entry.shape[0])
        return self._held


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open and check a checkpoint folder. Reads headers only.

    Raises:
      CheckpointError: not a checkpoint folder, another architecture, pickled or damaged weights, tensors missing,
        unknown or of another shape.
    """
    try:
        return _open(folder)
    except OSError as error:  # names too long for the system, folders that may not be searched
        raise CheckpointError(
            f"Checkpoint `{folder}` cannot be read: {error.strerror or error}",
            hint="Check the folder's name and permissions",
        ) from None


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"Checkpoint `{folder}` is not a folder", hint="Give the folder that holds `config.json`")
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors")):
        raise _an_adapter(folder)
    config_bytes = read_file(folder, "config.json")
    config = parse_json("config.json", config_bytes)
    facts_from_config(config)  # another architecture is refused by name, not by its tensors
    entries: dict[str, TensorEntry] = {}
    for path in _weight_files(folder):
        for name, entry in read_entries(path).items():
            canonical = canonical_name(name)
            if canonical in entries:
                raise CheckpointError(
                    f"Tensor `{canonical}` is in `{entries[canonical].path.name}` and again in `{path.name}`",
                    hint="Remove the file that is left over from another checkpoint",
                )
            if not COMPUTED.search(name):
                entries[canonical] = entry
    facts = facts_from_config(config, has_head=HEAD in entries)
    _check_tensors(entries, expected_shapes(facts))
    if facts.decoder.tied_embeddings:
        entries.pop(HEAD, None)  # a copy of the embedding that some tools write; transformers ignores it too
    return Checkpoint(folder, config, hashlib.sha256(config_bytes).hexdigest(), facts, dict(sorted(entries.items())))


def read_file(folder: Path, name: str) -> bytes:
    """A small file of the checkpoint.

    Raises:
      CheckpointError: it is missing or cannot be read.
    """
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint `{folder}` has no readable `{name}` ({error.strerror})",
            hint="Give a folder as `save_pretrained` of model and processor writes it",
        ) from None


def parse_json(name: str, content: bytes) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
      CheckpointError: it is not one.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{name}` is not JSON: {error}", hint="Copy the checkpoint again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"`{name}` should hold a JSON object, found {type(document).__name__}")
    return document


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        index = parse_json(INDEX_FILE, read_file(folder, INDEX_FILE)).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"`{INDEX_FILE}` has no `weight_map`", hint="Copy the checkpoint again")
        names = sorted({str(name) for name in index.values()})
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise _no_weights(folder)
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"`{INDEX_FILE}` names {len(names)} shards, {len(missing)} of them are not in the folder: "
            f"{_listed([f'`{name}`' for name in missing])}",
            hint="Copy the missing shards",
        )
    return [folder / name for name in names]


def named_base(folder: Path) -> str | None:
    """The base model that an adapter's config names, if it does."""
    try:
        name = json.loads((folder / ADAPTER_CONFIG_FILE).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and name else None


def _an_adapter(folder: Path) -> CheckpointError:
    base = named_base(folder)
    return CheckpointError(
        f"`{folder}` holds a LoRA adapter (`{ADAPTER_CONFIG_FILE}`), not a whole model",
        hint=f"Give its base model{f' ({base})' if base else ''} as CHECKPOINT, and `--adapter {folder}`",
    )


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"`{pickles[0]}` is a pickle, which can run code when opened; expected `{SINGLE_FILE}`",
            hint='python -c "from transformers import Qwen2_5_VLForConditionalGeneration as M; M.from_pretrained('
            f"'{folder}', torch_dtype='auto').save_pretrained('{folder}-safetensors')\", then copy "
            "`tokenizer.json` and `preprocessor_config.json` there",
        )
    return CheckpointError(
        f"Checkpoint `{folder}` has neither `{SINGLE_FILE}` nor `{INDEX_FILE}`",
        hint="Give a folder as `model.save_pretrained` writes it",
    )


def _check_tensors(entries: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]]) -> None:
    missing = [f"`{name}` {list(shape)}" for name, shape in expected.items() if name not in entries]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of {len(expected)} tensors: {_listed(missing)}",
            hint="Copy every shard",
        )
    wrong = [
        f"`{name}` expected {list(shape)}, found {list(entries[name].shape)}"
        for name, shape in expected.items()
        if entries[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors do not have the shape that `config.json` gives them: {_listed(wrong)}",
            hint="Check that `config.json` belongs to these weights",
        )
    extra = [f"`{name}`" for name in entries if name not in expected and name != HEAD]
    if extra:
        raise CheckpointError(
            f"The checkpoint has {len(extra)} tensors that the architecture does not know: {_listed(extra)}",
            hint="Check that `config.json` belongs to these weights; an adapter is given as `--adapter DIR`",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown} and {len(names) - MAX_LISTED} more"
