"""Finding the class, the names of the weights, and the number of parameters, for every architecture."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.models.test_logits import CASES, TOLERANCE
from tests.support.tiny_models import (
    CPU,
    TINY_SIZES,
    all_logits,
    build_model,
    parameter_count,
    random_tokens,
    relative_error,
    sequences_for,
    tiny_hf_model,
    unstacked,
)
from tokenmill.attention.select import select_backend
from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.models import SUPPORTED_MODEL_TYPES, ModelConfig, load_model_class
from tokenmill.models.base import CausalLM


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, CausalLM]:
    """(transformers model, our model before its weights are loaded)."""
    model_type, changes = CASES[request.param]
    hf_model = tiny_hf_model(model_type, **changes)
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    context = LayerContext(dtype=torch.float32, device=CPU, backend=select_backend("auto", CPU))
    return hf_model, load_model_class(config.model_type)(config, context)


def test_number_of_parameters(case: tuple[Any, CausalLM]) -> None:
    hf_model, model = case
    assert model.config.num_parameters() == parameter_count(hf_model)
    assert model.config.num_parameters() == parameter_count(model)


def test_weight_names_and_shapes_are_those_of_transformers(case: tuple[Any, CausalLM]) -> None:
    hf_model, model = case
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in unstacked(model, hf_model.state_dict()).items()
        if not any(pattern.fullmatch(name) for pattern in model.ignored_weights)
    }
    assert {name: target.shape for name, target in weight_targets(model).items()} == expected


def test_weight_targets_cover_every_parameter(case: tuple[Any, CausalLM]) -> None:
    """Filling all targets leaves no number of any parameter untouched."""
    _, model = case
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for target in weight_targets(model).values():
        target.load(torch.zeros(target.shape))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_every_supported_type_has_a_class(model_type: str) -> None:
    assert issubclass(load_model_class(model_type), CausalLM)


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, tokenmill.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_tied_head_in_the_checkpoint_is_ignored_and_an_own_one_is_not() -> None:
    tied = build_model(*config_and_weights("llama", tie_word_embeddings=True))
    assert any(pattern.fullmatch("lm_head.weight") for pattern in tied.ignored_weights)
    untied = build_model(*config_and_weights("llama", tie_word_embeddings=False))
    assert not any(pattern.fullmatch("lm_head.weight") for pattern in untied.ignored_weights)


def config_and_weights(model_type: str, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    hf_model = tiny_hf_model(model_type, **changes)
    return hf_model.config.to_dict(), hf_model.state_dict()


def test_language_model_of_a_multimodal_checkpoint() -> None:
    """Gemma 3 with its image tower left out, under both prefixes that checkpoints use."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    hf_config = Gemma3Config(
        text_config={**TINY_SIZES, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_hidden_layers": 4, "pad_token_id": 0},
        vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip
    torch.manual_seed(0)
    hf_model = Gemma3ForConditionalGeneration(hf_config).eval()
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.normal_(0.0, 0.2)
    token_ids = random_tokens(20, vocab_size=50)
    with torch.no_grad():
        expected = hf_model(input_ids=torch.tensor([token_ids])).logits[0]
    new_names = hf_model.state_dict()
    assert any(name.startswith("model.language_model.layers.0") for name in new_names)
    old_names = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal_projector", "multi_modal_projector"): tensor
        for name, tensor in new_names.items()
    }
    for state_dict in (new_names, old_names):
        model = build_model(hf_config.to_dict(), state_dict)
        actual = all_logits(model, sequences_for(model), [("a", token_ids)])
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_bfloat16_stays_near_float32(model_type: str) -> None:
    hf_config, state_dict = config_and_weights(model_type)
    token_ids = random_tokens(30)
    exact = build_model(hf_config, state_dict)
    expected = all_logits(exact, sequences_for(exact), [("a", token_ids)])
    model = build_model(hf_config, state_dict, dtype=torch.bfloat16)
    actual = all_logits(model, sequences_for(model, dtype=torch.bfloat16), [("a", token_ids)])
    assert relative_error(actual, expected) < 0.05


def test_reference_attention_gives_the_same_logits() -> None:
    hf_config, state_dict = config_and_weights("gemma3_text", sliding_window=6)
    token_ids = random_tokens(25)
    results = []
    for attn_backend in ("cpu", "reference"):
        model = build_model(hf_config, state_dict, attn_backend=attn_backend)
        results.append(all_logits(model, sequences_for(model), [("a", token_ids)]))
    assert relative_error(results[0], results[1]) < 1e-5


@pytest.mark.spec("H3")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """A neighbour full of NaN changes nothing, neither now nor through blocks that it leaves behind."""
    model = build_model(*config_and_weights("llama"))
    token_ids = random_tokens(20)
    alone = sequences_for(model)
    expected = [
        all_logits(model, alone, [("a", token_ids[:19])])[-1],
        all_logits(model, alone, [("a", token_ids[19:])])[0],
    ]
    together = sequences_for(model)
    both = all_logits(model, together, [("a", token_ids[:19]), ("bad", token_ids[:7])])
    for keys, values in together.caches:
        for cache in (keys, values):
            own_blocks = torch.unique(together.step([("a", 0)]).block_tables)
            poisoned = torch.ones(len(cache), dtype=torch.bool)
            poisoned[own_blocks.long()] = False
            cache[poisoned] = torch.nan
    step = all_logits(model, together, [("a", token_ids[19:]), ("bad", [3])])
    assert step[1].isnan().all()
    assert relative_error(both[18], expected[0]) < 1e-5
    assert relative_error(step[0], expected[1]) < 1e-5


def test_finalize_frees_plain_weights_and_may_be_repeated() -> None:
    hf_config, state_dict = config_and_weights("llama", tie_word_embeddings=True)
    model = build_model(hf_config, state_dict)
    config = model.config
    token_ids = random_tokens(9)
    before = all_logits(model, sequences_for(model), [("a", token_ids)])
    finalize_weights(model)
    after = all_logits(model, sequences_for(model), [("a", token_ids)])
    assert torch.equal(before, after)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    if parameter_count(model) != config.num_parameters():  # where weights are packed
        assert parameter_count(model) == config.vocab_size * config.hidden_size + norms


def test_no_rows_to_sample() -> None:
    model = build_model(*config_and_weights("llama"))
    with torch.inference_mode():
        assert model.compute_logits(torch.empty(0, model.config.hidden_size)).shape == (0, model.config.vocab_size)
