"""One file per architecture, named after its Hugging Face `model_type`; `load_model_class` finds the class in it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from tokenmill.models.config import SUPPORTED_MODEL_TYPES, ModelConfig

if TYPE_CHECKING:
    from tokenmill.models.base import CausalLM

__all__ = ["SUPPORTED_MODEL_TYPES", "ModelConfig", "load_model_class"]

_FILES: Final = {"gemma3_text": "gemma3"}  # text-only Gemma 3 differs from the language model of Gemma 3 by name alone


def load_model_class(model_type: str) -> type[CausalLM]:
    """The class `...ForCausalLM` of a supported model type; imports torch and that one file."""
    assert model_type in SUPPORTED_MODEL_TYPES, f"'{model_type}' was not refused by ModelConfig.from_hf"
    module = importlib.import_module(f"tokenmill.models.{_FILES.get(model_type, model_type)}")
    model_class: type[CausalLM] = module.MODEL_CLASS
    return model_class
