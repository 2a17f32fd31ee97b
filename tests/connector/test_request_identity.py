"""`kvoffload.connector.request_identity`: pairs of real requests that differ in one thing, and the keys that come of it."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.connector.engines import make_request

from kvoffload.connector import weights
from kvoffload.connector.adapters import RECENT_S
from kvoffload.connector.request_identity import NOTHING, UNIDENTIFIED, RequestIdentity, field
from kvoffload.keys import KeyChain

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

TOKENS = list(range(100, 164))
BLOCK = 16


PATIENCE_S = 20.0
"""What must come is waited for that long; only a failing test does."""


class Files:
    """Adapter files that can hang as a network file system does: `hold()` to `release()`. Notes who asked, and how often."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.begun = threading.Semaphore(0)
        self._goes_on = threading.Event()
        self._goes_on.set()

    def hold(self) -> None:
        self._goes_on.clear()

    def release(self) -> None:
        self._goes_on.set()

    def signature(self, directory: Path) -> weights.Signature:
        self.threads.add(threading.get_ident())
        self.asked.append(len(self.asked))
        found = weights.signature(directory)
        self.begun.release()
        assert self._goes_on.wait(PATIENCE_S)
        return found

    def digest_whole(self, directory: Path) -> str:
        self.threads.add(threading.get_ident())
        assert self._goes_on.wait(PATIENCE_S)
        return weights.digest_whole(directory)


def _patient(files: Files | None = None) -> RequestIdentity:
    """However busy the machine, a check is waited for."""
    return RequestIdentity(wait_s=PATIENCE_S) if files is None else RequestIdentity(files, PATIENCE_S)


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def _keys(request: Any, identity: RequestIdentity | None = None) -> list[bytes]:
    chain = KeyChain(bytes(24), BLOCK)
    chain.extend(list(request.all_token_ids), (identity or RequestIdentity()).extras(request))
    return chain.keys


def _hash(word: str) -> str:
    """As vLLM's hasher makes it of an item."""
    return hashlib.sha256(word.encode()).hexdigest()


def _item(identifier: str, offset: int, length: int = 4) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    return MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset, length))


def _adapter(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def _lora(path: Path | str, number: int = 1, name: str = "adapter", **more: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path), **more)


def _settled(identity: RequestIdentity, *requests: Any) -> RequestIdentity:
    """Lets the adapters of these requests be read, as their first requests do."""
    for request in requests:
        identity.extras(request)
    assert identity.wait(30)
    return identity


def test_the_common_case_is_one_shared_constant() -> None:
    identity = RequestIdentity()
    assert identity.extras(make_request(TOKENS)) is NOTHING
    assert identity.extras(make_request([1])) is NOTHING
    assert _keys(make_request(TOKENS)) == _keys(make_request(TOKENS, "other", priority=3))


def test_the_common_case_is_cheap() -> None:
    extras, request = RequestIdentity().extras, make_request(TOKENS)
    best = min(timeit.repeat(lambda: extras(request), number=2000, repeat=7)) / 2000
    assert best < 1e-6


def test_salts_do_not_share() -> None:
    plain, a, b, empty = (_keys(make_request(TOKENS, cache_salt=salt)) for salt in (None, "a", "b", ""))
    assert _keys(make_request(TOKENS, cache_salt="a")) == a
    for one, other in ((plain, a), (a, b), (plain, b), (plain, empty)):
        assert not set(one) & set(other)


def test_an_item_counts_from_its_first_block_on() -> None:
    plain = _keys(make_request(TOKENS))
    with_item = _keys(make_request(TOKENS, mm_features=[_item(_hash("picture"), BLOCK + 2)]))
    assert with_item[0] == plain[0]
    assert not set(with_item[1:]) & set(plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([("picture", 2, 4)], [("drawing", 2, 4)]),
        ([("picture", 2, 4)], [("picture", 3, 4)]),
        ([("picture", 2, 4)], [("picture", 2, 5)]),
        ([("picture", 2, 4)], [("picture", 2, 4), ("picture", 8, 4)]),
        ([("a", 2, 4), ("b", 8, 4)], [("b", 2, 4), ("a", 8, 4)]),
        ([("ab", 2, 4)], [("a", 2, 4), ("b", 2, 4)]),
    ],
)
def test_items_differ(one: list[tuple[str, int, int]], other: list[tuple[str, int, int]]) -> None:
    first, second = (
        _keys(make_request(TOKENS, mm_features=[_item(_hash(name), *place) for name, *place in items])) for items in (one, other)
    )
    assert not set(first) & set(second)


def test_an_item_over_several_blocks_marks_each() -> None:
    """By the chain a later block differs anyway; this is about what the block itself says."""
    extras = RequestIdentity().extras(make_request(TOKENS, mm_features=[_item(_hash("wide"), 10, 30), _item(_hash("inside"), 12, 2)]))
    assert callable(extras)
    spans = [extras(start, start + BLOCK) for start in range(0, 64, BLOCK)]
    assert [bool(span) for span in spans] == [True, True, True, False]
    assert spans[0] is not None
    assert _hash("inside").encode() in spans[0]
    assert len(set(spans[:3])) == 3


OF_A_CLIENT = ["img-0", _hash("x").upper(), _hash("x")[:-1], _hash("x") + "0", "adapter:" + _hash("x"), _hash("x") + "\n", "é" * 64]


@pytest.mark.parametrize("identifier", OF_A_CLIENT)
def test_a_name_of_the_clients_own_identifies_nothing(identifier: str) -> None:
    """It may name another item in another session, or on another engine."""
    identity = RequestIdentity()
    request = make_request(TOKENS, mm_features=[_item(_hash("a"), 2), _item(identifier, BLOCK + 2), _item(_hash("b"), 2 * BLOCK)])
    before = make_request(TOKENS, mm_features=[_item(_hash("a"), 2)])
    assert _keys(request, identity) == _keys(before)[:1]  # what comes before it is shared all the same
    assert identity.unidentified == {"a multimodal item named by the client": 1}


def test_where_nothing_leaves_the_engine_a_clients_name_will_do() -> None:
    """vLLM's own caches, which live as long, go by it too."""
    one, same, other = (
        _keys(make_request(TOKENS, mm_features=[_item(name, 2)]), RequestIdentity(is_shared=False)) for name in ("a", "a", "b")
    )
    assert one == same
    assert len(one) == 4
    assert not set(one) & set(other)


@pytest.mark.parametrize("length", [64, 128])
def test_the_hashes_of_all_of_vllms_hashers_are_taken(length: int) -> None:
    assert len(_keys(make_request(TOKENS, mm_features=[_item("5e" * (length // 2), 2)]))) == 4


@pytest.mark.parametrize("algorithm", ["blake3", "sha256", "sha512"])
def test_vllms_own_hashes_are_taken(algorithm: Any) -> None:
    from vllm.multimodal.hasher import MultiModalHasher

    identifier = MultiModalHasher.hash_kwargs(algorithm, model_id="m", image=b"pixels")
    assert len(_keys(make_request(TOKENS, mm_features=[_item(identifier, 2)]))) == 4


@pytest.mark.parametrize("is_shared", [True, False])
def test_an_item_without_identifier_has_no_keys(is_shared: bool) -> None:
    identity = RequestIdentity(is_shared=is_shared)
    request = make_request(TOKENS, mm_features=[_item("", BLOCK + 2)])
    assert _keys(request, identity) == _keys(make_request(TOKENS))[:1]
    assert identity.unidentified["a multimodal item without identifier"] == 1


def test_prompt_embeddings_are_hashed_block_by_block() -> None:
    torch = pytest.importorskip("torch")
    first = torch.arange(40 * 8, dtype=torch.float32).reshape(40, 8).to(torch.bfloat16)
    second = first.clone()
    second[35, 3] += 2
    one, same, other = (_keys(make_request(None, prompt_embeds=embeds)) for embeds in (first, first.clone(), second))
    assert one == same
    assert len(one) == 2
    assert one == other  # the change is in the block that is not full yet
    longer = torch.cat([first, first])
    changed = longer.clone()
    changed[35, 3] += 2
    one, other = (_keys(make_request(None, prompt_embeds=embeds)) for embeds in (longer, changed))
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert _keys(make_request(None, prompt_embeds=longer.to(torch.float32)))[0] != one[0]


def test_embeddings_between_tokens() -> None:
    torch = pytest.importorskip("torch")
    embeds = torch.zeros(64, 8)
    tokens, mask = list(TOKENS), [True] * 64
    plain = _keys(make_request(tokens, prompt_embeds=embeds, prompt_is_token_ids=mask))
    masked = _keys(make_request(tokens, prompt_embeds=embeds, prompt_is_token_ids=[*mask[:20], False, *mask[21:]]))
    assert plain[0] == masked[0]
    assert not set(plain[1:]) & set(masked[1:])


def test_adapters_are_told_apart_by_their_files(tmp_path: Path) -> None:
    a = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "a"), 1))
    b = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "b", b"WEIGHTS"), 2))
    copy_of_a = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "c"), 3, "another name"))
    other_format = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "d"), 4, is_3d_lora_weight=True))
    identity = _settled(_patient(), a, b, copy_of_a, other_format)
    plain = _keys(make_request(TOKENS), identity)
    assert len(_keys(a, identity)) == len(plain) == 4
    assert _keys(a, identity) == _keys(copy_of_a, identity)
    assert not set(_keys(a, identity)) & set(_keys(b, identity))
    assert not set(_keys(a, identity)) & set(_keys(other_format, identity))
    assert not set(_keys(a, identity)) & set(plain)


def test_no_keys_before_the_adapter_is_read(tmp_path: Path) -> None:
    request = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "a")))
    identity = _patient()
    assert identity.extras(request) is UNIDENTIFIED
    assert _settled(identity, request).extras(request) is not UNIDENTIFIED


def _change(directory: Path, change: str) -> None:
    file = directory / "adapter_model.safetensors"
    before = file.stat()
    match change:
        case "files":
            file.write_bytes(b"other weights")
        case "bytes in place":
            file.write_bytes(b"WEIGHTS")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (before.st_ino, before.st_size, before.st_mtime_ns) == (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns)
        case "removed":
            file.unlink()
        case "directory removed":
            directory.rename(directory.parent / "away")
        case _:
            raise AssertionError(change)


@pytest.mark.parametrize("change", ["in place", "path", "files", "bytes in place", "removed", "directory removed"])
def test_doubt_about_an_adapter_is_for_good(tmp_path: Path, change: str) -> None:
    directory = _adapter(tmp_path / "a")
    request = make_request(TOKENS, lora_request=_lora(directory))
    identity = _settled(_patient(), request)
    alive = identity.extras(request)
    assert callable(alive)
    assert alive(0, BLOCK)
    if change == "in place":
        identity.extras(make_request(TOKENS, lora_request=_lora(directory, load_inplace=True)))
    elif change == "path":
        identity.extras(make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "b", b"else"))))
    else:
        _change(directory, change)
    assert identity.extras(request) is UNIDENTIFIED
    assert alive(BLOCK, 2 * BLOCK) is None  # of the requests that are running too
    if change == "directory removed":
        (tmp_path / "away").rename(directory)
    assert _keys(request, identity) == []


@pytest.mark.parametrize("what", ["a repository", "a file", "an absurd name"])
def test_adapters_that_are_no_directory(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    path: Path | str = {"a repository": "some/repository", "a file": str(tmp_path / "file"), "an absurd name": "nul\0"}[what]
    request = make_request(TOKENS, lora_request=_lora(path))
    identity = _settled(_patient(), request)
    assert _keys(request, identity) == []
    if what != "an absurd name":
        assert identity.unidentified["an adapter that is no local directory"] == 1


def test_no_file_is_touched_on_the_callers_thread(tmp_path: Path) -> None:
    files = Files()
    identity = _patient(files)
    request = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "a")))
    assert len(_keys(request, _settled(identity, request))) == 4
    assert files.threads
    assert threading.get_ident() not in files.threads


def _asked_in_s(identity: RequestIdentity, request: Any) -> float:
    begun = time.monotonic()
    assert identity.extras(request) is UNIDENTIFIED
    return time.monotonic() - begun


def test_nobody_waits_for_a_file_system_that_hangs_from_the_start(tmp_path: Path) -> None:
    files = Files()
    files.hold()
    identity = RequestIdentity(files)
    request = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "a")))
    asked = sorted(_asked_in_s(identity, request) for _ in range(200))
    assert asked[100] < 0.001
    assert asked[-1] < 0.5  # others want the processor too
    assert len(files.threads) <= 1
    assert identity.unidentified == {"an adapter whose files are being read": 200}
    files.release()
    assert identity.wait(PATIENCE_S)
    _until(lambda: identity.extras(request) is not UNIDENTIFIED)


def test_nobody_waits_for_a_file_system_that_hangs_later(tmp_path: Path) -> None:
    threads = threading.active_count()
    files = Files()
    identity = RequestIdentity(files)
    request = make_request(TOKENS, lora_request=_lora(_adapter(tmp_path / "a")))
    _settled(identity, request)
    running = identity.extras(request)
    while running is UNIDENTIFIED:
        running = identity.extras(request)
    files.hold()
    asked = [_asked_in_s(identity, request) for _ in range(200)]
    assert asked[0] < 0.5  # 2 ms, and what others take
    assert sorted(asked)[100] < 0.001  # the second one does not even wait for those
    assert threading.active_count() <= threads + 1
    assert identity.unidentified["an adapter whose files were not checked in time"] >= 200
    assert callable(running)
    assert running(BLOCK, 2 * BLOCK) is not None  # there is no doubt, only no proof for anything new
    files.release()
    _until(lambda: identity.extras(request) is not UNIDENTIFIED)


def test_a_check_that_began_before_a_request_proves_nothing_for_it(tmp_path: Path) -> None:
    """It may have looked before the change."""
    files = Files()
    directory = _adapter(tmp_path / "a")
    request = make_request(TOKENS, lora_request=_lora(directory))
    identity = _settled(_patient(files), request)
    while files.begun.acquire(blocking=False):
        pass
    files.hold()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(identity.extras(request)))
    first.start()
    assert files.begun.acquire(timeout=PATIENCE_S)  # it has the signature
    _change(directory, "files")
    [adapter] = identity._adapters._adapters.values()
    wanted = adapter._wanted
    second = threading.Thread(target=lambda: answers.append(identity.extras(request)))
    second.start()
    _until(lambda: adapter._wanted > wanted)
    files.release()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    assert len(answers) == 2
    assert UNIDENTIFIED in answers
    assert identity.extras(request) is UNIDENTIFIED


def test_a_request_that_waited_long_is_checked_again(tmp_path: Path) -> None:
    """The engine may load the adapter only now."""
    directory = _adapter(tmp_path / "a")
    request = make_request(TOKENS, lora_request=_lora(directory))
    identity = _settled(_patient(), request)
    queued = identity.extras(request)
    assert callable(queued)
    [adapter] = identity._adapters._adapters.values()
    _change(directory, "files")
    adapter._unchanged -= 2 * RECENT_S
    assert queued(0, BLOCK) is None


def test_fields_in_a_row_cannot_be_confused() -> None:
    assert field(b"a", b"") + field(b"b", b"c") != field(b"a", b"b" + field(b"", b"c")[1:])
    assert len({field(b"a", b"bc"), field(b"ab", b"c"), field(b"a", b"b") + b"c"}) == 3
