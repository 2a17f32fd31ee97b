"""Changes to kv_copy.cu that the cases must notice, and those that they cannot, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.cuda.kernels.shim import KERNELS


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` at its ``occurrence`` replaced by ``new``. ``equivalent``: why no case can tell; such a one has to survive."""

    old: str
    new: str
    occurrence: int = 0
    equivalent: str = ""

    def apply(self, source: str) -> str:
        """Raises ValueError where the source no longer holds ``old``: the list is stale then."""
        at = -1
        for _ in range(self.occurrence + 1):
            at = source.find(self.old, at + 1)
            if at < 0:
                raise ValueError(f"kv_copy.cu does not hold {self.old!r} {self.occurrence + 1} times")
        return source[:at] + self.new + source[at + len(self.old) :]

    def __str__(self) -> str:
        return f"{self.old!r} -> {self.new!r}" + (f" (occurrence {self.occurrence})" if self.occurrence else "")


def of(old: str, *news: str, occurrence: int = 0) -> Iterator[Mutant]:
    return (Mutant(old, new, occurrence) for new in news)


LOADING, STORING = 0, 1
GATHER, SCATTER = 0, 1

LOAD = "word[k] = __ldcs(src + first + k * step);"
STORE = "__stcs(dst + first + k * step, word[k]);"
BOUND = "if (first + k * step < words)"
EACH = "for (int k = 0; k < KV_UNROLL; ++k)"
VALID = "if (block < num_blocks && slot < num_slots)"
IN_BLOCK = "run.address + block * run.stride"
IN_SLOT = "slot_base + slot * slot_bytes + run.offset"
CALL = "(runs, num_runs, blocks, slots, count, num_blocks, num_slots, slot_base, slot_bytes);"

MUTANTS: tuple[Mutant, ...] = (
    # Which words a thread copies.
    *of(
        "const uint64_t step = blockDim.x",
        *(f"const uint64_t step = {new}" for new in ("gridDim.x", "blockDim.x + 1", "blockDim.x - 1", "32")),
    ),
    *of("const uint64_t step", "const uint8_t step"),
    *of(
        "first = threadIdx.x", "first = 0", "first = 1", "first = threadIdx.x + 1", "first = blockIdx.x", "first = threadIdx.x + blockIdx.x"
    ),
    *of("for (uint64_t first", "for (uint16_t first", "for (uint32_t first"),
    *of("first < words; first", "first + 1 < words; first", "first + step < words; first", "first + 3 * step < words; first"),
    *of("first += KV_UNROLL * step", "first += step", "first += 3 * step", "first += 5 * step", "first += KV_UNROLL", "first += words"),
    *of("uint64_t words)", "uint32_t words)", "uint16_t words)"),
    *(
        mutant
        for which in (LOADING, STORING)
        for mutant in of(EACH, EACH.replace("= 0", "= 1"), EACH.replace("< KV_UNROLL", "< KV_UNROLL - 1"), occurrence=which)
    ),
    *(
        mutant
        for which in (LOADING, STORING)
        for mutant in of(
            BOUND,
            "",
            BOUND.replace("<", "<="),
            "if (first + k * step + 1 < words)",
            "if (first + k < words)",
            "if (first < words)",
            occurrence=which,
        )
    ),
    *of(LOAD, *(LOAD.replace("first + k * step", new) for new in ("first", "k * step", "first + k", "first + k * step + 1"))),
    *of(LOAD, "word[k] = src[first + k * step];", "word[0] = __ldcs(src + first + k * step);", ";"),
    *of(STORE, *(STORE.replace("first + k * step", new) for new in ("first", "k * step", "first + k", "first + k * step + 1"))),
    *of(STORE, "dst[first + k * step] = word[k];", "__stcs(dst + first + k * step, word[0]);", ";"),
    *of(STORE, "__stcs(const_cast<uint4*>(src) + first + k * step, word[k]);"),
    # Which units a thread block takes.
    *of("if (num_runs == 0) return;", "", "if (num_runs <= 1) return;"),
    *of(
        "items_per_step = gridDim.x / num_runs",
        *(f"items_per_step = {new}" for new in ("gridDim.x % num_runs", "gridDim.x", "blockDim.x / num_runs", "1")),
    ),
    *of(
        "runs_per_step = gridDim.x % num_runs",
        *(f"runs_per_step = {new}" for new in ("gridDim.x / num_runs", "gridDim.x", "blockDim.x % num_runs", "1")),
    ),
    *of(
        "uint64_t item = blockIdx.x / num_runs",
        *(f"uint64_t item = {new}" for new in ("blockIdx.x", "0", "threadIdx.x / num_runs", "blockIdx.x % num_runs")),
    ),
    *of(
        "uint64_t at = blockIdx.x % num_runs",
        *(f"uint64_t at = {new}" for new in ("blockIdx.x", "0", "threadIdx.x % num_runs", "blockIdx.x / num_runs")),
    ),
    *of("uint64_t item =", "uint8_t item =", "uint16_t item ="),
    *of("uint64_t at =", "uint8_t at =", "uint16_t at ="),
    *of("while (item < count)", "while (item <= count)", "while (item + 1 < count)", "if (item < count)", "while (at < count)"),
    *of("item += items_per_step;", "", "item += 1;", "item += items_per_step + 1;"),
    *of("at += runs_per_step;", "", "at += 1;", "at += runs_per_step + 1;"),
    *of("if (at >= num_runs)", "if (at > num_runs)", "if (at + 1 >= num_runs)", "if (false)", "if (true)"),
    *of("at -= num_runs;", "", "at = 0;", "at -= 1;"),
    *of("++item;", "", "item += 2;"),
    # Which block, slot and run it is.
    *of("block = blocks[item]", "block = slots[item]", "block = blocks[at]", "block = blocks[0]", "block = item"),
    *of("slot = slots[item]", "slot = blocks[item]", "slot = slots[at]", "slot = slots[0]", "slot = item"),
    *of("const uint64_t block =", "const uint32_t block ="),
    *of("const uint64_t slot =", "const uint32_t slot ="),
    *of("run = runs[at]", "run = runs[0]", "run = runs[item]", "run = runs[num_runs - at]"),
    # Ids out of range.
    *of(VALID, "", "if (block < num_blocks)", "if (slot < num_slots)", VALID.replace("&&", "||")),
    *of(
        VALID,
        VALID.replace("block <", "block <="),
        VALID.replace("slot <", "slot <="),
        VALID.replace("block <", "block + 1 <"),
        VALID.replace("slot <", "slot + 1 <"),
    ),
    *of(
        VALID,
        "if (block < num_slots && slot < num_blocks)",
        "if (static_cast<int64_t>(block) < static_cast<int64_t>(num_blocks) && slot < num_slots)",
    ),
    *of(VALID, "if (block < num_blocks && static_cast<int64_t>(slot) < static_cast<int64_t>(num_slots))"),
    *of(
        VALID,
        "if (static_cast<uint32_t>(block) < num_blocks && slot < num_slots)",
        "if (block < num_blocks && static_cast<uint32_t>(slot) < num_slots)",
    ),
    *of(
        VALID,
        "if (block < static_cast<uint32_t>(num_blocks) && slot < num_slots)",
        "if (block < num_blocks && slot < static_cast<uint32_t>(num_slots))",
    ),
    # Where it is.
    *of(
        IN_BLOCK,
        "run.address",
        "block * run.stride",
        "run.address + block * run.size",
        "run.address + block * run.stride + run.offset",
        "run.address - block * run.stride",
    ),
    *of(IN_BLOCK, "run.address + static_cast<uint32_t>(block * run.stride)", "run.address + block * static_cast<uint32_t>(run.stride)"),
    *of(IN_BLOCK, "static_cast<uint32_t>(run.address) + block * run.stride", "run.address + slot * run.stride"),
    *of(
        IN_SLOT,
        "slot_base + slot * slot_bytes",
        "slot_base + run.offset",
        "slot * slot_bytes + run.offset",
        "slot_base + slot * run.stride + run.offset",
    ),
    *of(
        IN_SLOT,
        "slot_base + static_cast<uint32_t>(slot * slot_bytes) + run.offset",
        "slot_base + slot * static_cast<uint32_t>(slot_bytes) + run.offset",
    ),
    *of(
        IN_SLOT,
        "slot_base + slot * slot_bytes + static_cast<uint32_t>(run.offset)",
        "static_cast<uint32_t>(slot_base) + slot * slot_bytes + run.offset",
    ),
    *of(
        IN_SLOT,
        "slot_base + block * slot_bytes + run.offset",
        "slot_base + slot * (slot_bytes + run.offset)",
        "slot_base + slot * slot_bytes + at * run.size",
    ),
    *of(
        "run.size / sizeof(uint4)",
        "run.size / 8",
        "run.size / 32",
        "run.size / sizeof(uint4) + 1",
        "run.size / sizeof(uint4) - 1",
        "run.stride / sizeof(uint4)",
    ),
    *of("run.size / sizeof(uint4)", "static_cast<uint32_t>(run.size) / sizeof(uint4)", "(run.size + sizeof(uint4) - 1) / sizeof(uint4)"),
    # Which way.
    *of("if (TO_SLOTS)", "if (!TO_SLOTS)", "if (true)", "if (false)"),
    *of("kv_copy_run(in_slot, in_block, words);", "kv_copy_run(in_block, in_slot, words);", "kv_copy_run(in_slot, in_slot, words);", ""),
    *of("kv_copy_run(in_block, in_slot, words);", "kv_copy_run(in_slot, in_block, words);", "kv_copy_run(in_block, in_block, words);", ""),
    *of("kv_copy<true>", "kv_copy<false>"),
    *of("kv_copy<false>", "kv_copy<true>"),
    *(
        mutant
        for which in (GATHER, SCATTER)
        for mutant in of(
            CALL,
            ";",
            CALL.replace("blocks, slots", "slots, blocks"),
            CALL.replace("num_blocks, num_slots", "num_slots, num_blocks"),
            CALL.replace("slot_base, slot_bytes", "slot_bytes, slot_base"),
            CALL.replace("num_runs, blocks", "count, blocks"),
            CALL.replace("count, num_blocks", "num_runs, num_blocks"),
            occurrence=which,
        )
    ),
    # The table, as its columns are read.
    *of("uint64_t address;  // of block 0\n    uint64_t stride; ", "uint64_t stride;\n    uint64_t address; "),
    *of("uint64_t size; ", "uint32_t size, other; "),
    *of("uint64_t offset; ", "uint32_t offset, other; "),
    # What no case can tell.
    Mutant(
        "first < words; first",
        "first <= words; first",
        equivalent="each access has a bound of its own: a thread looks once more and copies nothing",
    ),
    Mutant(
        "const uint64_t step",
        "const uint32_t step",
        equivalent="at most KV_UNROLL times the 1024 threads of a block, and the sums are of 64 bits",
    ),
    Mutant("#define KV_UNROLL 4", "#define KV_UNROLL 3", equivalent="speed only; the gate over the machine code counts the loads"),
    Mutant("#define KV_UNROLL 4", "#define KV_UNROLL 5", equivalent="speed only; the gate over the machine code counts the loads"),
    Mutant(
        "uint64_t item =",
        "uint32_t item =",
        equivalent="`count` has 32 bits: it takes more than 4 billion items less a grid, 64 GiB of ids",
    ),
    Mutant(
        "run = runs[at]",
        "run = runs[num_runs - 1 - at]",
        equivalent="the same runs from the last to the first: nothing depends on their order",
    ),
    Mutant("uint64_t at =", "uint32_t at =", equivalent="`num_runs` has 32 bits: it takes more than 2 billion runs, a table of 64 GiB"),
)


def one_source(sources: Sequence[str]) -> str:
    """Variants of kv_copy.cu as one source, their kernels with the prefix ``m<index>_``: to start a compiler once costs less."""
    lines = ["#include <stdint.h>"]
    for index, source in enumerate(sources):
        names = {kernel: f"m{index}_{kernel}" for kernel in KERNELS}
        lines += ["#undef KV_UNROLL", *(f"#define {kernel} {name}" for kernel, name in names.items())]
        lines += [f"namespace m{index} {{", source, "}"]
        lines += [line for kernel, name in names.items() for line in (f"#undef {kernel}", f"using m{index}::{name};")]
    entries = (f"KV_KERNEL(m{index}_{kernel})" for index in range(len(sources)) for kernel in KERNELS)
    return "\n".join([*lines, f"#define KV_KERNELS {' '.join(entries)}", ""])
