"""`streamo-edge export`: a checkpoint folder becomes a bundle, with its parity report on the screen."""

from __future__ import annotations

import argparse

from apps.cli import console
from apps.cli.bundles import KV, WEIGHTS, extra_packages
from apps.cli.inspect import print_parity


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Hugging Face folder of a Qwen2.5-VL architecture")
    parser.add_argument("-o", "--output", metavar="BUNDLE", required=True, help="folder to write")
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter (PEFT's or ms-swift's folder) to merge into CHECKPOINT"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32", help="default fp32")
    parser.add_argument("--kv", choices=KV, help="of the KV cache; default int8 with int8 or int4 weights, else fp32")
    parser.add_argument("--allow-mismatch", action="store_true", help="write the bundle even when parity fails")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE where it exists")
    parser.add_argument("--json", action="store_true", help="print the parity report as JSON")


def run(args: argparse.Namespace) -> int:
    with extra_packages("export", "Export"):
        from export.api import export_checkpoint

        with console.progress() as progress:
            manifest = export_checkpoint(
                args.checkpoint,
                args.output,
                weights=args.weights,
                kv=args.kv,
                allow_mismatch=args.allow_mismatch,
                progress=progress,
                overwrite=args.force,
                adapter=args.adapter,
            )
    file = console.report_stream(args.json)
    print_parity(manifest.parity, file)
    total_bytes = sum(facts.bytes for facts in manifest.files.values())
    kv = "/".join(sorted(set(manifest.kv_dtypes)))
    size = console.bytes_text(total_bytes)
    print(f"Wrote `{args.output}`: {size}, weights {args.weights}, KV cache {kv}", file=file, flush=True)
    if args.json:
        written = {"bundle": args.output, "weights": args.weights, "kv_dtypes": list(manifest.kv_dtypes)}
        console.print_json({**written, "bytes": total_bytes, "parity": manifest.parity})
    return 0
