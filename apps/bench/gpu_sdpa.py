"""PyTorch's attention of the same shape over a float16 cache, in whatever form and with whatever library is fastest.

Owns the forms. PyTorch is not needed: without it, or where it sees no GPU, there is nothing to compare with.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

from apps.bench.kernel_cases import AttentionCase

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")

Attend = Callable[[Any, Any, Any], Any]  # queries (B, Hq, T, D), keys and values (B, Hkv, rows, D)


def fastest_sdpa(case: AttentionCase, batch: int, copies: int, repeats: int) -> tuple[float, str] | None:
    """Microseconds for one stream's call, and which form it was; None where PyTorch sees no GPU.

    Args:
      batch: streams that are given to one call of PyTorch. copies: caches that are gone through in a round.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    found = _times(torch, case, batch, max(1, copies // batch), repeats)
    torch.cuda.empty_cache()
    best = min(found, key=lambda name: found[name], default=None)
    return None if best is None else (found[best], best)


def _times(torch: Any, case: AttentionCase, batch: int, rounds: int, repeats: int) -> dict[str, float]:
    """Microseconds for one stream's call by form, over `rounds` different caches."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    queries = torch.randn(batch, case.query_heads, case.new_tokens, case.head_dim, **half)
    size = (2, batch, case.kv_heads, case.depth + case.new_tokens, case.head_dim)
    caches = [torch.randn(size, **half) for _ in range(rounds)]
    found: dict[str, float] = {}
    for backend in BACKENDS:
        for form, attend in forms(case).items():

            def run(attend: Attend = attend) -> None:
                for keys, values in caches:
                    attend(queries, keys, values)

            us = _time_us(torch, run, backend, repeats)
            if us is not None:
                found[f"{backend}, {form}"] = us / rounds / batch
    return found


def forms(case: AttentionCase) -> dict[str, Attend]:
    """Ways to say it to PyTorch. The heads of a group may be rows of one head, which no library has to know of; new
    tokens then see each other all, which takes the same time or a little more."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention as attend

    rows, group = case.depth + case.new_tokens, case.query_heads // case.kv_heads
    # What new tokens see: the cache, and themselves up to their place.
    mask = None if case.new_tokens == 1 else causal_lower_right(case.new_tokens, rows)

    def by_rows(queries: Any, keys: Any, values: Any) -> Any:
        shape = (len(queries), case.kv_heads, group * case.new_tokens, case.head_dim)
        return attend(queries.reshape(shape), keys, values).reshape(queries.shape)

    return {
        "heads by group": lambda q, k, v: attend(q, k, v, attn_mask=mask, enable_gqa=True),
        "groups as rows": by_rows,
    }


def _time_us(torch: Any, run: Callable[[], None], backend: str, repeats: int) -> float | None:
    """Microseconds of a round, the median; None where this library does not do it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, backend)]):
        warnings.simplefilter("ignore")
        try:
            again = _recorded(torch, run)
        except RuntimeError:
            return None
    found = []
    for _ in range(repeats + 1):
        begin.record()
        again()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found[1:])


def _recorded(torch: Any, run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a graph, as our calls are timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay  # type: ignore[no-any-return]
