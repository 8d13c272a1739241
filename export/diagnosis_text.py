"""A failed gate's diagnosis as sentences, for an error's message and for `inspect`. Imports nothing that is heavy."""

from __future__ import annotations

from typing import Any


def diagnosis_text(diagnosis: dict[str, Any]) -> str:
    """The worst layers, and what would pass."""
    layers = ", ".join(f"{layer} ({error:.2g})" for layer, error in diagnosis["worst_layers"])
    text = f"Layers that lose most (error of what they add): {layers}. "
    if diagnosis["weights_alone_pass"]:
        return text + "The rounding of the weights alone would pass: it is the KV cache's or the activations'"
    cheapest = diagnosis["cheapest"]
    if cheapest is None:
        return text + "No precision that was tried would pass"
    places = ", ".join(map(str, cheapest["layers"]))
    size = f"{cheapest['more_bytes'] / 1e6:.3g} MB"
    return text + f"The cheapest that would pass: {cheapest['weights']} in the layers {places}, {size} more"
