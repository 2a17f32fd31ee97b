"""Gate over the machine code of kv_copy.fatbin: what each kernel does to memory, for each architecture, and nothing else.

    python cuda/sass.py [FATBIN]    0: as promised; 1: each broken promise on a line of its own; 3: a disassembler is missing

Wants cuobjdump and nvdisasm: on PATH, or from the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

Per kernel, exactly: PAYLOAD 128-bit global loads and as many 128-bit global stores, all of them marked to leave the cache first, which
is all the payload; TABLES 64-bit global loads, which are the fields of one run and two ids. Parameters come out of constant memory.
Nothing generic, local, shared or atomic; no barrier, no call, no stack; few enough registers for the largest thread block. Besides these
only opcodes of a list that touch no memory but the constant bank.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FATBIN = Path(__file__).resolve().parent.parent / "src" / "kvoffload" / "cuda" / "kv_copy.fatbin"
KERNELS = ("kv_gather", "kv_scatter")
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)
PTX = 80

PAYLOAD = 4
"""KV_UNROLL of kv_copy.cu."""
TABLES = 6
"""address, stride, size and offset of a run, the block's id, the slot's."""
MAX_REGISTERS = 64
"""Of 65,536 in a multiprocessor, for a thread block of 1,024."""

PAYLOAD_LOAD = "LDG.E.EF.128"
PAYLOAD_STORE = "STG.E.EF.128"
TABLE_LOAD = "LDG.E.64"

# What else may be there, by the name in front of the first dot: arithmetic, moves, branches, special registers, constants. An opcode
# that is not named here breaks the promise until somebody has looked at what it does: a list of forbidden ones would miss the next.
HARMLESS = re.compile(
    "BRA|BSSY|BSYNC|EXIT|F2I|HFMA2|I2F|IADD|IADD3|IMAD|ISETP|LDC|LDCU|LEA|LOP3|MOV|MUFU|NOP|PLOP3|R2UR|S2R|S2UR|SEL|SHF|"
    "UI2F|UIADD3|UIMAD|UISETP|ULDC|ULEA|ULOP3|UMOV|USEL|USHF|VIADD|VOTEU"
)

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
SECTION = re.compile(r"^\s*\.section\s+(\S+?),", re.MULTILINE)
RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class MissingToolError(Exception):
    """A disassembler is not installed; the text says how to get it."""


@dataclass(frozen=True, slots=True)
class Code:
    """One kernel on one architecture."""

    architecture: int
    kernel: str
    opcodes: Counter[str]
    registers: int
    stack: int
    shared: int
    local: int


def tool(name: str) -> str:
    in_wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = shutil.which(name) or (str(in_wheel) if in_wheel.exists() else None)
    if found is None:
        raise MissingToolError(f"no {name} on PATH: pip install nvidia-cuda-{name}")
    return found


def call(*command: str, directory: Path | None = None) -> str:
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout


def disassemble(fatbin: Path) -> list[Code]:
    """Every kernel in every cubin of ``fatbin``, as nvdisasm reads it."""
    nvdisasm, cuobjdump = tool("nvdisasm"), tool("cuobjdump")
    with tempfile.TemporaryDirectory() as directory:
        call(cuobjdump, "-xelf", "all", str(fatbin.resolve()), directory=Path(directory))
        cubins = sorted(Path(directory).glob("*.cubin"))
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(lambda cubin: call(nvdisasm, "-c", str(cubin)), cubins))
        resources = [call(cuobjdump, "-res-usage", str(cubin)) for cubin in cubins]
    return [code for text, usage in zip(texts, resources, strict=True) for code in read(text, usage)]


def read(text: str, usage: str) -> Iterator[Code]:
    """The kernels of one cubin, from the output of ``nvdisasm -c`` and of ``cuobjdump -res-usage``."""
    target = re.search(r"\.target\s+sm_(\d+)", text)
    if target is None:
        raise ValueError(f"no .target in the disassembly: {text[:200]!r}")
    used = {name: tuple(map(int, numbers)) for name, *numbers in RESOURCES.findall(usage)}
    _, *parts = SECTION.split(text)
    for section, body in zip(parts[::2], parts[1::2], strict=True):
        if section.startswith(".text."):
            kernel = section.removeprefix(".text.")
            registers, stack, shared, local = used[kernel]
            yield Code(int(target[1]), kernel, Counter(INSTRUCTION.findall(body)), registers, stack, shared, local)


def broken(code: Code) -> Iterator[str]:
    """What a kernel promised and does not keep."""
    expected = {PAYLOAD_LOAD: PAYLOAD, PAYLOAD_STORE: PAYLOAD, TABLE_LOAD: TABLES}
    for opcode, count in expected.items():
        if code.opcodes[opcode] != count:
            yield f"{count} {opcode} expected, {code.opcodes[opcode]} found"
    for opcode, count in sorted(code.opcodes.items()):
        if opcode not in expected and not HARMLESS.fullmatch(opcode.partition(".")[0]):
            yield f"{count} {opcode} found, none expected"
    if code.opcodes["EXIT"] == 0:
        yield "no EXIT found: this is not the disassembly of a kernel"
    for what, bytes_used in (("stack", code.stack), ("shared memory", code.shared), ("local memory", code.local)):
        if bytes_used:
            yield f"{bytes_used} bytes of {what} used, none expected"
    if code.registers > MAX_REGISTERS:
        yield f"{code.registers} registers used, at most {MAX_REGISTERS} leave room for a thread block of 1024"


def gate(fatbin: Path = FATBIN, architectures: Sequence[int] = ARCHITECTURES) -> list[str]:
    """Every broken promise of ``fatbin``, in words; empty where there is none. A kernel or an architecture that is missing is one."""
    codes = disassemble(fatbin)
    found = {(code.architecture, code.kernel): code for code in codes}
    wanted = {(architecture, kernel) for architecture in architectures for kernel in KERNELS}
    problems = [f"sm_{architecture} {kernel}: missing" for architecture, kernel in sorted(wanted - found.keys())]
    problems += [f"sm_{architecture} {kernel}: not expected here" for architecture, kernel in sorted(found.keys() - wanted)]
    problems += [f"sm_{code.architecture} {code.kernel}: {words}" for code in codes for words in broken(code)]
    if f"sm_{PTX}.ptx" not in call(tool("cuobjdump"), "-lptx", str(fatbin)):
        problems.append(f"compute_{PTX}: no PTX for GPUs that come later")
    return problems


def main(arguments: Sequence[str]) -> int:
    fatbin = Path(arguments[0]) if arguments else FATBIN
    try:
        problems = gate(fatbin)
    except MissingToolError as error:
        sys.stdout.write(f"{fatbin.name} was not looked at: {error}\n")
        return 3
    names = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
    sys.stdout.write("\n".join(problems or [f"{fatbin.name}: as promised on {names}"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
