"""What the Serve application that KubeRay asks for refuses before it touches Ray; test_k8s_service.py deploys it."""

from pathlib import Path

import msgspec
import pytest

from cluster.config import ConfigError
from cluster.kuberay import application, read_settings
from cluster.serve import DEMO_MODEL


def write(folder: Path, text: str) -> str:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return str(file)


def test_settings_come_with_absolute_paths(tmp_path: Path) -> None:
    config = read_settings(
        write(tmp_path, "{host: 0.0.0.0, keys_required: true, ledger: {url: 'sqlite:///l.db'}}")
    )
    assert config.model == str(DEMO_MODEL)
    assert config.ledger.url == f"sqlite:///{Path('l.db').resolve()}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"cluster\.yaml: host is 127\.0\.0\.1, which other pods cannot reach"),
        ("{host: 0.0.0.0}", "keys"),
        ("{host: 0.0.0.0, keys_required: true, prefil: {}}", "prefil"),
        ("{host: 0.0.0.0, keys_required: true, model: /nowhere}", r"/nowhere/config\.json"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError, OSError), match=message):
        read_settings(write(tmp_path, text))


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="revison"):
        application({"config": "/etc/lightship/cluster.yaml", "revison": "2"})
