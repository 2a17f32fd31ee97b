"""`kvoffload doctor` where there is no GPU: what it tells, what it hides, and what it exits with."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

import kvoffload
from kvoffload.cli import main
from kvoffload.doctor import host, packages
from kvoffload.doctor.gpu_facts import Link, libraries, link_of
from kvoffload.doctor.report import BEGIN, END, Finding, State, all_passed, block_of, collected_warnings, line_of, summary_of
from kvoffload.doctor.settings import settings, shown
from kvoffload.observe.logs import get_logger

HIDE = "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; "
"""Where there is a GPU it is not to be seen."""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"{HIDE}{program}; from kvoffload.cli import main; sys.exit(main({list(arguments)}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize("command", [("doctor", "--gpu"), ("bench", "copy", "--gpu")], ids=" ".join)
@pytest.mark.parametrize("bindings", ["pass", "sys.modules['cuda'] = None"], ids=["as it is", "without cuda-bindings"])
def test_no_gpu_is_one_line_with_what_to_install_and_1(command: tuple[str, ...], bindings: str) -> None:
    done = run(bindings, *command)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"kvoffload {' '.join(command)}: no GPU to test: no CUDA: ")
    if bindings != "pass":
        assert "pip install kvoffload[cuda12] or kvoffload[cuda13]" in line


def test_without_gpu_it_tells_of_the_machine_and_which_engine_there_would_be() -> None:
    done = run("pass", "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == (BEGIN, END)
    told = {line[2:42].strip(): line[44:] for line in lines if line.startswith("  ")}
    assert told["kvoffload"] == kvoffload.__version__
    assert told["Python"] == sys.version.split()[0]
    assert {*packages.PACKAGES, "memory", "limit on locked memory", "container"} <= told.keys()
    assert told["would be chosen"].startswith("host: the CPU copies")
    assert "no CUDA: " in told["would be chosen"]
    assert "GiB, says " in told["memory that may be taken"]


def test_settings_are_told_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {
        "KVOFFLOAD_L2_SECRET": "hush-hush-hush-hush",
        "KVOFFLOAD_L2_BACKEND": "redis",
        "KVOFFLOAD_L2_NODES": "redis://user:pass-word@secret-host:1",
        "KVOFFLOAD_L2_MEMBERSHIP_URL": "redis://:pass-word@secret-host:2",
        "KVOFFLOAD_PROFILING_SERVER_ADDRESS": "http://me:pass-word@secret-host",
        "KVOFFLOAD_GPU_KERNEL_BELOW_BYTES": "4096",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert not any(secret in printed for secret in ("hush", "pass-word", "secret-host"))
    told = {finding.name: finding.text for finding in settings().findings}
    assert told == {
        "gpu.kernel_below_bytes": "4096",
        "l2.backend": "redis",
        "l2.nodes": "(1 given, not shown)",
        "l2.secret": "(set, not shown)",
        "l2.membership.url": "(set, not shown)",
        "profiling.server_address": "(set, not shown)",
    }


def test_wrong_settings_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KVOFFLOAD_GPU_KERNEL_BLOW_BYTES", "4096")
    assert main(["doctor"]) == 1
    assert "did you mean KVOFFLOAD_GPU_KERNEL_BELOW_BYTES?" in capsys.readouterr().out


def test_all_by_default_is_one_line() -> None:
    assert settings({}).findings == (Finding("all", "as by default, as far as this environment says"),)
    assert shown("l1.policy", "lru") == "lru"
    assert shown("any", SecretStr("hush")) == "(set, not shown)"


@pytest.mark.parametrize("arguments", [["bench", "index", "--gpu"], ["bench", "all", "--gpu"], ["doctor", "--device", "one"]])
def test_wrong_use_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: kvoffload" in capsys.readouterr().err


TORCH = "__version__ = '2.9.0+cu129'\ncuda: Optional[str] = '12.9'\nhip: Optional[str] = None\n"


def test_cuda_of_torch_is_read_from_its_file() -> None:
    assert packages.cuda_in(TORCH) == "12.9"
    assert packages.cuda_in("cuda = '13.0'\n") == "13.0"
    assert packages.cuda_in(TORCH.replace("'12.9'", "None")) is None


def test_bindings_of_another_major_version_are_told() -> None:
    assert packages.mismatch("12.9.1", "12.9") is None
    assert packages.mismatch("13.1.0", "12.9") == "pip install kvoffload[cuda12]"
    assert packages.mismatch(None, "13.0") == "pip install kvoffload[cuda13]"
    assert packages.mismatch(None, None) is None
    assert packages.version_of("there-is-no-such-package") is None


def test_the_link_is_told_as_it_is_and_as_it_may_be(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    for name, text in {
        "current_link_speed": "2.5 GT/s PCIe",
        "current_link_width": "16",
        "max_link_speed": "32.0 GT/s PCIe",
        "max_link_width": "16",
    }.items():
        (device / name).write_text(f"{text}\n")
    link = link_of("00000000:3B:00.0", tmp_path)
    assert link == Link(2.5, 16, 32.0, 16)
    assert str(link) == "generation 1 x16 now, generation 5 x16 at most"
    assert str(Link(16.0, 8, 16.0, 8)) == "generation 4 x8"
    assert str(Link(7.5, 8, 7.5, 8)) == "7.5 GT/s x8"
    assert link_of("0000:3C:00.0", tmp_path) is None
    (device / "max_link_speed").write_text("Unknown\n")
    assert link_of("0000:3B:00.0", tmp_path) is None


def test_libcuda_is_seen_where_it_is_mapped(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 08:01 12 /usr/lib/libcuda.so.580.65\n7f01-7f02 r-xp 00001000 08:01 12 /usr/lib/libcuda.so.580.65\n"
        "7f03-7f04 r--p 00000000 08:01 13 /usr/lib/libcudart.so.13\n7f05-7f06 rw-p 00000000 00:00 0\n"
    )
    assert libraries(maps) == ["/usr/lib/libcuda.so.580.65"]
    assert libraries(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("sign", "kind"), [(".dockerenv", "docker"), ("run/.containerenv", "podman"), ("run/secrets/kubernetes.io", "kubernetes")]
)
def test_containers_are_known_by_their_signs(tmp_path: Path, sign: str, kind: str) -> None:
    assert host.container(tmp_path) is None
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sign).touch()
    assert host.container(tmp_path) == kind


def test_memory_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    told = {finding.name: finding.text for finding in host.machine(tmp_path).findings}
    assert told["memory"] == "not known"
    assert "cannot tell how much memory there is" in told["memory that may be taken"]


def test_the_limit_on_locked_memory_is_in_words() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(soft, 65536) if soft != resource.RLIM_INFINITY else 65536, hard))
    try:
        assert host.memlock().startswith("0.0625 MiB, may be raised to ")
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_a_line_stays_one_line_and_says_how_it_went() -> None:
    assert line_of(Finding("a", "two\n  lines", State.FAILED)) == f"{'a'.ljust(40)}  FAILED   two lines"
    assert block_of([])[0] == BEGIN


def test_the_summary_names_what_is_wrong() -> None:
    fact, fine = Finding("fact", "x"), Finding("fine", "x", State.OK)
    missing, failed = Finding("less", "x", State.MISSING), Finding("bad", "x", State.FAILED)
    assert summary_of([fact, fine]) == "all 1 checks passed"
    assert summary_of([fact, fine, missing, failed]) == "1 of 3 checks FAILED (bad); 1 of 3 found something missing (less)"
    assert [all_passed([fact, other]) for other in (fine, missing, failed)] == [True, False, False]


def test_warnings_are_collected_while_it_lasts() -> None:
    log = get_logger("doctor-test")
    with collected_warnings() as found:
        log.warning("slow", why="small")
        log.info("not this")
    log.warning("later")
    assert found == ["slow why=small"]
