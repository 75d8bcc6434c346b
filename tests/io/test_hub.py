"""Hub ids against a small stand-in for the hub on this machine, through the hub's own library."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from helpers.stand_in_hub import TOKEN, StandIn, serve

from jquant.core import UserError
from jquant.io import hub

REPOS = {
    "org/plain": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "model.safetensors.index.json": b"{}",
        "consolidated.safetensors": b"the same again",
        "pytorch_model.bin": b"the same as pickle",
        "onnx/model.onnx": b"the same as onnx",
        "README.md": b"words",
    },
    "org/one-gguf": {"m-Q8_0.gguf": b"GGUF eight", "mmproj-m.gguf": b"GGUF eyes", "README.md": b"words"},
    "org/many-gguf": {
        "m-Q4_K_M.gguf": b"GGUF four",
        "m-Q4_K_S.gguf": b"GGUF small",
        "m-Q8_0-00001-of-00002.gguf": b"GGUF eight, first",
        "m-Q8_0-00002-of-00002.gguf": b"GGUF eight, second",
    },
    "org/pickle": {"pytorch_model.bin": b"pickle", "config.json": b"{}"},
    "org/private": {"config.json": b"{}", "model.safetensors": b"secret"},
    "org/gated": {"config.json": b"{}", "model.safetensors": b"ask first"},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with serve(REPOS) as server:
        yield server


@pytest.fixture
def resolve(server: ThreadingHTTPServer, tmp_path: Path):
    def call(model: str, **options: str) -> Path:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return hub.resolve(model, cache_dir=tmp_path / "cache", endpoint=endpoint, **options)

    return call


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_local_path_is_returned_as_it_is_and_the_hub_is_not_asked(resolve, tmp_path):
    (tmp_path / "org" / "plain").mkdir(parents=True)
    (tmp_path / "a.gguf").touch()
    assert resolve("org/plain") == Path("org/plain")
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    assert StandIn.asked == []


@pytest.mark.parametrize(
    "model",
    ["./org/plain", "/nowhere/model", "~/nowhere/model", "../org", "a/b/c", "model.gguf", "name", "",
     "folder/model.gguf", "folder/model.safetensors", "C:\\models\\llama", "org/plain/", "org/plain:"],
)  # fmt: skip
def test_what_looks_like_a_path_never_goes_to_the_hub(model, resolve):
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(model)
    assert StandIn.asked == []


def test_a_name_below_a_local_folder_is_a_path_unless_it_says_hf(resolve, tmp_path):
    (tmp_path / "org").mkdir()
    with pytest.raises(
        UserError, match="org/plain: nothing of this name in the folder org; write hf:org/plain"
    ):
        resolve("org/plain")
    assert StandIn.asked == []
    assert (resolve("hf:org/plain") / "config.json").exists()


def test_a_hub_id_brings_the_weights_once_and_what_describes_them(resolve):
    wanted = REPOS["org/plain"].items()
    assert files_below(resolve("org/plain")) == {
        name: data for name, data in wanted if name.startswith(("model", "config", "tok", "chat"))
    }


def test_the_only_gguf_file_is_taken(resolve):
    path = resolve("org/one-gguf")
    assert path.name == "m-Q8_0.gguf"
    assert files_below(path.parent) == {"m-Q8_0.gguf": b"GGUF eight"}


@pytest.mark.parametrize("tag", ["Q4_K_M", "q4_k_m", "m-Q4_K_M.gguf"])
def test_a_gguf_file_is_found_by_type_or_name(tag, resolve):
    assert resolve(f"org/many-gguf:{tag}").read_bytes() == b"GGUF four"


def test_all_shards_of_a_gguf_file_are_brought(resolve):
    path = resolve("org/many-gguf:Q8_0")
    assert path.name == "m-Q8_0-00001-of-00002.gguf"
    assert set(files_below(path.parent)) == {"m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"}


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (
            "org/many-gguf",
            "several GGUF files match it; choose one of org/many-gguf:m-Q4_K_M.gguf, .*Q8_0-00001",
        ),
        ("org/many-gguf:Q4_K", "no GGUF file matches Q4_K; choose one of org/many-gguf:m-Q4_K_M.gguf, "),
        ("org/many-gguf:Q2_K", "no GGUF file matches Q2_K; choose one of"),
        ("org/pickle", "org/pickle: the repository has no safetensors or GGUF files"),
        ("org/plain:Q8_0", "org/plain: the repository has no GGUF files"),
    ],
)
def test_a_repository_without_the_file_says_what_it_has(model, error, resolve):
    with pytest.raises(UserError, match=error):
        resolve(model)


def test_a_repository_that_does_not_exist_is_neither_path_nor_repository(resolve, monkeypatch):
    with pytest.raises(
        UserError, match=r"org/nothing: neither a local path nor a public repository .* HF_TOKEN"
    ):
        resolve("org/nothing")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        UserError, match=r"org/nothing: neither a local path nor a repository .* check the spelling"
    ):
        resolve("org/nothing")


def test_a_private_repository_opens_with_the_token(resolve, monkeypatch):
    with pytest.raises(UserError, match=r"org/private: neither .* set HF_TOKEN"):
        resolve("org/private")
    with pytest.raises(UserError, match=r"org/private: neither .* set HF_TOKEN"):
        resolve("org/private", token="hf_wrong")
    assert "config.json" in files_below(resolve("org/private", token=TOKEN))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "model.safetensors" in files_below(resolve("org/private"))


def test_a_gated_repository_says_where_to_ask(resolve):
    with pytest.raises(
        UserError, match=r"org/gated: access is restricted; ask for it at http.*/org/gated, .*HF_TOKEN"
    ):
        resolve("org/gated")
    assert (resolve("org/gated", token=TOKEN) / "model.safetensors").read_bytes() == b"ask first"


def test_an_unknown_revision_is_named(resolve):
    with pytest.raises(UserError, match="org/plain: the repository has no revision 'v9'"):
        resolve("org/plain", revision="v9")


def test_a_hub_that_cannot_be_reached_is_said_so(server, resolve):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"org/plain: cannot download it from the hub .*local folder"
    ) as error:
        resolve("org/plain")
    assert "\n" not in str(error.value)


def test_the_cache_serves_when_the_hub_cannot_be_reached(server, resolve):
    folder, file = resolve("org/plain"), resolve("org/many-gguf:Q4_K_M")
    server.shutdown()
    server.server_close()
    assert resolve("org/plain") == folder
    assert resolve("org/many-gguf:Q4_K_M") == file


@pytest.mark.skipif(huggingface_hub.__version__.startswith("0."), reason="reads HF_HUB_OFFLINE only once")
def test_offline_mode_is_named(resolve, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/plain: cannot download .*HF_HUB_OFFLINE"):
        resolve("org/plain")
    assert StandIn.asked == []
