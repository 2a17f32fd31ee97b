"""``kvoffload doctor``: what kvoffload meets on this machine, and, with ``--gpu``, whether copies between its GPU and memory are right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import util
from typing import TYPE_CHECKING

from kvoffload.config import Config
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.doctor import host, packages
from kvoffload.doctor.report import Finding, Section, State, all_passed, block_of, line_of, summary_of
from kvoffload.doctor.settings import settings
from kvoffload.errors import ConfigError, CopyError, UnsupportedError

if TYPE_CHECKING:
    from kvoffload.cuda.driver import Driver
    from kvoffload.doctor.gpu import Scale
    from kvoffload.doctor.gpu_proof import WrapEngine


def run_doctor(*, gpu: bool, device: int = 0, scale: Scale | None = None, wrap: WrapEngine | None = None) -> int:
    """0: what was tried is there and right. 1: it is not, or there is no GPU to try. ``scale`` and ``wrap`` as of `check_gpu`."""
    about = [packages.versions(), settings(), host.machine()]
    passed = all_passed([finding for section in about for finding in section.findings])
    if not gpu:
        _print_block([*about, host.engine()])
        return 0 if passed else 1
    driver = open_gpu(device, "doctor --gpu")
    if driver is None:
        return 1
    try:
        return _test(driver, about, passed, scale, wrap)
    finally:
        with suppress(CopyError):
            driver.close()


def open_gpu(device: int, what: str) -> Driver | None:
    """The GPU, or None, when stderr has been told in one line why there is none and what to do."""
    from kvoffload.cuda.driver import Driver

    try:
        return Driver.open(device)
    except (UnsupportedError, RuntimeError) as error:
        advice = ""
        if util.find_spec("cuda") is not None:
            advice = "; it takes NVIDIA's driver and a GPU that `nvidia-smi` lists; a container is started with --gpus all"
        print(f"kvoffload {what}: no GPU to test: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return None


def copy_settings() -> GpuCopySettings:
    """Section ``gpu`` of the settings as this environment gives them; the defaults, where they are wrong."""
    from kvoffload.runtime.rank import copy_settings as as_engine_takes_it

    try:
        return as_engine_takes_it(Config.load().gpu)
    except ConfigError:
        return GpuCopySettings()


def _test(driver: Driver, about: list[Section], passed: bool, scale: Scale | None, wrap: WrapEngine | None) -> int:
    from kvoffload.doctor.gpu import check_gpu
    from kvoffload.doctor.gpu_facts import device_facts, is_stand_in, link_fact
    from kvoffload.doctor.gpu_proof import TROUBLE

    facts: list[Finding] = []
    try:
        facts += device_facts(driver)
    except TROUBLE as error:
        facts.append(Finding("facts", str(error), State.FAILED))
    _show("GPU", facts)
    print("\nchecks", flush=True)
    checks: list[Finding] = []
    keep: Callable[[Finding], None] = checks.append
    for finding in check_gpu(driver, copy_settings(), scale, *([wrap] if wrap is not None else [])):
        keep(finding)
        print(f"  {line_of(finding)}", flush=True)
    facts.append(link_fact(driver))
    findings = [*facts, *checks]
    passed = passed and all_passed(findings)
    summary = summary_of(findings)
    where = " of a stand-in for the driver, NOT of a GPU" if is_stand_in() else ""
    print(f"\n  {summary}{where}\n\nPlease paste this into your report; it holds no secrets, but do look at it:\n")
    verdict = Section("result", (Finding(f"doctor --gpu{where}", summary),))
    _print_block([verdict, Section("GPU", tuple(facts)), Section("checks", tuple(checks)), *about])
    return 0 if passed else 1


def _show(title: str, findings: list[Finding]) -> None:
    print(title)
    for finding in findings:
        print(f"  {line_of(finding)}")


def _print_block(sections: list[Section]) -> None:
    print("\n".join(block_of(sections)), flush=True)
