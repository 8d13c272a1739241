"""A bundle's graphs, the native or the stock ones, in a process of their own, timed on request.

A process for each contestant, so that their threads and memory stay apart. Reads one JSON request a line,
`{"tokens": 144, "depth": 4096}` or `{"rows": 16, "columns": 30}`, and answers `{"ms": ...}`; the first line says
`{"ready": name}`.

    python -m apps.bench.model_worker BUNDLE --threads 2 --capacity 4240
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from apps.bench.decoder_worker import SETTLE_S, Model
from edge.bundle import Bundle, open_bundle


def opened(folder: Path, *, stock: bool) -> Bundle:
    """The bundle; `stock`: without its native graphs."""
    bundle = open_bundle(folder, verify=False)
    if not stock:
        return bundle
    vision, decoder = (replace(part, native_file="") for part in (bundle.manifest.vision, bundle.manifest.decoder))
    return replace(bundle, manifest=replace(bundle.manifest, vision=vision, decoder=decoder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=4096)
    args = parser.parse_args()
    model = Model(opened(args.bundle, stock=args.stock), "cpu", args.threads, args.capacity)
    print(json.dumps({"ready": args.bundle.name}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        time.sleep(SETTLE_S)
        (model.encode if "rows" in request else model.append)(**request)
        print(json.dumps({"ms": model.elapsed_ms}), flush=True)


if __name__ == "__main__":
    main()
