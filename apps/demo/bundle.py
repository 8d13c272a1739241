"""The shipped checkpoint as a bundle, exported once and kept in the user's cache.

Owns the place in the cache. The export is the ordinary one; its parity is checked against PyTorch figures that were
recorded with the checkpoint, so that neither torch nor transformers is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from apps.demo import CHECKPOINT
from edge.bundle import open_bundle
from edge.errors import BundleError
from edge.user_cache import user_cache_folder

RECORDED_REFERENCE = Path(__file__).parent / "reference.npz"
FIRST_START_TURNS = 12
"""Held-out turns that the bundle is judged by: few, since somebody is waiting for the demonstration."""


def demo_bundle(
    progress: Callable[[str, int, int], None] | None = None, *, weights: str = "fp32", kv: str | None = None
) -> Path:
    """Folder of the demonstration's bundle; exports it if this version has not done so yet.

    Args:
      weights, kv: see `export.api.export_checkpoint`.

    Raises:
      ParityError: the export on this machine does not compute what PyTorch computed.
      OutputError: neither the cache nor the temporary folder can be written.
    """
    from apps.demo.clips import JUDGED, demo_clips, judged_clips
    from export.api import export_checkpoint

    folder = user_cache_folder() / f"demo-{_fingerprint()}-{weights}{f'-kv-{kv}' if kv else ''}"
    try:
        open_bundle(folder)
    except BundleError:
        export_checkpoint(
            CHECKPOINT,
            folder,
            weights=weights,
            kv=kv,
            clips=demo_clips() if weights == "int4" else judged_clips(JUDGED[:1], FIRST_START_TURNS),
            progress=progress,
            overwrite=True,
            reference=RECORDED_REFERENCE,
        )
    return folder


def _fingerprint() -> str:
    """What the bundle depends on: the checkpoint's files, and the code that makes a bundle."""
    from export.fingerprint import code_fingerprint

    digest = hashlib.sha256(code_fingerprint().encode())
    for path in sorted(CHECKPOINT.iterdir()):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
