"""`kvoffload bench` with a real InfiniStore server beside it: `python -m tests.bench.with_infinistore all --quick`.

Where the server cannot run this says why, and the figures that need it are not measured.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from tests.infinistore.environment import Environment, NotRun, prepare
from tests.infinistore.server import InfiniStoreServer, ServerFailed

from kvoffload.cli import main


def native_client(environment: Environment) -> str:
    """The command of a Python that has the native client, which needs libibverbs as the server does."""
    return shlex.join(["env", f"LD_PRELOAD={environment.libverbs}", str(environment.python)])


def run(arguments: Sequence[str]) -> int:
    """What `kvoffload bench` exits with. Another server may be named all the same."""
    if not {"l2", "all"} & set(arguments) or any(argument.startswith("--infinistore") for argument in arguments):
        return main(["bench", *arguments])
    try:
        environment = prepare()
        server = InfiniStoreServer(environment)
        server.start()
    except (NotRun, ServerFailed) as reason:
        sys.stderr.write(f"InfiniStore server not run: {reason}\n")
        return main(["bench", *arguments])
    try:
        return main(["bench", *arguments, "--infinistore", server.address, "--native-client", native_client(environment)])
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
