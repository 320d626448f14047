"""Makes a `Tokenizer` from what a checkpoint brings: a Hugging Face directory, a GGUF file, or a ready object.

`load_tokenizer` reads files with the `tokenizers` library alone; transformers, which costs seconds at start, is
imported only for tokenizers that have no `tokenizer.json`. Called by `LLM`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, processors

from tokenmill.checkpoints.gguf_reader import GgufFile
from tokenmill.errors import CheckpointError, InvalidParameterError, UnsupportedFeatureError
from tokenmill.tokenization.backends import TokenizerBackend, TokenizersBackend, TransformersBackend
from tokenmill.tokenization.end_of_turn import end_of_turn_candidates, end_of_turn_ids
from tokenmill.tokenization.gguf_tokenizer import tokenizer_from_gguf_metadata
from tokenmill.tokenization.tokenizer import SpecialTokens, Tokenizer

_REMEDY = "Give a directory with tokenizer.json, or a .gguf file, in `tokenizer`."
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CLASSES_WITH_FLAGS = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "CohereTokenizer",
    "CohereTokenizerFast",
)
# What reading a foreign checkpoint with transformers raises.
_TRANSFORMERS_ERRORS = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError)


def load_tokenizer(path: Path, *, mode: Literal["auto", "slow"] = "auto") -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: a Hugging Face directory, its `tokenizer.json`, or a `.gguf` file.
        mode: `slow` loads a directory through transformers.

    Raises:
        CheckpointError: files are missing or damaged.
        UnsupportedFeatureError: a kind of tokenizer that this version cannot load.
    """
    path = Path(path)
    if mode not in ("auto", "slow"):
        raise InvalidParameterError(f"tokenizer_mode must be 'auto' or 'slow', got {mode!r}.", field="tokenizer_mode")
    if not path.exists():
        raise CheckpointError(f"There is no tokenizer at {path}.", field="tokenizer", remedy=_REMEDY)
    if path.suffix == ".gguf":
        return _load_gguf(path, mode)
    directory = path.parent if path.name == "tokenizer.json" else path
    if not directory.is_dir():
        raise CheckpointError(f"{path} is not a tokenizer.", field="tokenizer", remedy=_REMEDY)
    if mode == "slow" or not (directory / "tokenizer.json").exists():
        return _load_with_transformers(directory)
    return _load_directory(directory)


def wrap_tokenizer(tokenizer: object) -> Tokenizer:
    """`tokenizer` as a `Tokenizer`: one already, a path, or a tokenizer object of the transformers library.

    Raises:
        InvalidParameterError: it is something else.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        return load_tokenizer(Path(tokenizer))
    needed = ("encode", "decode", "convert_ids_to_tokens", "convert_tokens_to_ids", "all_special_ids")
    if not all(hasattr(tokenizer, name) for name in needed):
        raise InvalidParameterError(
            f"A {type(tokenizer).__name__} is not a tokenizer.",
            field="tokenizer",
            remedy="Give a path, or a tokenizer object of the transformers library.",
        )
    return _from_transformers(tokenizer, {})


def _load_gguf(path: Path, mode: str) -> Tokenizer:
    if mode == "slow":
        raise UnsupportedFeatureError(
            "tokenizer_mode='slow' is for Hugging Face directories; transformers does not rebuild the tokenizers of "
            "GGUF files exactly.",
            field="tokenizer_mode",
            remedy="Use 'auto', or pass a directory in `tokenizer`.",
        )
    return tokenizer_from_gguf_metadata(GgufFile(path).metadata)


def _load_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise _damaged(file, str(error)) from None
    config = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    _add_declared_tokens(tokenizer, config, directory)
    names = _special_names(config)
    _set_post_processor(tokenizer, config, names)
    backend = TokenizersBackend(tokenizer)
    templates = _read_chat_templates(directory, config)
    return Tokenizer(backend, _special_tokens(backend, names, templates, _declared_ends(directory)), templates)


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens with a role by name, such as `bos_token`; a token is written as text or as a dict with its flags."""
    extra = config.get("extra_special_tokens")
    candidates = {**config, **(extra if isinstance(extra, dict) else {})}
    names: dict[str, str] = {}
    for name, value in candidates.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            names[name] = content
    return names


def _special_tokens(
    backend: TokenizerBackend, names: Mapping[str, str], templates: Mapping[str, str], declared_ends: list[int]
) -> SpecialTokens:
    ids = {name: backend.token_to_id(token) for name, token in names.items()}
    eos_id = ids.get("eos_token")
    candidates = {token: backend.token_to_id(token) for token in end_of_turn_candidates()}
    return SpecialTokens(
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=end_of_turn_ids(
            ([] if eos_id is None else [eos_id]) + declared_ends,
            templates.values(),
            {token: token_id for token, token_id in candidates.items() if token_id is not None},
            backend.special_ids,
        ),
        pad_token_id=ids.get("pad_token"),
        unk_token_id=ids.get("unk_token"),
        names=names,
    )


def _declared_ends(directory: Path) -> list[int]:
    """End tokens of generation_config.json, else of config.json: one id or a list of them."""
    for file in ("generation_config.json", "config.json"):
        ends = _read_json(directory / file).get("eos_token_id")
        if ends is not None:
            return [int(token_id) for token_id in (ends if isinstance(ends, list) else [ends])]
    return []


def _add_declared_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Add what `added_tokens_decoder` and the special tokens declare and tokenizer.json lacks, as transformers does."""
    present = tokenizer.get_added_tokens_decoder()
    declared = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted((int(token_id), entry) for token_id, entry in declared.items()):
        flags = {flag: bool(entry[flag]) for flag in _ADDED_TOKEN_FLAGS if flag in entry}
        existing = present.get(token_id)
        is_same = existing is not None and existing.content == entry["content"]
        if is_same and all(getattr(existing, flag) == value for flag, value in flags.items()):
            continue
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])
        if tokenizer.token_to_id(entry["content"]) != token_id:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'} gives the token {entry['content']!r} the id {token_id}, "
                f"tokenizer.json {tokenizer.token_to_id(entry['content'])}.",
                field="tokenizer",
                remedy="The two files are not of the same model; download them again.",
            )
    missing = [token for token in _special_names(config).values() if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])


def _set_post_processor(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Put the start and end token around texts as the flags of tokenizer_config.json say, where they count.

    The post-processor of tokenizer.json counts. Only the classes below read the flags when most checkpoints that carry
    them were published (transformers 4; version 5 writes no flags any more), and some of those files rely on it: they
    have `add_bos_token: true` and a tokenizer.json that adds nothing.
    """
    if config.get("tokenizer_class") not in _CLASSES_WITH_FLAGS:
        return
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = names.get("bos_token") if config.get("add_bos_token", True) else None
    eos = names.get("eos_token") if config.get("add_eos_token", False) else None
    used = dict.fromkeys(token for token in (bos, eos) if token is not None)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
    )


def _read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files win over the key in tokenizer_config.json, which is a text or a list of named texts."""
    templates: dict[str, str] = {}
    legacy = _read_json(directory / "chat_template.json").get("chat_template")
    for value in (config.get("chat_template"), legacy):
        if isinstance(value, str):
            templates.setdefault("default", value)
        elif isinstance(value, list):
            for entry in value:
                templates.setdefault(entry["name"], entry["template"])
    file = directory / "chat_template.jinja"
    if file.exists():
        templates["default"] = file.read_text(encoding="utf-8")
    for named in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[named.stem] = named.read_text(encoding="utf-8")
    return templates


def _load_with_transformers(directory: Path) -> Tokenizer:
    # Late: transformers costs seconds at start.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except _TRANSFORMERS_ERRORS as error:
        raise CheckpointError(
            f"transformers cannot load a tokenizer from {directory}: {error}.", field="tokenizer", remedy=_REMEDY
        ) from None
    templates = _read_chat_templates(directory, _read_json(directory / "tokenizer_config.json"))
    return _from_transformers(tokenizer, templates, _declared_ends(directory))


def _from_transformers(tokenizer: Any, templates: dict[str, str], declared_ends: list[int] | None = None) -> Tokenizer:
    own = getattr(tokenizer, "chat_template", None)
    if not templates and own:
        templates = dict(own) if isinstance(own, dict) else {"default": own}
    backend = TransformersBackend(tokenizer)
    special = getattr(tokenizer, "special_tokens_map", {})
    names = {name: str(token) for name, token in special.items() if name.endswith("_token")}
    return Tokenizer(backend, _special_tokens(backend, names, templates, declared_ends or []), templates)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(content, dict):
        raise _damaged(file, "it holds no JSON object")
    return content


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {why}.", field="tokenizer", remedy="Download it again.")
