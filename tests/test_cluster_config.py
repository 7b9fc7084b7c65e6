"""The cluster's settings: strict, and wrong ones are named."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.config import ClusterConfig, ConfigError, TenantConfig, is_loopback, load

KEY = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
SHIPPED = Path(__file__).parent.parent / "cluster" / "cluster.yaml"


def test_the_shipped_file_states_every_default() -> None:
    assert load(SHIPPED) == load() == ClusterConfig()
    assert msgspec.yaml.decode(SHIPPED.read_bytes()) == msgspec.to_builtins(ClusterConfig())


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("port: 9000\nprefill: {workers: 2, engine: {threads: 1}}\n")
    config = load(
        file,
        ["prefill.engine.threads=4", "gateway.worker_timeout_s=1", "decode.engine.device=cpu", "model=/m"],
    )
    assert (config.port, config.prefill.workers, config.prefill.engine.threads) == (9000, 2, 4)
    assert (config.gateway.worker_timeout_s, config.decode.engine.device, config.model) == (1.0, "cpu", "/m")
    assert config.decode == ClusterConfig().decode


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\nprefill:\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml: prefill: Expected `object`, got `null`"):
        load(tmp_path / "empty.yaml")
    assert load(tmp_path / "empty.yaml", ["prefill.workers=1"]) == ClusterConfig()
    (tmp_path / "empty.yaml").write_text("")
    assert load(tmp_path / "empty.yaml") == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prefil: {}", "Object contains unknown field `prefil`"),
        ("prefill: {engine: {cache_byte: 1}}", "prefill.engine: Object contains unknown field `cache_byte`"),
        ("prefill: {workers: 0}", "prefill.workers: Expected `int` >= 1"),
        ("port: 70000", "port: Expected `int` <= 65535"),
        ("gateway: {worker_timeout_s: 0}", "gateway.worker_timeout_s: Expected `float` > 0.0"),
        ("decode: {engine: {precision: fp16}}", "decode.engine.precision: Invalid enum value 'fp16'"),
        ("tenants: [{name: a, keys: []}]", "tenants[0].keys: Expected `array` of length >= 1"),
        ("tenants: [{name: a, keys: [secret]}]", "tenants[0].keys[0]: Expected `str` matching regex"),
        (
            "decode: {engine: {precision: fp32}}",
            "prefill.engine.precision is fp8 but decode.engine.precision is fp32",
        ),
        (
            "prefill: {engine: {max_context: 9}}",
            "prefill.engine.max_context is 9 but decode.engine.max_context is None",
        ),
        ("prefill: {engine: {device: cuda}}", "prefill.engine.ranks 1, but prefill.num_gpus is 0"),
        (
            "decode: {num_gpus: 1, engine: {device: cuda, ranks: 2}}",
            "decode.engine.ranks 2, but decode.num_gpus is 1",
        ),
        ("host: 0.0.0.0", "host '0.0.0.0' is not a loopback address and tenants is empty"),
        ("[1, 2]", "expected settings by name, got a list"),
        ("port: [", "did not find expected"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("port", "'port' is not of the form dotted.key=value"),
        ("=1", "is not of the form"),
        ("a..b=1", "is not of the form"),
        ("port.x=1", "port is not a group of settings"),
        ("prefill.workers=two", "prefill.workers=two: prefill.workers: Expected `int`, got `str`"),
        ("port=[", "'port=[': "),
    ],
)
def test_a_wrong_override_is_named(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, ["port=1", override] if "port.x" in override else [override])
    assert sentence in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert ClusterConfig(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_a_host_that_others_can_reach_needs_keys(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="set keys_required, configure tenants with keys"):
        ClusterConfig(host=host)
    assert ClusterConfig(host=host, tenants=[TenantConfig(name="acme", keys=[KEY])]).host == host
    assert ClusterConfig(host=host, keys_required=True).host == host


@pytest.mark.parametrize(
    ("tenants", "sentence"),
    [
        ([{"name": "a", "keys": [KEY]}, {"name": "a", "keys": ["0" * 64]}], "the name 'a' is there twice"),
        (
            [{"name": "a", "keys": [KEY]}, {"name": "b", "keys": [KEY]}],
            "a key of 'b' is already a key of 'a'",
        ),
    ],
)
def test_a_key_belongs_to_one_tenant(tenants: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=sentence):
        msgspec.convert({"tenants": tenants}, ClusterConfig)
