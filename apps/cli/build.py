"""`streamo-edge build`: TensorRT engines of a bundle for this device, kept beside the bundle.

Owns the options and what is said. Without this command the first `run --backend tensorrt` does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli import console
from apps.cli.parsing import number

if TYPE_CHECKING:
    from edge.engines.store import EngineStore, StoredEngine

MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote")
    add("--engines", metavar="DIR", help="where engines are kept; default BUNDLE.engines beside the bundle")
    add(
        "--workspace-mib",
        type=number(int, at_least=16, at_most=1 << 20, unit="MiB"),
        default=512,
        metavar="N",
        help="GPU memory for intermediate results; default 512",
    )
    add(
        "--optimization-level",
        type=number(int, at_least=0, at_most=5),
        default=3,
        metavar="N",
        help="0 to 5: how long TensorRT looks for faster kernels; default 3",
    )
    add("--force", action="store_true", help="build even if the engines fit")
    add("--ignore-memory", action="store_true", help="build even if it seems that memory is too small")
    add("--json", action="store_true", help="end with the engines' facts as one JSON document")


def run(args: argparse.Namespace) -> int:
    from edge import open_bundle
    from edge.engines.builder import BuildOptions
    from edge.engines.here import open_store
    from edge.engines.store import COMPONENTS, Listener

    bundle = open_bundle(args.bundle)
    options = BuildOptions(args.workspace_mib * MIB, args.optimization_level)
    folder = Path(args.engines) if args.engines else None
    gpu, store = open_store(bundle, folder=folder, options=options, ignore_memory=args.ignore_memory)
    with gpu, console.progress() as progress:
        listener = Listener(console.say, progress)
        stored = [store.ensure(component, listener, force=args.force, whole=True) for component in COMPONENTS]
    document = describe(store, stored)
    _print(document, console.report_stream(args.json))
    if args.json:
        console.print_json(document)
    return 0


def describe(store: EngineStore, stored: list[StoredEngine]) -> dict[str, Any]:
    """What there is now, as JSON values."""
    return {
        "bundle": str(store.bundle.path),
        "device": store.device.name,
        "sm": store.device.sm,
        "tensorrt": store.toolkit.text,
        "plugin": {"path": str(store.plugin.path), "sha256": store.plugin.sha256},
        "engines": [
            {
                "component": engine.component,
                "path": str(engine.path),
                "bytes": engine.bytes,
                "found": engine.found,
                "reason": engine.reason,
                "seconds": round(engine.seconds, 3),
                "profiles": {p.name: p.sizes for p in store.profiles(engine.component)},
            }
            for engine in stored
        ],
    }


def _print(document: dict[str, Any], file: Any = sys.stdout) -> None:
    rows = [
        (
            engine["component"],
            "found" if engine["found"] else f"built in {engine['seconds']:.0f} s",
            console.bytes_text(engine["bytes"]),
            engine["path"],
        )
        for engine in document["engines"]
    ]
    title = f"TensorRT {document['tensorrt']} engines for {document['device']} (SM {document['sm']})"
    console.table(title, ("component", "", "size", "file"), rows, file)
