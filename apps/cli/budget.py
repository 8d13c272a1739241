"""What a stream will hold in memory, told before it starts and refused where the machine has less.

Owns the comparison with the memory that is free, and its words. Allocates nothing; `edge.capacity` knows the sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apps.cli.console import bytes_text
from edge.errors import MemoryBudgetError
from edge.memory import available_bytes

if TYPE_CHECKING:
    from edge.bundle import Bundle


def check_budget(bundle: Bundle, window_turns: int | None, max_reply_tokens: int | None = None) -> str:
    """One line for people: what the window costs.

    Raises:
      MemoryBudgetError: more than is free; names both, and the largest window that fits.
    """
    from edge.capacity import plan_for_bundle

    plan = plan_for_bundle(bundle, window_turns, max_reply_tokens)
    weights_bytes = bundle.manifest.vision.weights_bytes + bundle.manifest.decoder.weights_bytes
    needed, free = plan.total_bytes + weights_bytes, available_bytes()
    if free is not None and needed > free:
        fixed_bytes = plan_for_bundle(bundle, 0, max_reply_tokens).total_bytes
        turn_bytes = (plan.total_bytes - fixed_bytes) // plan.window_turns
        fits = max(0, (free - weights_bytes - fixed_bytes) // turn_bytes)
        raise MemoryBudgetError(
            f"A window of {plan.window_turns} turns needs {bytes_text(needed)}: {bytes_text(turn_bytes)} a turn and "
            f"{bytes_text(weights_bytes + fixed_bytes)} for weights, questions and replies; {bytes_text(free)} is free",
            hint=f"Use `--window {fits}` or less"
            if fits
            else "Use a smaller `--max-reply-tokens`, or a bundle with smaller weights",
        )
    return f"window {plan.window_turns} turns, KV cache {bytes_text(plan.kv_bytes)}"
