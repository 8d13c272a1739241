"""The `streamo-edge` command: which file handles which subcommand, and what happens when something fails.

Owns the exit codes' last step: every error becomes `error:` and `hint:` on stderr here, and nowhere else.
Only the chosen subcommand's file is imported, and each imports what is heavy when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from apps.cli.console import say, show_error
from apps.cli.exits import BROKEN_PIPE, INTERRUPTED
from apps.cli.parsing import Parser, closest
from apps.cli.stdout import watched_stdout
from edge.errors import EdgeError, MemoryBudgetError, UsageError

COMMANDS = {
    "demo": ("apps.cli.demo", "watch a trained model follow a live synthetic stream; needs nothing"),
    "export": ("apps.cli.export", "turn a checkpoint folder into a bundle"),
    "inspect": ("apps.cli.inspect", "what a bundle is, what it will cost, and how exact it is"),
    "build": ("apps.cli.build", "build a bundle's TensorRT engines for this device, and keep them beside it"),
    "build-plugin": ("apps.cli.build_plugin", "compile the TensorRT plugin against this device's headers"),
    "run": ("apps.cli.run", "let a bundle watch a video, a folder of pictures or a camera"),
    "eval": ("apps.cli.evaluate", "measure a bundle's answers on streams with known answers"),
    "doctor": ("apps.cli.doctor", "what this machine has, and what each backend lacks"),
    "bench": ("apps.cli.bench", "measure what a turn costs on this machine"),
}

MEMORY_HINT = "End other programs, or give a stream a smaller `--window`"
EXIT_CODES = """\
exit codes: 0 ok, 1 runtime error, 2 usage, 3 bundle or checkpoint incompatible, 4 source unavailable,
5 out of memory, 70 device unusable (restart), 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    code = 0
    failure: BaseException | None = None
    with watched_stdout() as stdout:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as request:  # argparse after --help and --version
            code = request.code if isinstance(request.code, int) else 0
        except BaseException as error:  # noqa: BLE001  the one boundary: no traceback may reach a user
            failure = error
        problem = stdout.finish() if stdout is not None else None  # before anything is said on stderr
    if problem is not None and (isinstance(failure, OSError) or (failure is None and code == 0)):
        failure = problem
    return code if failure is None else _exit_code_of(failure)


def _exit_code_of(failure: BaseException) -> int:
    """Tell people what went wrong, where that is news to them."""
    if isinstance(failure, EdgeError):
        show_error(failure.message, failure.hint)
        return failure.exit_code
    if isinstance(failure, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(failure, BrokenPipeError):  # the reader has seen enough
        return BROKEN_PIPE
    if isinstance(failure, MemoryError):
        show_error(f"Out of memory: {failure or 'no more can be allocated'}", MEMORY_HINT)
        return MemoryBudgetError.exit_code
    path = _log_traceback(failure)
    show_error(f"internal: {type(failure).__name__}: {failure}", f"Please report this, with the log: {path}")
    return 1


def _run(arguments: list[str]) -> int:
    place = next((index for index, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    _top_level_parser().parse_args(arguments[:place])
    if place == len(arguments):
        _top_level_parser().print_help(sys.stderr)
        return UsageError.exit_code
    name = arguments[place]
    if name not in COMMANDS:
        meant = closest(name, COMMANDS)
        raise UsageError(
            f"There is no command `{name}`; commands are {', '.join(COMMANDS)}",
            hint=f"Did you mean `streamo-edge {meant}`?" if meant else "See `streamo-edge --help`",
        )
    module, summary = COMMANDS[name]
    command = importlib.import_module(module)
    parser = Parser(prog=f"streamo-edge {name}", description=f"{summary[:1].upper()}{summary[1:]}.")
    command.configure(parser)
    return command.run(parser.parse_args(arguments[place + 1 :]))


def _top_level_parser() -> Parser:
    commands = "\n".join(f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="streamo-edge",
        usage="streamo-edge COMMAND ...",
        description="Streaming video language models on the device: they watch, and speak when something happens.",
        epilog=f"commands:\n{commands}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamo-edge {_version()}")
    return parser


def _version() -> str:
    from edge import __version__

    return __version__


def _log_traceback(failure: BaseException) -> str:
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="streamo-edge-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(type(failure), failure, failure.__traceback__, file=file)
            return file.name
    except OSError as error:
        say(f"The log could not be written: {error}")
        return "not written"


if __name__ == "__main__":
    sys.exit(main())
