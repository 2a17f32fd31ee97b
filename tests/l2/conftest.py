"""What several tests of the second tier need: the real InfiniStore server."""

from tests.infinistore.fixtures import *  # noqa: F403
