"""Log lines: how they look, that they are quiet, and that the host's logging stays its own."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from kvoffload.observe.logs import configure, get_logger


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("kvoffload")
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_a_line_is_the_event_and_key_value(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("kvoffload.l1").warning("slots ran out", job=7, node="n-1", name="two words", why=None, share=0.5, ok=True, empty="")
    (record,) = caplog.records
    assert record.getMessage() == "slots ran out job=7 node=n-1 name='two words' why=None share=0.5 ok=True empty=''"
    assert (record.name, record.levelname) == ("kvoffload.l1", "WARNING")


def test_bound_values_come_first_and_binding_makes_a_new_logger(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("x")
    log.bind(rank=1).error("lost", job=2)
    log.error("lost")
    assert [record.getMessage() for record in caplog.records] == ["lost rank=1 job=2", "lost"]
    assert {record.name for record in caplog.records} == {"kvoffload.x"}


def test_percent_signs_and_quotes_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    get_logger().error("100 % of %s", what='a="b"', line="a\nb")
    assert caplog.records[0].getMessage() == "100 % of %s what='a=\"b\"' line='a\\nb'"


def test_a_traceback_is_left_to_the_handlers(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("spoilt")
    except ValueError as error:
        get_logger().exception("copy failed", error=error)
    (record,) = caplog.records
    assert record.getMessage() == "copy failed error=ValueError('spoilt')"
    assert record.exc_info is not None
    assert "Traceback" in caplog.text


def test_quiet_until_configured(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger()
    log.info("unseen")
    configure("info")
    log.info("seen")
    log.debug("unseen")
    configure("error")
    log.warning("unseen")
    assert [record.getMessage() for record in caplog.records] == ["seen"]


def test_what_the_host_set_by_the_stdlibs_means_holds(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("kvoffload").setLevel(logging.DEBUG)
    get_logger().debug("seen")
    assert len(caplog.records) == 1


def test_the_hosts_structlog_is_neither_used_nor_changed(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("the host's processor was called")

    before = structlog.get_config()
    structlog.configure(processors=[refuse], wrapper_class=structlog.BoundLogger)
    try:
        theirs = structlog.get_config()
        log = get_logger("y")
        log.warning("ours", a=1)
        log.bind(b=2).warning("ours")
        assert structlog.get_config() == theirs
    finally:
        structlog.configure(**before)
    assert [record.getMessage() for record in caplog.records] == ["ours a=1", "ours b=2"]


def test_configuring_twice_adds_one_handler_and_none_to_the_root() -> None:
    root = list(logging.getLogger().handlers)
    configure("info")
    configure("debug")
    assert len(logging.getLogger("kvoffload").handlers) == 1
    assert logging.getLogger().handlers == root


def run(program: str) -> str:
    prelude = f"import sys; sys.path[:] = {sys.path!r}\nimport logging\nfrom kvoffload.observe.logs import configure, get_logger\n"
    return subprocess.run([sys.executable, "-c", prelude + program], capture_output=True, check=True, text=True).stderr


def test_without_handlers_lines_go_to_stderr_from_the_configured_level_on() -> None:
    (line,) = run("configure('info'); get_logger('l1').info('grown', slots=3); get_logger().debug('unseen')").splitlines()
    assert line.startswith("INFO ")
    assert line.endswith("[kvoffload.l1] grown slots=3")


def test_a_host_with_handlers_gets_each_line_once() -> None:
    lines = run("configure('info'); logging.basicConfig(format='host: %(message)s'); get_logger().info('grown', slots=3)").splitlines()
    assert lines == ["host: grown slots=3"]
