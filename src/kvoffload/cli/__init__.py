"""The command ``kvoffload``: demo, bench, config, version. Also ``python -m kvoffload.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import kvoffload

__all__ = ["main"]

BENCHES = ("copy", "index", "keys", "hooks", "ttft", "engine", "saves")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. 0: done, 1: it did not succeed, 2: it was called wrongly, 130: interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    # Imported here: `kvoffload version` should not wait for numba.
    match options.command:
        case "demo":
            from kvoffload.cli.demo import run_demo

            l1_bytes = int(options.l1_mb * (1 << 20))
            return run_demo(l1_bytes=l1_bytes, multiprocessing=options.multiprocessing, verbose=options.verbose)
        case "bench":
            from kvoffload.cli.bench import run_benches, runners

            names = BENCHES if options.figure == "all" else (options.figure,)
            return run_benches(runners(names), quick=options.quick, as_json=options.json, strict=options.strict)
        case "config":
            from kvoffload.cli.settings import print_settings

            return print_settings(markdown=options.markdown)
        case _:
            print(f"kvoffload {kvoffload.__version__}")
            return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvoffload", description="vLLM's KV cache, kept in host memory and brought back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="see prompts come back from host memory, with real vLLM on this CPU")
    demo.add_argument("--l1-mb", type=_positive, default=128.0, metavar="MIB", help="host memory for blocks; try 64 (default: 128)")
    demo.add_argument("--multiprocessing", action="store_true", help="vLLM's default: several processes; shows no L1 counters")
    demo.add_argument("--verbose", action="store_true", help="show vLLM's own log")

    bench = commands.add_parser("bench", help="measure what kvoffload promises")
    bench.add_argument("figure", choices=(*BENCHES, "all"), help="what to measure; hooks, ttft, engine and saves run real vLLM")
    bench.add_argument("--json", action="store_true", help="one JSON object per figure and line")
    bench.add_argument("--quick", action="store_true", help="seconds instead of minutes: to see that it runs, not for figures")
    bench.add_argument("--strict", action="store_true", help="exit with 1 when a figure falls short")

    config = commands.add_parser("config", help="list every setting")
    config.add_argument("--markdown", action="store_true", help="as the table in the README")

    commands.add_parser("version", help="print the version")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value
