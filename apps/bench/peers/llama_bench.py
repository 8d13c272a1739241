"""Another runtime beside ours: llama.cpp's own `llama-bench` on a GGUF file, one process for each measurement.

A script of its own. Answers requests as `apps.bench.model_worker` does; `llama_gguf.py` writes the file. Slow:
the cache is filled again for every request.

    python llama_bench.py path/to/llama-bench model.gguf --threads 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys


def measure(program: str, model: str, threads: int, tokens: int, depth: int) -> float:
    """Milliseconds of `tokens` new tokens behind `depth` cached ones."""
    kind = ["-p", str(tokens), "-n", "0"] if tokens > 1 else ["-p", "0", "-n", "1"]
    command = [program, "-m", model, "-t", str(threads), *kind, "-d", str(depth), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ns"]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps({"ready": "llama.cpp"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": measure(args.program, args.model, args.threads, **json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
