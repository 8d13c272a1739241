"""A checkpoint with an adapter's changes, made as its tensors are read.

Owns what belongs to what: an adapter's tensors to the checkpoint's, and what a change does to a head that is tied to
the token embeddings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from edge.errors import CheckpointError
from export.adapter import Adapter
from export.checkpoint import Checkpoint
from export.low_rank import LowRank
from export.safetensors_file import TensorEntry
from export.tensor_names import EMBEDDING, HEAD, canonical_name


def with_adapter(checkpoint: Checkpoint, adapter: Adapter) -> tuple[Checkpoint, list[str]]:
    """`checkpoint` with the changes of `adapter`, and notes for the manifest. Reads no tensor.

    A head that is tied to the token embeddings in the base model is its own from here on where the adapter changes one
    of the two: that is how the adapter was trained.

    Raises:
      CheckpointError: the adapter was made for a model of another shape.
    """
    updates = {canonical_name(name): update for name, update in adapter.updates.items()}
    replacements = {canonical_name(name): entry for name, entry in adapter.replacements.items()}
    entries, facts, notes = dict(checkpoint.entries), checkpoint.facts, []
    touched = ({*updates, *replacements}) & {EMBEDDING, HEAD}
    if facts.decoder.tied_embeddings and touched:
        entries[HEAD] = entries[EMBEDDING]
        facts = dataclasses.replace(facts, decoder=dataclasses.replace(facts.decoder, tied_embeddings=False))
        notes.append(f"the head is no longer tied to the embeddings: the adapter changes {_names(sorted(touched))}")
    _check(entries, updates, replacements)
    entries.update(replacements)
    if adapter.base and not _same_model(adapter.base, checkpoint):
        notes.append(f"the adapter was trained on `{adapter.base}`; the base given is `{_own_name(checkpoint)}`")
    merged = dataclasses.replace(checkpoint, facts=facts, entries=entries, updates=updates, adapter=adapter)
    return merged, notes


def _check(
    entries: Mapping[str, TensorEntry], updates: Mapping[str, LowRank], replacements: Mapping[str, TensorEntry]
) -> None:
    unknown = sorted(({*updates, *replacements}) - set(entries))
    if unknown:
        raise CheckpointError(
            f"The adapter changes {len(unknown)} tensors that this checkpoint does not have: {_names(unknown[:5])}",
            hint="Give the checkpoint that the adapter was trained on",
        )
    for name, update in updates.items():
        shape = entries[name].shape
        left, right = update.left.shape, update.right.shape
        rows, columns = (left[1], right[0]) if update.transposed else (left[0], right[1:])
        expected = (shape[0], shape[1]) if update.transposed else (shape[0], shape[1:])
        if (rows, columns) != expected:
            raise _other_base(f"`{update.left.name}` {list(left)} and `{update.right.name}` {list(right)}", name, shape)
        if update.magnitude and update.magnitude.count != shape[0]:
            raise _other_base(f"`{update.magnitude.name}` {list(update.magnitude.shape)}", name, shape)
    for name, entry in replacements.items():
        if entry.shape != entries[name].shape:
            raise _other_base(f"`{entry.name}` {list(entry.shape)}", name, entries[name].shape)


def _other_base(what: str, name: str, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"The adapter's {what} do not fit `{name}` {list(shape)} of the checkpoint",
        hint="Give the checkpoint that the adapter was trained on",
    )


def _own_name(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.resolve().name


def _same_model(base: str, checkpoint: Checkpoint) -> bool:
    """Whether two names may mean one model: folders are renamed and names abbreviated, so only their words count."""
    folder = checkpoint.folder.resolve()
    in_cache = folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else ""
    known = (folder.name, in_cache, str(checkpoint.config.get("_name_or_path", "")))
    return any(_words(base) == _words(name) for name in known)


def _words(name: str) -> str:
    """The last part of a path without what hubs change in names: `Qwen2___5-VL` is `Qwen2.5-VL`."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
