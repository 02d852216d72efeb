"""The cache for transformers, on tiny models with random weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

import tilewise as tw
from tilewise.transformers import contiguous_cache
from tilewise.transformers._cache import Room

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
PROMPT = torch.tensor([[0, 0, 5, 6, 7, 9, 11], [3, 4, 5, 6, 7, 8, 9]])
NEW = 24


def model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "Llama":
        made = hf.LlamaForCausalLM._from_config(
            hf.LlamaConfig(**SMALL), attn_implementation="tilewise"
        )
    else:
        config = hf.Gemma3TextConfig(**SMALL, **LOCAL)
        made = hf.Gemma3ForCausalLM._from_config(config, attn_implementation="tilewise")
    return made.eval()


def generated(model: Any, prompt: Any, cache: Any, **how: Any) -> Any:
    return model.generate(
        prompt,
        attention_mask=(prompt != 0).long(),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        past_key_values=cache,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
@pytest.mark.parametrize(
    ("rows", "how"),
    [(2, {}), (2, {"num_beams": 3}), (1, {"prompt_lookup_num_tokens": 3})],
    ids=["greedy", "beams", "speculative"],
)
def test_generate_gives_the_bits_of_the_usual_cache(
    name: str, rows: int, how: dict[str, Any]
) -> None:
    it, prompt = model(name), PROMPT[-rows:]
    usual = generated(it, prompt, hf.DynamicCache(config=it.config), **how)
    for cache in (contiguous_cache(it.config), contiguous_cache(max_length=16)):
        found = generated(it, prompt, cache, **how)
        assert found.past_key_values is cache
        assert torch.equal(found.sequences, usual.sequences)
        assert torch.equal(torch.stack(found.scores), torch.stack(usual.scores))


def test_a_prompt_is_kept_for_several_continuations() -> None:
    it = model("Gemma3")
    prompt = contiguous_cache(it.config)
    with torch.no_grad():
        it(PROMPT[1:, :5], past_key_values=prompt)
    for last in ([8, 9], [10, 11, 12]):
        tokens = torch.cat((PROMPT[1:, :5], torch.tensor([last])), 1)
        found = generated(it, tokens, copy.deepcopy(prompt))
        usual = generated(it, tokens, hf.DynamicCache(config=it.config))
        assert torch.equal(found.sequences, usual.sequences)


def test_layers_with_a_window_keep_the_window_alone() -> None:
    it = model("Gemma3")
    cache = contiguous_cache(it.config, max_length=40)
    generated(it, PROMPT, cache)
    sliding, full = cache.layers
    assert sliding.keys.shape[2] == LOCAL["sliding_window"] - 1
    assert sliding.rooms[0]._buffer.shape[2] <= 2 * PROMPT.shape[1]
    assert full.keys.shape[2] == PROMPT.shape[1] + NEW - 1
    assert full.rooms[0]._buffer.shape[2] == 40


def test_tokens_are_appended_in_place() -> None:
    layer = contiguous_cache(max_length=20).layer_class_to_replicate()
    keys, values = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 4)
    first, _ = layer.update(keys, values)
    for _ in range(3):
        held, other = layer.update(keys, values)
        assert held.data_ptr() == first.data_ptr()
    assert torch.equal(held, keys.repeat(1, 1, 4, 1))
    assert torch.equal(other, values.repeat(1, 1, 4, 1))
    held, _ = layer.update(keys, values)  # the room is used up
    assert held.data_ptr() != first.data_ptr()
    assert torch.equal(held, keys.repeat(1, 1, 5, 1))


def test_rows_that_were_taken_back_are_written_over() -> None:
    layer = contiguous_cache(max_length=20).layer_class_to_replicate()
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    layer.update(keys, keys)
    layer.crop(-2)
    held, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert held.flatten().tolist() == [0, 1, 2, 3, 0]
    layer.reorder_cache(torch.tensor([0]))
    held, _ = layer.update(keys[:, :, 5:], keys[:, :, 5:])
    assert held.flatten().tolist() == [0, 1, 2, 3, 0, 5]
    layer.batch_repeat_interleave(2)
    held, _ = layer.update(keys[:, :, :1].repeat(2, 1, 1, 1), keys[:, :, :1].repeat(2, 1, 1, 1))
    assert held[1].flatten().tolist() == [0, 1, 2, 3, 0, 5, 0]
    layer.reset()
    held, _ = layer.update(keys, keys)
    assert torch.equal(held, keys)


def test_a_copy_does_not_write_into_the_original() -> None:
    layer = contiguous_cache(max_length=20).layer_class_to_replicate()
    keys = torch.randn(1, 2, 3, 5)
    layer.update(keys, keys)
    other = copy.deepcopy(layer)
    mine, _ = layer.update(keys, keys)
    theirs, _ = other.update(2 * keys, 2 * keys)
    assert torch.equal(mine, torch.cat((keys, keys), 2))
    assert torch.equal(theirs, torch.cat((keys, 2 * keys), 2))


def test_gradients_are_refused_with_the_reason() -> None:
    keys = torch.randn(1, 2, 3, 5, requires_grad=True)
    text = "contiguous_cache: keys and values are written in place, so they have no gradients"
    with pytest.raises(tw.Unsupported, match=text):
        Room(0).extended(torch.tensor([]), keys)
    with torch.no_grad():
        assert not Room(0).extended(torch.tensor([]), keys).requires_grad


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous_cache: max_length must be at least 0, got -1"):
        contiguous_cache(max_length=-1)


@pytest.mark.parametrize("value", [2.5, True, None])
def test_a_length_is_an_integer(value: Any) -> None:
    text = f"contiguous_cache: max_length must be an integer, got {type(value).__name__}"
    with pytest.raises(TypeError, match=text):
        contiguous_cache(max_length=value)
