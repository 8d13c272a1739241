"""Which bundle has passed its first run on which backend, device and versions: small files in the user's cache.

Owns the place and the key. A cache that cannot be read or written only means that a check is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.contract import Manifest, checksum_of
from edge.user_cache import user_cache_folder

_FOLDER = "passed"


@dataclass(frozen=True)
class CheckKey:
    """What a check's outcome depends on, and the file that remembers it."""

    path: Path
    facts: dict[str, str]


def key_of(manifest: Manifest, identity: Mapping[str, str]) -> CheckKey:
    """The key of one bundle where `identity` says: a backend with the versions of everything under it."""
    facts = {"bundle": checksum_of(dataclasses.asdict(manifest)), **identity}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return CheckKey(user_cache_folder() / _FOLDER / f"{digest[:32]}.json", facts)


def has_passed(key: CheckKey) -> bool:
    """Whether the same check has passed before."""
    try:
        document = json.loads(key.path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("facts") == key.facts


def remember(key: CheckKey, figures: Mapping[str, float]) -> None:
    """Take note that a check has passed; two processes may do so at once."""
    content = json.dumps({"facts": key.facts, "figures": dict(figures)}, indent=2) + "\n"
    with contextlib.suppress(OSError):
        key.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=key.path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(name, key.path)
