"""The demonstration: a small procedural video world, its labels, and a small model trained on them."""
