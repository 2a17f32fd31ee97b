"""The harness's own tests use it as others do."""

from tests.infinistore.fixtures import *  # noqa: F403
