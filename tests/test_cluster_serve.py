"""What the starter refuses before Ray is started: a sentence and exit code 1."""

import json
import shutil
import socket
import struct
from pathlib import Path

import pytest

from cluster.serve import main
from workers.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--set", "ledger.url=sqlite:////dev/null/ledger.db"]) == 1
    return " ".join(capsys.readouterr().err.split())


def test_a_taken_port(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = _refused(capsys, "--model", str(model), "--port", str(port))
    assert f"127.0.0.1:{port}" in sentence
    assert "in use" in sentence


def test_a_ledger_that_cannot_be_written(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    assert "ledger" in _refused(capsys, "--model", str(model), "--port", "0")


def test_too_little_memory_for_one_page(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    sentence = _refused(
        capsys, "--model", str(model), "--port", "0", "--set", "decode.engine.cache_bytes=1000"
    )
    assert "cache_bytes is 1000" in sentence


def test_an_unknown_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert "prefil" in _refused(capsys, "--set", "prefil.workers=2")


def test_beyond_loopback_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert "loopback" in _refused(capsys, "--set", "host=0.0.0.0")


def test_a_foreign_checkpoint(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    sentence = _refused(capsys, "--model", str(copy), "--port", "0")
    assert "model_type" in sentence
    assert "llama" in sentence


def test_a_folder_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "config.json" in _refused(capsys, "--model", str(tmp_path), "--port", "0")


def test_a_truncated_file(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    shard = min(copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in _refused(capsys, "--model", str(copy), "--port", "0")


def test_an_unknown_chat_format(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "<|im_start|>"}))
    sentence = _refused(capsys, "--model", str(copy), "--port", "0")
    assert "set chat_encoding to v3.2 or v3.2-exp" in sentence
    (copy / "tokenizer.json").unlink()
    sentence = _refused(capsys, "--model", str(copy), "--port", "0", "--set", "chat_encoding=v3.2")
    assert "tokenizer.json" in sentence


def test_a_missing_tensor(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    """Rewrites one name in a file's header, so that the file still reads but holds another tensor."""
    name, other = b"model.norm.weight", b"model.morn.weight"
    for shard in copy.glob("*.safetensors"):
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        shard.write_bytes(data[:8] + data[8 : 8 + length].replace(name, other) + data[8 + length :])
    index = copy / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(name, other))
    assert "model.norm.weight" in _refused(capsys, "--model", str(copy), "--port", "0")


def test_a_public_prefix_is_read_when_the_service_starts(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "system.txt"
    settings = ["--set", f"public_prefixes=[{{file: {file}}}]"]
    assert "system.txt: [Errno 2]" in _refused(capsys, *settings, "--model", str(model), "--port", "0")
    file.write_text("Too short.")
    assert "only whole pages of 64 are shared" in _refused(
        capsys, *settings, "--model", str(model), "--port", "0"
    )
