from __future__ import annotations

import numpy as np

from kvoffload.bench import copy


def test_each_page_size_is_measured_both_ways() -> None:
    scale = copy._Scale(source_bytes=64 << 20, slab_bytes=48 << 20, pairs=2)
    source = np.arange(scale.source_bytes, dtype=np.uint8)
    for page_bytes, target in copy.TARGETS.items():
        gather, scatter = copy._measure(source, page_bytes, scale)
        assert (gather.name, scatter.name) == (f"gather, pages of {page_bytes >> 10} KiB", f"scatter, pages of {page_bytes >> 10} KiB")
        for figure in (gather, scatter):
            assert figure.passed == (figure.value >= target)
            assert 0 < figure.value < 50


def test_the_rotation_takes_everything_once_before_anything_twice() -> None:
    advance = copy._rotation(np.random.default_rng(1), 12, 4)
    first = [int(number) for _ in range(3) for number in advance()]
    assert sorted(first) == list(range(12))
    assert advance().tolist() == first[:4]
