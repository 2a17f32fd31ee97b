"""The command ``kvoffload``: demo, bench, doctor, l2, members, config, version. Also ``python -m kvoffload.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import kvoffload

__all__ = ["main"]

BENCHES = ("copy", "index", "keys", "hooks", "ttft", "engine", "saves", "l2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. 0: done, 1: it did not succeed, 2: it was called wrongly, 130: interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "bench" and options.gpu and options.figure != "copy":
        parser.error("--gpu goes with `bench copy` alone")
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
            nodes = [node for node in options.infinistore.split(",") if node]
            return run_demo(l1_bytes=l1_bytes, multiprocessing=options.multiprocessing, verbose=options.verbose, infinistore=nodes)
        case "bench":
            if options.gpu:
                from kvoffload.cli.bench_gpu import run_gpu_bench

                return run_gpu_bench(options.device, quick=options.quick, as_json=options.json, strict=options.strict)
            from kvoffload.cli.bench import run_benches, runners

            names = BENCHES if options.figure == "all" else (options.figure,)
            server = (options.infinistore, options.native_client)
            return run_benches(runners(names, *server), quick=options.quick, as_json=options.json, strict=options.strict)
        case "doctor":
            from kvoffload.cli.doctor import run_doctor

            return run_doctor(gpu=options.gpu, device=options.device)
        case "l2":
            from kvoffload.cli.l2 import run_l2

            return run_l2(options.what, backend=options.backend, nodes=options.node, manage_port=options.manage_port, yes=options.yes)
        case "members":
            from kvoffload.cli.members import run_members

            return run_members(options)
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
    demo.add_argument("--infinistore", default="", metavar="HOST:PORT,...", help="nodes for the second engine's part; default: a Valkey")
    demo.add_argument("--verbose", action="store_true", help="show vLLM's own log")

    bench = commands.add_parser("bench", help="measure what kvoffload promises")
    bench.add_argument("figure", choices=(*BENCHES, "all"), help="what to measure; hooks, ttft, engine, saves and l2 run real vLLM")
    bench.add_argument("--json", action="store_true", help="one JSON object per figure and line")
    bench.add_argument("--quick", action="store_true", help="seconds instead of minutes: to see that it runs, not for figures")
    bench.add_argument("--strict", action="store_true", help="exit with 1 when a figure falls short or is not measured")
    bench.add_argument("--infinistore", metavar="HOST:PORT", help="for l2: a server that nobody needs; values of 4 MiB may freeze it")
    bench.add_argument("--native-client", metavar="COMMAND", help="for l2: a Python that has infinistore's client (default: this one)")

    bench.add_argument("--gpu", action="store_true", help="for copy: between a GPU and host memory, and where the kernel beats DMA")
    bench.add_argument("--device", type=int, default=0, metavar="N", help="for --gpu: which GPU that CUDA sees (default: 0)")

    doctor = commands.add_parser("doctor", help="what kvoffload meets on this machine, to be pasted into a bug report")
    doctor.add_argument("--gpu", action="store_true", help="prove copies between a GPU and host memory; 1 unless all of it is right")
    doctor.add_argument("--device", type=int, default=0, metavar="N", help="which GPU that CUDA sees (default: 0)")

    l2 = commands.add_parser("l2", help="reach the nodes of the second tier, try them, empty them")
    l2.add_argument("what", choices=("ping", "check", "purge"), help="check writes, reads back and verifies blocks that nobody asks for")
    l2.add_argument("--node", action="append", default=[], metavar="NODE", help="host:port or redis://...; default: what the settings name")
    l2.add_argument("--backend", choices=("infinistore", "redis"), help="default: as set, or by what --node looks like")
    l2.add_argument("--manage-port", type=int, default=18080, metavar="PORT", help="InfiniStore's HTTP port, to purge (default: 18080)")
    l2.add_argument("--yes", action="store_true", help="purge really: an InfiniStore node loses others' values too")

    members = commands.add_parser("members", help="the table of nodes that engines share: look at it, write it")
    actions = members.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the nodes, their shares, and what is wrong with the table")
    setting = actions.add_parser("set", help="write a table of these nodes, and of no others")
    for action in (listing, setting):
        action.add_argument("--url", help="redis:// URL of the table's Redis; better in KVOFFLOAD_L2_MEMBERSHIP_URL if it has a password")
        action.add_argument("--key", help="the table's Redis key (default: KVOFFLOAD_L2_MEMBERSHIP_KEY, or kvcache_nodes)")
    setting.add_argument("nodes", nargs="+", metavar="NAME=HOST:PORT", help="such as kv-0=10.0.0.11:12345 or kv-1=[fd00::2]:12345")
    setting.add_argument("--dry-run", action="store_true", help="show what would be written, and leave the table as it is")

    config = commands.add_parser("config", help="list every setting")
    config.add_argument("--markdown", action="store_true", help="as the table in the README")

    commands.add_parser("version", help="print the version")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value
