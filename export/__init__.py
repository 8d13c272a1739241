"""Checkpoint to bundle: opens a Hugging Face folder, builds ONNX graphs from it and proves them against PyTorch."""
