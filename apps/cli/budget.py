"""What a stream will hold in memory, told before it starts and refused where the machine has less.

Owns the words. Allocates nothing; `edge.capacity` knows the sizes and what fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apps.cli.console import bytes_text

if TYPE_CHECKING:
    from edge.bundle import Bundle
    from edge.capacity import CachePlan


def plan_here(
    bundle: Bundle,
    *,
    window_turns: int | None = None,
    max_reply_tokens: int | None = None,
    policy: str | None = None,
    backend: str = "cpu",
) -> tuple[CachePlan, str]:
    """The plan of a run on this machine, and the policy that it would use; None takes the defaults.

    Raises:
      UsageError: the policy is impossible here.
    """
    from edge.backends import evicts_in_place
    from edge.capacity import plan_for_bundle
    from edge.policy import chosen_policy

    in_place = evicts_in_place(backend, bundle)
    chosen = chosen_policy(policy, evicts_in_place=in_place)
    plan = plan_for_bundle(bundle, window_turns, max_reply_tokens, policy=chosen, evicts_in_place=in_place)
    return plan, chosen


def check_budget(
    bundle: Bundle,
    *,
    window_turns: int | None = None,
    max_reply_tokens: int | None = None,
    policy: str | None = None,
    backend: str = "cpu",
    fps: float = 1.0,
) -> str:
    """One line for people: what the window holds and costs.

    Raises:
      MemoryBudgetError: more than is free; names both, and the largest window that fits.
      UsageError: as `plan_here`.
    """
    from edge.backends import free_bytes
    from edge.capacity import check_fits

    plan, chosen = plan_here(
        bundle, window_turns=window_turns, max_reply_tokens=max_reply_tokens, policy=policy, backend=backend
    )
    manifest = bundle.manifest
    weights_bytes = manifest.vision.weights_bytes + manifest.decoder.weights_bytes
    check_fits(plan, weights_bytes, free_bytes=free_bytes(backend))
    frames = plan.total_bytes - plan.kv_bytes
    seconds = f"{plan.window_s / fps:g} s"
    kept = f", kept frames {bytes_text(frames)}" if frames else ""
    return (
        f"window {plan.window_turns} turns = {seconds}, at most {plan.turn_tokens} tokens a silent turn; "
        f"KV cache {bytes_text(plan.kv_bytes)}{kept}; policy {chosen}"
    )
