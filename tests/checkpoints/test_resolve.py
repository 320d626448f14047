"""From names to paths: local paths, aliases, and the hub's real client on a cache folder of the test."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from tokenmill.checkpoints import resolve
from tokenmill.checkpoints.demo_models import DEMO_MODELS
from tokenmill.checkpoints.resolve import resolve_model, resolve_tokenizer
from tokenmill.errors import InvalidParameterError, ModelNotFoundError


def test_existing_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_file = tmp_path / "some.gguf"
    gguf_file.write_bytes(b"")
    directory = tmp_path / "organization" / "name"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert resolve_model(gguf_file) == gguf_file
    assert resolve_model(str(directory)) == directory
    monkeypatch.chdir(tmp_path)
    assert resolve_model("organization/name", revision="main") == Path("organization/name")  # before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/some.gguf") == gguf_file


def test_a_directory_with_one_gguf_file_stands_for_it(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve_model(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "b.gguf").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "nothing",
        "./no/such",
        "/no/such/model.gguf",
        "~nobody-of-that-name/x",
        "a" * 5000,
        "nul\0byte",
        "a/b/c",
    ],
)
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no file or directory here, no alias and no hub id") as caught:
        resolve_model(name)
    assert caught.value.field == "model"
    assert "smollm2:135m" in (caught.value.remedy or "")


def test_a_missing_path_is_never_looked_up_on_the_hub() -> None:
    with pytest.raises(ModelNotFoundError, match="no file or directory"):
        resolve_model(Path("organization/name"))


def test_a_mistyped_alias_is_suggested() -> None:
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'smollm2:135m'\?"):
        resolve_model("smolm2:135m")


def test_an_alias_is_fetched_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(resolve, "fetch_demo_model", lambda *args, **kwargs: asked.append((*args, kwargs)) or tmp_path)
    assert resolve_model("gemma3:270m", show_progress=False) == tmp_path
    assert asked == [(DEMO_MODELS["gemma3:270m"], tmp_path, {"show_progress": False})]
    with pytest.raises(InvalidParameterError) as caught:
        resolve_model("gemma3:270m", revision="main")
    assert caught.value.field == "revision"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which is told to stay offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cache_repository(hub_cache: Path, repo: str, *files: str) -> Path:
    folder = hub_cache / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_bytes(b"x")
    return snapshot


def test_cached_repositories_are_found_offline(hub_cache: Path) -> None:
    snapshot = cache_repository(hub_cache, "organization/full", "config.json", "model.safetensors", "x.gguf")
    assert resolve_model("organization/full") == snapshot
    assert resolve_model("organization/full", show_progress=False, revision="main") == snapshot
    assert resolve_model("organization/full:x.gguf") == snapshot / "x.gguf"
    snapshot = cache_repository(hub_cache, "organization/one", "README.md", "one.Q8_0.gguf")
    assert resolve_model("organization/one") == snapshot / "one.Q8_0.gguf"


def test_the_tokenizer_of_a_repository_needs_no_weights(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = huggingface_hub.snapshot_download

    def noted(*arguments: Any, **options: Any) -> str:
        asked.extend(options["allow_patterns"])
        return real(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    snapshot = cache_repository(hub_cache, "organization/tokens", "tokenizer.json", "tokenizer_config.json")
    assert resolve_tokenizer("organization/tokens") == snapshot
    cache_repository(hub_cache, "organization/full", "config.json", "model.safetensors", "tokenizer.json")
    resolve_tokenizer("organization/full", revision="main", show_progress=False)
    assert not any(fnmatch(file, pattern) for file in ("model.safetensors", "x.gguf") for pattern in asked)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_tokenizer("organization/nothing")
    assert caught.value.field == "tokenizer"


def test_a_tokenizer_may_be_a_path_or_in_a_gguf_file(hub_cache: Path, tmp_path: Path) -> None:
    assert resolve_tokenizer(tmp_path) == resolve_tokenizer(str(tmp_path)) == tmp_path
    snapshot = cache_repository(hub_cache, "organization/one", "README.md", "one.Q8_0.gguf")
    assert resolve_tokenizer("organization/one") == resolve_tokenizer("organization/one:one.Q8_0.gguf")
    assert resolve_tokenizer("organization/one") == snapshot / "one.Q8_0.gguf"
    with pytest.raises(ModelNotFoundError, match="no file or directory here") as caught:
        resolve_tokenizer(tmp_path / "none")
    assert caught.value.field == "tokenizer"


def test_offline_and_not_cached(hub_cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="not in the local cache and the hub cannot be reached") as caught:
        resolve_model("organization/name", revision="v1")
    assert "'organization/name' at revision 'v1'" in str(caught.value)
    assert caught.value.field == "model"
    with pytest.raises(ModelNotFoundError, match="Did you mean 'smollm2:135m'"):
        resolve_model("smollm2/135m")
    with pytest.raises(ModelNotFoundError, match=r"Cannot fetch 'a\.\./b'.*Repo id"):
        resolve_model("a../b")


def test_a_file_that_the_repository_lacks(hub_cache: Path) -> None:
    cache_repository(hub_cache, "organization/one", "one.gguf")
    with pytest.raises(ModelNotFoundError, match=r"'organization/one' cannot be used: it has no file 'two\.gguf'"):
        resolve_model("organization/one:two.gguf")


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        (["pytorch_model.bin"], "no weights as safetensors or GGUF"),
        (["b.gguf", "a.gguf"], r"2 GGUF files: a\.gguf, b\.gguf.*Name one, as 'organization/some:a\.gguf'"),
    ],
)
def test_repositories_without_one_obvious_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: list[str], text: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in listed])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    with pytest.raises(ModelNotFoundError, match=text):
        resolve_model("organization/some")


def test_the_one_gguf_file_of_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in ("README.md", "only.gguf")])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert resolve_model("organization/some") == tmp_path / "only.gguf"
    assert "*.safetensors" in asked[0]
    assert "*.gguf" not in asked[0]  # a repository of twenty quantizations is not fetched whole
    assert asked[1] == ["only.gguf"]


def _response(status: int) -> object:
    http = __import__(hub_errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])  # the client's HTTP library
    return http.Response(status, request=http.Request("GET", "https://hub.test"))


@pytest.mark.parametrize(
    ("error_class", "text"),
    [
        ("GatedRepoError", "access to it is gated.*log in"),
        ("RevisionNotFoundError", "there is no such revision"),
        ("RepositoryNotFoundError", "no such repository, or it is private"),
        ("HfHubHTTPError", "Cannot fetch 'organization/name' from the Hugging Face hub: it broke"),
    ],
)
def test_refusals_of_the_hub_are_told(monkeypatch: pytest.MonkeyPatch, error_class: str, text: str) -> None:
    error = getattr(hub_errors, error_class)("it broke\nin the middle", response=_response(500))

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match=text) as caught:
        resolve_model("organization/name")
    assert caught.value.field == "model"
    assert caught.value.remedy


def test_errors_of_the_http_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    transport_error = hub_errors.HfHubHTTPError.__bases__[0]

    def fail(*_: object, **__: object) -> str:
        raise transport_error("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match="connection reset"):
        resolve_model("organization/name")
