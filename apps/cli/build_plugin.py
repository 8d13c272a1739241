"""`streamo-edge build-plugin`: compiles the TensorRT plugin against the headers that are on this device.

Owns the options and what is said. Everything it needs is found or named before the compiler starts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apps.cli import console


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tensorrt", metavar="DIR", help="folder with TensorRT's headers, or the one above its `include`")
    add("--cuda", metavar="DIR", help="the same for CUDA; default /usr/local/cuda")
    add("--output", metavar="FILE", help="where to; default the user's cache folder, where it is looked for")
    add("--dry-run", action="store_true", help="only look for what is needed, and print the compiler's command")
    add("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    import shlex

    from edge.engines.plugin import built_path
    from edge.engines.plugin_build import build_plugin, plan_build

    plan = plan_build(args.tensorrt, args.cuda)
    output = Path(args.output) if args.output else built_path(plan.version)
    command = plan.command(output)
    console.say(f"TensorRT {plan.version} headers in {plan.tensorrt}, CUDA headers in {plan.cuda}")
    if not args.dry_run:
        build_plugin(plan, output)
    file = console.report_stream(args.json)
    print(shlex.join(command) if args.dry_run else output, file=file, flush=True)
    if args.json:
        built = not args.dry_run
        console.print_json({"tensorrt": plan.version, "command": command, "path": str(output), "built": built})
    return 0
