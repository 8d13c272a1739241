"""The demonstration: a small procedural video world, its labels, and a small model trained on them."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The model's folder, as shipped."""
