"""`kvoffload.connector.adapters`: adapters that follow one another under one name, which is what vLLM's own caches know them by."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.connector.engines import make_request

from kvoffload.connector import adapters
from kvoffload.connector.request_identity import UNIDENTIFIED, RequestIdentity
from kvoffload.keys import KeyChain

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

TOKENS = list(range(100, 164))
BLOCK = 16
PATIENCE_S = 20.0
SUCCESSOR = "another adapter under one name and path"


def _write(directory: Path, weights: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def _request(number: int, path: Path, name: str = "sql", item: str | None = None, **more: Any) -> Any:
    """A request as it comes after ``/v1/load_lora_adapter``, which gives every adapter a new number."""
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    position = PlaceholderRange(0, 4)
    items = [] if item is None else [MultiModalFeatureSpec(data=None, modality="image", identifier=item, mm_position=position)]
    return make_request(TOKENS, lora_request=LoRARequest(name, number, str(path), **more), mm_features=items)


def _keys(identity: RequestIdentity, request: Any) -> list[bytes]:
    """Of the adapter's second request: the first one has none."""
    identity.extras(request)
    assert identity.wait(PATIENCE_S)
    chain = KeyChain(bytes(24), BLOCK)
    chain.extend(list(request.all_token_ids), identity.extras(request))
    return chain.keys


@pytest.fixture
def identity() -> RequestIdentity:
    return RequestIdentity(wait_s=PATIENCE_S)


def test_vllm_knows_them_by_name_and_path(tmp_path: Path) -> None:
    """That is why a successor's first blocks may be its predecessor's."""
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    keys = [_gen_lora_extra_hash_keys(_request(number, tmp_path)) for number in (1, 2)]
    assert keys[0] == keys[1] == [("lora", "sql", str(tmp_path))]


def test_a_successor_with_other_files_has_no_keys(identity: RequestIdentity, tmp_path: Path) -> None:
    assert len(_keys(identity, _request(1, _write(tmp_path / "a", b"first")))) == 4
    assert _keys(identity, _request(2, _write(tmp_path / "a", b"second"))) == []
    assert _keys(identity, _request(3, _write(tmp_path / "a", b"first"))) == []  # nor has any after it
    assert identity.unidentified[SUCCESSOR] >= 2


def test_its_predecessors_running_requests_end_there(identity: RequestIdentity, tmp_path: Path) -> None:
    """Their files are gone, so what is saved under their digest could be the successor's."""
    request = _request(1, _write(tmp_path / "a", b"first"))
    _keys(identity, request)
    running = identity.extras(request)
    assert callable(running)
    assert running(0, BLOCK)
    _keys(identity, _request(2, _write(tmp_path / "a", b"second")))
    assert running(BLOCK, 2 * BLOCK) is None


def test_a_successor_in_doubts_place_has_no_keys(identity: RequestIdentity, tmp_path: Path) -> None:
    """What the doubtful one left in vLLM's cache is not known."""
    _keys(identity, _request(1, _write(tmp_path / "a", b"same")))
    identity.extras(_request(1, tmp_path / "a", load_inplace=True))
    assert _keys(identity, _request(2, tmp_path / "a")) == []


@pytest.mark.parametrize("more", [{}, {"load_inplace": True}])
@pytest.mark.parametrize(("name", "path"), [("sql", "b"), ("other", "a"), ("other", "b")])
def test_a_successor_where_another_was_under_a_wrong_number(
    identity: RequestIdentity, tmp_path: Path, name: str, path: str, more: dict[str, Any]
) -> None:
    """Adapter 1 came under another name or path for once, and vLLM's cache has kept under those what it made."""
    for directory in ("a", "b"):
        _write(tmp_path / directory, b"same")
    _keys(identity, _request(1, tmp_path / "a"))
    identity.extras(_request(1, tmp_path / path, name, **more))
    assert _keys(identity, _request(2, tmp_path / path, name)) == []
    assert _keys(identity, _request(3, tmp_path / "a")) == []


def test_a_successor_in_another_format_has_no_keys(identity: RequestIdentity, tmp_path: Path) -> None:
    _keys(identity, _request(1, _write(tmp_path / "a", b"same")))
    assert _keys(identity, _request(2, tmp_path / "a", is_3d_lora_weight=True)) == []


def test_a_successor_that_is_the_same_shares(identity: RequestIdentity, tmp_path: Path) -> None:
    first = _keys(identity, _request(1, _write(tmp_path / "a", b"same")))
    assert _keys(identity, _request(2, tmp_path / "a")) == first
    assert len(first) == 4


def test_a_successor_at_another_path_shares(identity: RequestIdentity, tmp_path: Path) -> None:
    """The usual way to bring out a new version; vLLM tells these two apart."""
    first = _keys(identity, _request(1, _write(tmp_path / "v1", b"first")))
    second = _keys(identity, _request(2, _write(tmp_path / "v2", b"second")))
    assert len(first) == len(second) == 4
    assert not set(first) & set(second)
    assert _keys(identity, _request(1, tmp_path / "v1")) == first


def test_what_an_encoder_made_is_known_by_the_name_alone(identity: RequestIdentity, tmp_path: Path) -> None:
    """vLLM's cache of encoder outputs, where adapters change the encoder too: its keys are ``<name>:<hash>``."""
    item = hashlib.sha256(b"picture").hexdigest()
    first = _keys(identity, _request(1, _write(tmp_path / "v1", b"first"), item=f"sql:{item}"))
    assert len(first) == 4
    second = _write(tmp_path / "v2", b"second")
    assert len(_keys(identity, _request(2, second, item=item))) == 4  # the encoder has no adapters
    assert _keys(identity, _request(2, second, item=f"sql:{item}")) == []
    assert _keys(identity, _request(1, tmp_path / "v1", item=f"sql:{item}")) == []
    assert len(_keys(identity, _request(3, second, name="another", item=f"another:{item}"))) == 4
    assert identity.unidentified["an item encoded with an adapter of whose name there are two"] >= 2


def test_an_item_that_is_encoded_while_another_adapter_of_the_name_is_read(tmp_path: Path) -> None:
    """What it was encoded with is not known any more, of the running requests either."""
    identity = RequestIdentity(wait_s=PATIENCE_S)
    item = hashlib.sha256(b"picture").hexdigest()
    requests = [_request(1, _write(tmp_path / "v1", b"same"), item=f"sql:{item}"), _request(1, tmp_path / "v1")]
    _keys(identity, requests[0])
    encoded, text = (identity.extras(request) for request in requests)
    assert callable(encoded)
    assert callable(text)
    identity.extras(_request(2, tmp_path / "not there", item=f"sql:{item}"))
    assert encoded(0, BLOCK) is None
    assert text(0, BLOCK)
    assert identity.wait(PATIENCE_S)
    assert encoded(0, BLOCK) is None


def test_two_that_are_read_at_once(tmp_path: Path) -> None:
    """The second one to be read is the doubtful one, and then both are."""
    identity = RequestIdentity(wait_s=PATIENCE_S)
    for turn in range(20):
        path = _write(tmp_path / str(turn), b"same")
        requests = [_request(2 * turn + 1, path), _request(2 * turn + 2, path, is_3d_lora_weight=True)]
        start = threading.Barrier(2)

        def ask(request: Any, start: threading.Barrier = start) -> None:
            start.wait()
            identity.extras(request)

        threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert identity.wait(PATIENCE_S)
        assert [identity.extras(request) for request in requests] == [UNIDENTIFIED, UNIDENTIFIED]


def test_no_more_are_remembered_than_there_is_room_for(tmp_path: Path) -> None:
    """To forget one would be to forget what its name stands for in vLLM's caches."""
    identity = RequestIdentity(wait_s=PATIENCE_S, limit=2)
    for number in (1, 2):
        assert len(_keys(identity, _request(number, _write(tmp_path / str(number), b"x"), name=str(number)))) == 4
    assert _keys(identity, _request(3, _write(tmp_path / "3", b"x"), name="3")) == []
    assert len(_keys(identity, _request(1, tmp_path / "1", name="1"))) == 4
    assert identity.unidentified["more adapters than are remembered"] == 2
    assert adapters.LIMIT >= 10_000
