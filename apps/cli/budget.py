"""What a stream will hold in memory, told before it starts and refused where the machine has less.

Owns the estimate and its comparison with the memory that is free. Allocates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apps.cli.console import bytes_text
from edge.errors import MemoryBudgetError
from edge.memory import available_bytes

if TYPE_CHECKING:
    from edge.bundle import Bundle


def check_budget(bundle: Bundle, window_turns: int | None) -> str:
    """One line for people: what the window costs.

    Raises:
      MemoryBudgetError: more than is free; names both, and the largest window that fits.
    """
    from apps.cli.inspect import turn_tokens

    manifest = bundle.manifest
    window_turns = manifest.stream.window_turns if window_turns is None else window_turns
    tokens = turn_tokens(bundle)
    frame_bytes = manifest.max_visual_tokens * manifest.decoder_facts.hidden_size * 4
    turn_bytes = tokens["largest_turn"] * manifest.kv_bytes_per_token + frame_bytes
    weights_bytes = manifest.vision.weights_bytes + manifest.decoder.weights_bytes
    needed, free = window_turns * turn_bytes + weights_bytes, available_bytes()
    if free is not None and needed > free:
        fits = max(0, (free - weights_bytes) // turn_bytes)
        raise MemoryBudgetError(
            f"A window of {window_turns} turns needs {bytes_text(needed)}: {bytes_text(turn_bytes)} a turn and "
            f"{bytes_text(weights_bytes)} of weights; {bytes_text(free)} is free",
            hint=f"Use `--window {fits}` or less" if fits else "Use a bundle with smaller weights",
        )
    kv_bytes = window_turns * tokens["largest_turn"] * manifest.kv_bytes_per_token
    return f"window {window_turns} turns, KV cache {bytes_text(kv_bytes)}"
