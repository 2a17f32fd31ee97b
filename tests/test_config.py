"""Settings: sources and their order, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvoffload.config import Config, describe
from kvoffload.errors import ConfigError

GIB = 1 << 30


def load(extra: dict[str, Any] | None = None, **variables: str) -> Config:
    return Config.load(extra, {f"KVOFFLOAD_{name}": value for name, value in variables.items()})


def problems(extra: Any = None, **variables: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(extra, **variables)
    head, *lines = str(caught.value).splitlines()
    assert head == "kvoffload is not configured correctly:"
    return [line.removeprefix("  - ") for line in lines]


def test_defaults() -> None:
    config = load()
    assert config == Config()
    assert config.enabled
    assert (config.l1.capacity_bytes, config.l1.policy, config.l1.reserve_bytes) == (4 * GIB, "s3fifo", GIB)
    assert (config.match.deadline_ms, config.match.wait_idle_ms, config.match.wait_busy_ms) == (50, 2.0, 0.5)
    assert (config.loads.max_jobs, config.loads.start_deadline_ms) == (64, 1000)
    assert (config.save.enabled, config.save.max_jobs, config.save.pair_timeout_s) == (True, 256, 60)
    assert (config.model.version, config.namespace, config.log.level) == (None, "", "warning")
    assert (config.profiling.enabled, config.profiling.server_address) == (False, "http://localhost:4040")


@pytest.mark.parametrize("extra", [{"l1": {"capacity_gb": 2, "policy": "lru"}}, {"l1.capacity_gb": 2, "l1.policy": "LRU"}])
def test_nested_and_dotted_names_are_the_same(extra: dict[str, Any]) -> None:
    config = load(extra)
    assert (config.l1.capacity_bytes, config.l1.policy) == (2 * GIB, "lru")


def test_nested_and_dotted_names_mix() -> None:
    config = load({"l1": {"policy": "lru"}, "l1.capacity_bytes": 4096, "match": {}, "load": {"max_jobs": 3}})
    assert (config.l1.policy, config.l1.capacity_bytes, config.loads.max_jobs) == ("lru", 4096, 3)


def test_variables_beat_the_argument_and_that_beats_the_default() -> None:
    config = load({"match.deadline_ms": 20, "log.level": "info"}, MATCH_DEADLINE_MS=" 30.5 ")
    assert (config.match.deadline_ms, config.log.level, config.match.wait_idle_ms) == (30.5, "info", 2.0)


def test_an_empty_variable_counts_as_not_given() -> None:
    assert load({"l1.policy": "lru"}, L1_POLICY="", NAMESPACE=" ").l1.policy == "lru"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("on", True), ("0", False), ("False", False), ("no", False)])
def test_variables_are_parsed(text: str, value: bool) -> None:
    config = load(SAVE_ENABLED=text, LOAD_MAX_JOBS="7", L1_CAPACITY_GB="0.5", LOG_LEVEL="DEBUG", MODEL_VERSION="3")
    assert config.save.enabled is value
    assert (config.loads.max_jobs, config.l1.capacity_bytes, config.log.level, config.model.version) == (7, GIB // 2, "debug", "3")


def test_other_programs_variables_are_none_of_ours() -> None:
    assert Config.load({}, {"VLLM_KVOFFLOAD_X": "1", "kvoffload_x": "1", "PATH": "/"}) == Config()


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_NAMESPACE", "team-a")
    assert Config.load().namespace == "team-a"


@pytest.mark.parametrize("text", ["1", "true", "YES", " on ", "banana"])
def test_the_kill_switch_works_whatever_else_is_wrong(text: str) -> None:
    extra: Any = {"l1": {"capacity_gb": -1}, "nonsense": object(), 7: 8}
    assert load(extra, DISABLED=text, L1_POLICY="??", L1_POLICI="x") == Config(enabled=False)
    assert load("not even a mapping", DISABLED=text) == Config(enabled=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "false", "No", "off", ""])
def test_a_kill_switch_that_is_not_pulled_changes_nothing(text: str) -> None:
    assert load({}, DISABLED=text).enabled
    assert not load({"enabled": False}, DISABLED=text).enabled


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("l1.capacity_bg", "l1.capacity_gb"),
        ("l1.polcy", "l1.policy"),
        ("capacity_gb", "l1.capacity_gb"),
        ("deadline", "match.deadline_ms"),
        ("match.deadline", "match.deadline_ms"),
        ("Log.Level", "log.level"),
        ("namespce", "namespace"),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, nearest: str) -> None:
    (problem,) = problems({name: 1})
    assert problem == f"{name} (from kv_connector_extra_config): there is no such setting; did you mean {nearest}?"


def test_unknown_names_within_a_section_suggest_the_nearest() -> None:
    assert problems({"l1": {"capacity": 1, "policy": "lru"}}) == [
        "l1.capacity (from kv_connector_extra_config): there is no such setting; did you mean l1.capacity_gb?"
    ]


def test_unknown_variables_suggest_the_nearest() -> None:
    assert problems(L1_CAPACTY_GB="4") == ["KVOFFLOAD_L1_CAPACTY_GB: there is no such variable; did you mean KVOFFLOAD_L1_CAPACITY_GB?"]


def test_a_name_like_none_lists_them_all() -> None:
    (problem,) = problems({"zzzzqqqq": 1})
    assert all(setting.name in problem for setting in describe())


def test_everything_wrong_is_said_at_once() -> None:
    found = problems({"l1": {"policy": "fifo"}, "match.deadline_ms": -1, "nope": 1}, SAVE_ENABLED="maybe", LOG_LEVELS="info")
    assert len(found) == 5


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"l1.capacity_gb": 0}, "l1.capacity_gb = 0 (from kv_connector_extra_config): must be a number of GiB above 0"),
        ({"l1.capacity_gb": "much"}, "l1.capacity_gb = 'much' (from"),
        ({"l1.capacity_gb": True}, "must be a number of GiB above 0"),
        ({"l1.capacity_gb": None}, "must be a number of GiB above 0"),
        ({"l1.capacity_gb": "nan"}, "must be a number of GiB above 0"),
        ({"l1.capacity_gb": "inf"}, "must be a number of GiB above 0"),
        ({"l1.capacity_gb": 1e300}, "must be a number of GiB above 0"),
        ({"l1.capacity_gb": 1e-12}, "l1.capacity_gb = 1e-12 (from kv_connector_extra_config): must be greater than 0"),
        ({"l1.capacity_bytes": -5}, "l1.capacity_bytes = -5 (from kv_connector_extra_config): must be greater than 0"),
        ({"l1.capacity_bytes": 4.5}, "l1.capacity_bytes = 4.5 (from"),
        ({"l1.capacity_bytes": True}, "must be a number, not true or false"),
        ({"l1.policy": "fifo"}, "must be 's3fifo' or 'lru'"),
        ({"l1": 4}, "l1 = 4 (from kv_connector_extra_config): must be a mapping of settings, such as l1.enabled"),
        ({"match.deadline_ms": -1}, "must be greater than or equal to 0; it is: after this long a request is computed"),
        ({"match.deadline_ms": float("nan")}, "must be a finite number"),
        ({"match.wait_idle_ms": 1000}, "must be less than or equal to 100"),
        ({"load.max_jobs": 0}, "must be greater than or equal to 1"),
        ({"save.pair_timeout_s": 0}, "must be greater than 0"),
        ({"log.level": "loud"}, "must be 'debug', 'info', 'warning' or 'error'"),
        ({"profiling.server_address": "localhost:4040"}, "must start with http:// or https://"),
        ({"model.version": 3}, "must be a valid string"),
        ({"enabled": "perhaps"}, "must be a valid boolean"),
        ({3: 4}, "3 (from kv_connector_extra_config): there is no such setting"),
    ],
)
def test_a_bad_value_is_named_with_what_is_wrong(extra: dict[str, Any], text: str) -> None:
    (problem,) = problems(extra)
    assert text in problem


def test_a_bad_variable_is_named() -> None:
    (problem,) = problems({"match.deadline_ms": 5}, MATCH_DEADLINE_MS="soon")
    assert problem.startswith("match.deadline_ms = 'soon' (from KVOFFLOAD_MATCH_DEADLINE_MS): ")
    assert problem.endswith("default 50.0")


def test_the_extra_config_must_be_a_mapping() -> None:
    (problem,) = problems([("l1.policy", "lru")])
    assert "(from kv_connector_extra_config): must be a mapping of settings" in problem


def test_both_units_of_capacity_in_one_source_are_an_error() -> None:
    text = "given beside l1.capacity_gb, which is the same in another unit; keep one of them"
    assert problems({"l1": {"capacity_gb": 1, "capacity_bytes": GIB}}) == [f"l1.capacity_bytes (from kv_connector_extra_config): {text}"]
    (problem,) = problems(L1_CAPACITY_GB="1", L1_CAPACITY_BYTES="5")
    assert "given beside l1.capacity_" in problem


def test_a_variable_in_one_unit_beats_an_argument_in_the_other() -> None:
    assert load({"l1.capacity_gb": 1}, L1_CAPACITY_BYTES="4096").l1.capacity_bytes == 4096
    assert load({"l1.capacity_bytes": 4096}, L1_CAPACITY_GB="1").l1.capacity_bytes == GIB


def test_a_name_given_nested_and_dotted_is_an_error() -> None:
    assert problems({"l1": {"policy": "lru"}, "l1.policy": "lru"}) == [
        "l1.policy (from kv_connector_extra_config): given twice; keep one of them"
    ]


def test_settings_are_frozen() -> None:
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.l1.capacity_bytes = 1


def test_every_setting_is_described_and_its_variable_sets_it() -> None:
    settings = {setting.name: setting for setting in describe()}
    assert len(settings) == len({setting.variable for setting in describe()}) == 52
    assert settings["l1.policy"].type == "s3fifo | lru"
    assert settings["model.version"].type == "str | null"
    assert (settings["l1.capacity_gb"].type, settings["l1.capacity_gb"].default) == ("float", 4.0)
    assert (settings["l2.nodes"].type, settings["l2.membership.url"].variable) == ("list of str", "KVOFFLOAD_L2_MEMBERSHIP_URL")
    assert settings["enabled"].variable == "KVOFFLOAD_DISABLED"
    for setting in describe():
        assert setting.description
        if setting.name != "enabled" and setting.default is not None:
            text = str(setting.default)
            assert Config.load({}, {setting.variable: text}) == Config(), setting.name


# ------------------------------------------------------------ the GPU


def test_defaults_of_copies_to_and_from_the_gpu() -> None:
    gpu = load().gpu
    assert (gpu.copy_with, gpu.descriptors_per_call, gpu.inflight_bytes) == ("auto", 8192, 64 << 20)
    assert (gpu.kernel_below_bytes, gpu.kernel_min_pieces, gpu.kernel_blocks) == (28 << 10, 16, 12)
    assert (gpu.pin, gpu.pin_piece_bytes, gpu.pin_at_start_s) == (True, GIB, 10)


def test_how_the_gpu_copies_is_called_copy() -> None:
    for config in (load({"gpu.copy": "DMA"}), load({"gpu": {"copy": "dma"}}), load(GPU_COPY="dma")):
        assert config.gpu.copy_with == "dma"
    assert problems({"gpu.copy_with": "dma"})[0].startswith("gpu.copy_with (from kv_connector_extra_config): there is no such setting")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"gpu.copy": "fast"}, "gpu.copy = 'fast' (from kv_connector_extra_config): must be 'auto', 'dma', 'kernel' or 'single'; it is: "),
        ({"gpu.descriptors_per_call": 0}, "must be greater than or equal to 1"),
        ({"gpu.pin_piece_bytes": 4096}, "must be greater than or equal to 1048576"),
        ({"gpu.pin_at_start_s": -1}, "must be greater than or equal to 0"),
        ({"gpu.pin": "sometimes"}, "must be a valid boolean"),
    ],
)
def test_a_bad_value_for_the_gpu_is_named(extra: dict[str, Any], text: str) -> None:
    (problem,) = problems(extra)
    assert text in problem


# ------------------------------------------------------------ the second tier


def test_a_list_comes_from_a_variable_with_commas() -> None:
    assert load({}, L2_BACKEND="infinistore", L2_NODES=" 10.0.0.1:12345, b:2 ,").l2.nodes == ("10.0.0.1:12345", "b:2")
    assert load({"l2": {"backend": "redis", "nodes": ["redis://a:1"]}}).l2.nodes == ("redis://a:1",)


def test_sections_within_sections_have_dotted_names_too() -> None:
    for extra in ({"l2": {"membership": {"url": "redis://a", "key": "k"}}}, {"l2.membership": {"url": "redis://a", "key": "k"}}):
        membership = load(extra).l2.membership
        assert membership.url is not None
        assert (membership.url.get_secret_value(), membership.key) == ("redis://a", "k")
    (problem,) = problems({"l2.membership.ulr": "redis://a"})
    assert problem.endswith("there is no such setting; did you mean l2.membership.url?")


def test_a_second_tier_needs_nodes() -> None:
    assert problems({"l2.backend": "redis"}) == ["l2.backend is redis, but neither l2.nodes nor l2.membership.url says where its nodes are"]


def test_without_any_tier_there_is_nowhere_to_keep_blocks() -> None:
    (problem,) = problems({"l1.enabled": False})
    assert "l2.backend is off" in problem


def test_secrets_are_neither_shown_nor_said() -> None:
    config = load({"l2.secret": "sixteen letters!", "l2.membership.url": "redis://:hunter2@a"})
    assert "sixteen" not in repr(config)
    assert "hunter2" not in repr(config)
    for text in (problems({"l2.secret": "too short"}), problems({"l2.membership.url": "http://:hunter2@a"})):
        assert "too short" not in str(text)
        assert "hunter2" not in str(text)


def test_what_is_wrong_within_a_list_names_the_setting() -> None:
    (problem,) = problems({"l2.nodes": [7]})
    assert problem.startswith("l2.nodes = [7] (from kv_connector_extra_config): ")


@pytest.mark.parametrize(
    "extra",
    [
        {"l2": "redis://:hunter2@a"},
        {"l2.membership": "redis://user:hunter2@a"},
        {"l2.nodes": {"redis://:hunter2@a": 1}},
        {"l2": {"backend": "redis", "nodes": ["redis://:hunter2@a:b:c"]}},
        {"l2.backend": "redis://:hunter2@a"},
    ],
)
def test_no_password_is_said_whatever_is_wrong(extra: dict[str, Any]) -> None:
    assert problems(extra)
    assert "hunter2" not in str(problems(extra))


def test_passwords_of_nodes_are_not_shown() -> None:
    assert "hunter2" not in repr(load({"l2": {"backend": "redis", "nodes": ["redis://:hunter2@a"]}}))
