"""tilewise as an attention implementation of transformers, on tiny models with random weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import masking_utils

import tilewise as tw
import tilewise.torch
from tilewise.transformers import _attention, _masks, _patterns, as_attention_mask, attention_mask

B, N = 3, 13
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 7}
SEQ2SEQ: dict[str, Any] = {
    **{name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id")},
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    "tie_word_embeddings": False,
}

# Model, configuration, and how many times a forward pass computes attention.
FAMILIES: dict[str, tuple[Any, Callable[[], Any], int]] = {
    "BERT": (hf.BertModel, lambda: hf.BertConfig(**SMALL), 2),
    "ModernBERT": (
        hf.ModernBertModel,
        lambda: hf.ModernBertConfig(
            **SMALL,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=6,
            layer_types=LOCAL["layer_types"],
        ),
        2,
    ),
    "ViT": (
        hf.ViTModel,
        lambda: hf.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=64,
            image_size=20,
            patch_size=5,
        ),
        2,
    ),
    "GPT-2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            vocab_size=97,
            n_embd=48,
            n_layer=2,
            n_head=6,
            n_positions=64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        2,
    ),
    "Llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED), 2),
    "Qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**GROUPED), 2),
    "Mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**GROUPED, sliding_window=5), 2),
    "Gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **GROUPED, **LOCAL, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
        ),
        2,
    ),
    "Gemma3": (
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(**GROUPED, **LOCAL, query_pre_attn_scalar=8),
        2,
    ),
    "gpt-oss": (
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(
            **GROUPED, **LOCAL, **EXPERTS, rope_parameters={"rope_type": "default"}
        ),
        2,
    ),
    "Llama4": (
        hf.Llama4ForCausalLM,
        lambda: hf.Llama4TextConfig(
            **GROUPED,
            **EXPERTS,
            attention_chunk_size=5,
            intermediate_size_mlp=64,
            layer_types=["chunked_attention", "full_attention"],
        ),
        2,
    ),
    "DeepSeek-V3": (
        hf.DeepseekV3ForCausalLM,
        lambda: hf.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 6},
            **LATENT,
            v_head_dim=5,
            moe_intermediate_size=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        2,
    ),
    "BART": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=None),
        5,
    ),
    "Whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **SEQ2SEQ,
            num_mel_bins=7,
            max_source_positions=11,
            max_target_positions=64,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        ),
        5,
    ),
    "T5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=97,
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=6,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        6,
    ),
}
DECODERS = ["Llama", "Mistral", "Gemma2", "Gemma3", "gpt-oss", "Llama4", "DeepSeek-V3", "GPT-2"]


def model(family: str, implementation: str, **changes: Any) -> Any:
    """A model whose weights make attention matter; the same ones for each implementation."""
    kind, configure, _ = FAMILIES[family]
    configuration = configure()
    for name, value in vars(configuration).items():
        if "dropout" in name and isinstance(value, float):
            setattr(configuration, name, 0.0)
    for name, value in changes.items():
        setattr(configuration, name, value)
    torch.manual_seed(1)
    made = kind._from_config(configuration, attn_implementation=implementation)
    for name, weight in made.named_parameters():
        if weight.ndim > 1 and any(part in name for part in ("proj", "query", "key", "c_attn")):
            weight.data.mul_(4)
    return made.train()


def both(family: str, **changes: Any) -> tuple[Any, Any]:
    return model(family, "eager", **changes), model(family, "tilewise", **changes)


def tokens(*shape: int, seed: int = 3) -> Any:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> Any:
    """Which tokens of a batch are real, `(B, N)`."""
    mask = torch.ones(B, N, dtype=torch.int64)
    for row, count in ((1, 4), (2, 1)):
        if side == "left":
            mask[row, :count] = 0
        elif side == "right":
            mask[row, N - count :] = 0
    return mask


def inputs(family: str, side: str) -> tuple[dict[str, Any], Any]:
    """Arguments of a forward pass, and which of its outputs count."""
    noise = torch.Generator().manual_seed(4)
    if family == "ViT":
        return {"pixel_values": torch.randn(B, 3, 20, 20, generator=noise)}, torch.ones(B, 17)
    given = {"input_ids": tokens(B, N), "attention_mask": padded(side)}
    if family == "Whisper":
        given = {"input_features": torch.randn(B, 7, 22, generator=noise)}
    if family in ("BART", "T5", "Whisper"):
        return {**given, "decoder_input_ids": tokens(B, 7, seed=5)}, torch.ones(B, 7)
    return given, padded(side)


def output(made: Any, **given: Any) -> Any:
    result = made(**given)
    return result.logits if "logits" in result else result.last_hidden_state


def close(got: Any, want: Any) -> bool:
    """Whether two results agree to 1e-5 of the largest entry."""
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks of the calls of attention, as they come."""
    seen: list[Any] = []
    attention = tilewise.torch.attention

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(options["mask"])
        return attention(*arguments, **options)

    monkeypatch.setattr(tilewise.torch, "attention", counted)
    return seen


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_eager(family: str, side: str, calls: list[Any]) -> None:
    results = []
    for made in both(family):
        given, counts = inputs(family, side)
        o = output(made, **given) * counts[..., None]
        (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(6))).sum().backward()
        grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        results.append((o.detach(), grads))
    (want, want_grads), (got, got_grads) = results
    assert len(calls) == FAMILIES[family][2]
    assert not any(mask is not None and mask.dtype != torch.int32 for mask in calls)
    assert close(got, want)
    assert got_grads.keys() == want_grads.keys()
    scale = max(grad.abs().max() for grad in want_grads.values())
    for name, grad in want_grads.items():
        assert (got_grads[name] - grad).abs().max() <= 1e-5 * scale, name


def generated(made: Any, given: dict[str, Any], **options: Any) -> Any:
    made.eval().generation_config.eos_token_id = None
    more = {"max_new_tokens": 11, "do_sample": False, "return_dict_in_generate": True}
    return made.generate(**given, **more, output_logits=True, **options)


GENERATIONS = [
    *((family, "dynamic", "left") for family in (*DECODERS, "BART", "T5")),
    *((family, "static", "left") for family in ("Llama", "Gemma3", "gpt-oss")),
    *((family, "dynamic", "right") for family in ("Llama", "Gemma2")),
    ("Llama", "none", "left"),
    ("Whisper", "dynamic", "none"),
]


@pytest.mark.parametrize(("family", "cache", "side"), GENERATIONS, ids=str)
def test_greedy_generation_is_that_of_eager(family: str, cache: str, side: str) -> None:
    given, _ = inputs(family, side)
    given.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"use_cache": False} if cache == "none" else {}
    if cache == "static":
        options["cache_implementation"] = "static"
    want, got = (generated(made, given, **options) for made in both(family))
    assert torch.equal(got.sequences, want.sequences)
    assert close(torch.stack(got.logits), torch.stack(want.logits))


def test_cached_steps_and_chunks_are_those_of_one_pass() -> None:
    made, ids = model("Gemma3", "tilewise").eval(), tokens(2, N)
    whole = made(ids).logits
    cache, parts = hf.DynamicCache(config=made.config), []
    for part in ids.split([7, 4, 1, 1], dim=1):
        parts.append(made(part, past_key_values=cache).logits)
    assert close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Llama4"])
def test_packed_sequences_do_not_see_each_other(family: str) -> None:
    eager, made = both(family)
    ids = tokens(2, N)
    positions = torch.tensor([[*range(5), *range(4), *range(4)], [*range(8), *range(5)]])
    got = made(ids, position_ids=positions, use_cache=False).logits
    assert close(got, eager(ids, position_ids=positions, use_cache=False).logits)
    assert close(got[:1, 5:9], eager(ids[:1, 5:9]).logits)


CUSTOM = (torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(7)) > 0.4) | torch.eye(
    N, dtype=torch.bool
)
LOWEST = torch.finfo(torch.float32).min


def test_four_dimensional_masks_of_a_user() -> None:
    eager, made = both("Llama")
    ids = tokens(2, N)
    hiding = torch.zeros(CUSTOM.shape).masked_fill(~CUSTOM, LOWEST)
    want = eager(ids, attention_mask=hiding).logits
    for mask in (CUSTOM, hiding, hiding.masked_fill(~CUSTOM, -math.inf)):
        assert close(made(ids, attention_mask=mask).logits, want)
    bias = hiding + torch.randn(CUSTOM.shape, generator=torch.Generator().manual_seed(8))
    want = eager(ids, attention_mask=bias).logits
    assert close(made(ids, attention_mask=bias).logits, want)
    with torch.inference_mode():
        assert close(made(ids, attention_mask=CUSTOM.clone()).logits, eager(ids, hiding).logits)


def test_gradient_of_a_mask() -> None:
    grads = []
    for made in both("Llama"):
        bias = torch.randn(2, 1, N, N, generator=torch.Generator().manual_seed(8))
        bias.requires_grad_()
        made(tokens(2, N), attention_mask=bias).logits.square().sum().backward()
        grads.append(bias.grad)
    assert close(grads[1], grads[0])


def test_mask_of_tilewise_goes_to_a_model() -> None:
    eager, made = both("Llama")
    ids = tokens(2, N)
    mask = tw.causal() & (tw.window(3, 0) | tw.sink_tokens(2))
    hiding = torch.where(torch.from_numpy(mask.to_bool(1, 1, N, N)), 0.0, LOWEST)
    given = as_attention_mask(mask, 2, N)
    assert given.shape == (1, 1, N, 4)
    want = eager(ids, attention_mask=hiding.expand(2, 1, N, N)).logits
    assert close(made(ids, attention_mask=given).logits, want)
    many = tw.dense(CUSTOM.numpy())
    got = made(ids, attention_mask=as_attention_mask(many, 2, N)).logits
    assert torch.equal(got, made(ids, attention_mask=CUSTOM).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Gemma2", "BERT"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    plain = model(family, "tilewise")
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given, counts = inputs(family, "right")
    for made in (plain, saving):
        (output(made, **given) * counts[..., None]).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_dropout_is_for_training_and_follows_the_seed() -> None:
    made = model("BERT", "tilewise", attention_probs_dropout_prob=0.5)
    ids = tokens(2, N)
    first, second = output(made, input_ids=ids), output(made, input_ids=ids)
    torch.manual_seed(0)
    third = output(made, input_ids=ids)
    torch.manual_seed(0)
    assert torch.equal(output(made, input_ids=ids), third)
    assert not torch.equal(first, second)
    made.eval()
    assert close(output(made, input_ids=ids), output(model("BERT", "eager"), input_ids=ids))


def test_bfloat16_agrees_to_its_rounding() -> None:
    eager, made = (each.bfloat16() for each in both("gpt-oss"))
    ids = tokens(2, N)
    want, got = eager(ids).logits.float(), made(ids).logits.float()
    assert (got - want).abs().max() <= 0.05 * want.abs().max()


# Where a graph ends, the compiler looks at the gradients of what it hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_model_gives_the_same() -> None:
    torch._dynamo.reset()
    eager, made = both("Llama", num_hidden_layers=1)
    given, counts = inputs("Llama", "left")
    compiled = torch.compile(made, backend="eager")
    got = output(compiled, **given) * counts[..., None]
    got.square().sum().backward()
    want = output(eager, **given) * counts[..., None]
    want.square().sum().backward()
    assert close(got, want)
    assert close(made.lm_head.weight.grad, eager.lm_head.weight.grad)
    # A mask that is made beforehand leaves nothing outside the graph.
    whole = torch.compile(made.eval(), backend="eager", fullgraph=True)
    mask = as_attention_mask(tw.causal(), B, N)
    ids = given["input_ids"]
    with torch.no_grad():
        assert close(whole(ids, attention_mask=mask).logits, eager(ids).logits)


def test_mask_is_made_once_for_all_layers(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = []
    lower = tw.Mask.lower
    monkeypatch.setattr(tw.Mask, "lower", lambda *a, **k: lowered.append(a) or lower(*a, **k))
    made = model("Llama", "tilewise", num_hidden_layers=5)
    made(tokens(B, N), attention_mask=padded("left"))
    assert len(lowered) == 1
    assert len({id(mask) for mask in calls}) == 1
    made(tokens(2, N), attention_mask=CUSTOM.clone())
    assert len(lowered) == 2
    assert len({id(mask) for mask in calls[5:]}) == 1


def test_dense_mask_that_changes_in_place_is_read_again() -> None:
    made, mask = model("Llama", "tilewise"), CUSTOM.clone()
    first = made(tokens(2, N), attention_mask=mask).logits
    mask[:, :, :, 0] = False
    mask[:, :, 0, 0] = True
    second = made(tokens(2, N), attention_mask=mask).logits
    assert not torch.equal(first, second)
    assert torch.equal(made(tokens(2, N), attention_mask=mask.clone()).logits, second)


# Mask functions of transformers, as the models nest them.
TOKENS = torch.ones(2, 40, dtype=torch.bool)
TOKENS[0, :4] = TOKENS[1, 9:11] = False
PACKED = torch.arange(40).expand(2, 40) // torch.tensor([[7], [11]])
POSITIONS = torch.arange(40).expand(2, 40) % torch.tensor([[7], [11]])
BLOCKS = torch.where(POSITIONS > 4, PACKED, -1)
MU = masking_utils
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "causal": lambda: MU.causal_mask_function,
    "bidirectional": lambda: MU.bidirectional_mask_function,
    "window": lambda: MU.sliding_window_causal_mask_function(5),
    "window of both sides": lambda: MU.sliding_window_bidirectional_mask_function(3),
    "chunks": lambda: MU.chunked_causal_mask_function(5, torch.tensor([0, 3])),
    "packed": lambda: MU.packed_sequence_compatibility_function(
        MU.sliding_window_causal_mask_function(5), POSITIONS, PACKED
    ),
    "packed chunks": lambda: MU.packed_sequence_compatibility_function(
        MU.chunked_causal_mask_function(5, torch.tensor([0, 0])), POSITIONS, PACKED
    ),
    "blocks": lambda: MU.or_masks(MU.causal_mask_function, MU.blockwise_overlay(BLOCKS)),
    "unknown": lambda: lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0) | (k < 3),
    "unknown inside": lambda: MU.and_masks(
        MU.causal_mask_function, lambda b, h, q, k: (k > 2) | (q < 5)
    ),
}
GRIDS = {
    "whole": {"q_length": 23, "kv_length": 23},
    "step": {"q_length": 1, "kv_length": 23, "q_offset": 22},
    "static cache": {"q_length": 3, "kv_length": 29, "q_offset": torch.tensor(17)},
    "cut cache": {"q_length": 5, "kv_length": 11, "q_offset": 19, "kv_offset": 13},
    "few keys": {"q_length": 4, "kv_length": 4},
}


# transformers packs whole sequences only.
PLACED = [
    (name, grid)
    for name in FUNCTIONS
    for grid in GRIDS
    if grid in ("whole", "few keys") or not name.startswith("packed")
]


def as_booleans(mask: Any, kv_length: int) -> Any:
    if mask.dtype == torch.bool:
        return mask
    rows = tw.base.masks.RowIntervals(mask.numpy())
    return torch.from_numpy(rows.to_bool(mask.shape[2], kv_length))


@pytest.fixture(params=["recognised", "evaluated"])
def recognition(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "evaluated":
        monkeypatch.setattr(_patterns, "_trusted", lambda name: False)
        monkeypatch.setattr(_masks, "BOOL_BLOCK_BYTES", 200)
    return str(request.param)


@pytest.mark.parametrize("seen", [None, TOKENS], ids=["all tokens", "padding"])
@pytest.mark.parametrize(("name", "grid"), PLACED, ids=str)
def test_intervals_mean_what_the_mask_function_says(
    name: str, grid: str, seen: Any, recognition: str
) -> None:
    given: dict[str, Any] = {
        "batch_size": 2,
        "mask_function": FUNCTIONS[name](),
        "attention_mask": seen if seen is None else seen[:, :21],
        **GRIDS[grid],
    }
    got = attention_mask(**given)
    want = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    Nk = given["kv_length"]
    assert torch.equal(as_booleans(got, Nk).expand(want.shape), want)
    if grid == "few keys" or name == "unknown":
        return
    assert got.dtype == torch.int32
    assert got.shape[1:] == (1, given["q_length"], 4)


def test_every_mask_function_of_this_version_is_recognised() -> None:
    assert all(map(_patterns._trusted, _patterns._READERS))
    assert _patterns._remaps()


def test_function_whose_meaning_differs_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(cells: Any, grid: Any) -> Any:
        return _patterns.Band(None, grid.shift)

    assert not _patterns._agree(
        lambda: other({}, _patterns._WHOLE), MU.causal_mask_function, _patterns._WHOLE
    )


def test_mask_that_a_model_will_edit_is_dense() -> None:
    mask = attention_mask(
        batch_size=2,
        q_length=7,
        kv_length=7,
        mask_function=MU.causal_mask_function,
        allow_is_causal_skip=False,
    )
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 7, 7)


def test_versions_that_give_cache_positions() -> None:
    given = {"batch_size": 2, "kv_length": 9, "mask_function": MU.causal_mask_function}
    got = attention_mask(**given, cache_position=torch.arange(5, 8), allow_is_causal_skip=False)
    want = attention_mask(**given, q_length=3, q_offset=5)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_attentions": True}, "probabilities are never stored"),
        ({"head_mask": torch.ones(6)}, "heads cannot be masked"),
        ({"cache": object()}, "paged caches"),
        ({"indices": torch.zeros(1)}, "selected keys"),
    ],
)
def test_what_tilewise_has_no_equal_for_is_refused(given: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 2, 5, 3)
    with pytest.raises(tw.Unsupported, match=message):
        _attention.attention_forward(torch.nn.Module(), q, q, q, None, **given)


def test_masks_of_other_kinds_are_refused() -> None:
    q = torch.zeros(1, 2, 5, 3)

    def forward(mask: Any) -> None:
        _attention.attention_forward(torch.nn.Module(), q, q, q, mask)

    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got str"):
        forward("causal")
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        forward(torch.ones(1, 1, 5, 5, dtype=torch.int64))
    with pytest.raises(tw.Unsupported, match="the model edited its mask"):
        forward(torch.ones(1, 1, 5, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="mask rows"):
        forward(torch.tensor([0, 6, 0, 0], dtype=torch.int32).expand(1, 1, 5, 4))


def test_padding_alone_is_refused_where_the_layer_hides_the_future_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_attention, "MAKES_MASKS", False)
    layer = torch.nn.Module()
    layer.is_causal = True
    q, mask = torch.zeros(1, 2, 5, 3), torch.zeros(1, 1, 1, 5)
    with pytest.raises(tw.Unsupported, match="does not hide the future"):
        _attention.attention_forward(layer, q, q, q, mask)
    layer.is_causal = False
    _attention.attention_forward(layer, q, q, q, mask)


def test_model_without_the_attention_interface_is_refused() -> None:
    configuration = hf.BloomConfig(vocab_size=97, hidden_size=48, n_layer=1, n_head=6)
    made = hf.BloomModel._from_config(configuration, attn_implementation="tilewise")
    with pytest.raises(tw.Unsupported, match="BloomConfig: the model does not use the attention"):
        made(tokens(1, N))


def test_learned_queries_of_batch_one_serve_every_batch() -> None:
    noise = torch.Generator().manual_seed(11)
    q, k = torch.randn(1, 2, 5, 3, generator=noise), torch.randn(4, 2, 7, 3, generator=noise)
    got, _ = _attention.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(got.transpose(1, 2), want)


@pytest.mark.parametrize("length", [1, 5])
def test_layer_without_a_mask_is_causal_where_it_says_so(length: int) -> None:
    layer = torch.nn.Module()
    q = torch.randn(1, 2, length, 3, generator=torch.Generator().manual_seed(9))
    k = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(10))

    def forward(**given: Any) -> Any:
        return _attention.attention_forward(layer, q, k, k, None, **given)[0].transpose(1, 2)

    def reference(mask: Any) -> Any:
        return tilewise.torch.attention(q, k, k, mask=mask)

    causal = tw.causal(align="top_left") if length > 1 else None
    assert torch.equal(forward(), reference(causal))
    layer.is_causal = False
    assert torch.equal(forward(), reference(None))
    assert torch.equal(forward(is_causal=True), reference(causal))
    local = None if length == 1 else causal & tw.window(1, 0)
    assert torch.equal(forward(is_causal=True, sliding_window=2), reference(local))


def test_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert blocks
