"""The loss modules, and the fused loss of Hugging Face models with random weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tilewise as tw
from tilewise.hardware import memory
from tilewise.torch import CrossEntropyLoss, LinearCrossEntropyLoss

T, C, V = 11, 7, 13
Y = torch.tensor([3, 1, -100, 12, 0, 5, 5, -100, 7, 2, 11])


def randn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Any, b: Any, limit: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def with_gradient(loss: Any, x: Any, *more: Any) -> tuple[Any, ...]:
    x = x.clone().requires_grad_()
    value = loss(x, *more)
    return value, *torch.autograd.grad(value.sum(), x)


# Modules


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (T,), (T, 3), (T, 2, 3)])
def test_cross_entropy_loss_is_pytorchs(reduction: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape[:1], V, *shape[1:])
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(V, shape, generator=generator)
    q = x.flip(0).softmax(1 if shape else 0)
    weight = torch.rand(V, generator=generator)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        for target, more in ((y, {"ignore_index": 3}), (q, {})):
            given = {"reduction": reduction, **options, **more}
            ours, theirs = CrossEntropyLoss(**given), nn.CrossEntropyLoss(**given)
            for a, b in zip(
                with_gradient(ours, x, target), with_gradient(theirs, x, target), strict=True
            ):
                close(a, b)


def test_cross_entropy_loss_has_options_of_its_own() -> None:
    x, loss = randn(T, V), CrossEntropyLoss(z_loss=0.1, softcap=2.0)
    want = tw.torch.cross_entropy(x, Y, z_loss=0.1, softcap=2.0)
    assert loss(x, Y).equal(want) and isinstance(loss, nn.CrossEntropyLoss)
    with pytest.warns(UserWarning, match="reduce args will be deprecated"):
        assert CrossEntropyLoss(reduce=False)(x, Y).shape == (T,)
    x, over = x.requires_grad_(), CrossEntropyLoss(inplace_backward=True)
    logits = x * 1
    (g,) = torch.autograd.grad(over(logits, Y), x)
    close(g, with_gradient(CrossEntropyLoss(), x.detach(), Y)[1])
    with torch.no_grad():
        close(logits, g)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss_is_linear_and_cross_entropy(reduction: str, bias: bool) -> None:
    weight = torch.rand(V, generator=torch.Generator().manual_seed(1))
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight}
    loss = LinearCrossEntropyLoss(C, V, bias=bias, **options)
    theirs = nn.CrossEntropyLoss(**options)
    x = randn(T, C)
    a = with_gradient(loss, x, Y)
    b = with_gradient(lambda x, y: theirs(loss.linear(x), y), x, Y)
    for ours, right in zip(a, b, strict=True):
        close(ours, right)
    assert set(dict(loss.named_parameters())) == {"linear.weight", *["linear.bias"] * bias}
    loss(x, Y).sum().backward()
    assert loss.linear.weight.grad.isfinite().all()
    assert "reduction=" in repr(loss)


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="PyTorch 2.13 is the first with such a module"
)
def test_linear_cross_entropy_loss_loads_pytorchs_parameters() -> None:
    theirs = nn.LinearCrossEntropyLoss(C, V, bias=True, weight=torch.rand(V), ignore_index=5)
    ours = LinearCrossEntropyLoss(C, V, bias=True, weight=torch.ones(V), ignore_index=5)
    ours.load_state_dict(theirs.state_dict())
    x, y = randn(T, C), Y.clamp(0)
    close(ours(x, y), theirs(x, y))


def test_linear_cross_entropy_loss_shifts_and_shares_weights() -> None:
    embedding = nn.Embedding(V, C)
    loss = LinearCrossEntropyLoss(C, V, shift=1, softcap=2.0, z_loss=0.1, token_chunk=3)
    loss.linear.weight = embedding.weight
    tokens = torch.arange(2 * 5).reshape(2, 5) % V
    h = embedding(tokens)
    want = tw.torch.linear_cross_entropy(
        h[:, :-1], embedding.weight, tokens[:, 1:], softcap=2.0, z_loss=0.1
    )
    close(loss(h, tokens), want)
    loss(h, tokens).backward()
    assert embedding.weight.grad.isfinite().all()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "several targets": ({"out_features": (2,)}, tw.Unsupported, "several targets a token"),
    "chunks of PyTorch": ({"options": object()}, tw.Unsupported, "use token_chunk"),
    "class weights": (
        {"weight": torch.ones(3)},
        ValueError,
        "weight must have shape (13,) (from num_classes), got (3,)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_module_says_what_it_does_not_serve(name: str) -> None:
    change, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(text)):
        LinearCrossEntropyLoss(C, V, **change)


# Hugging Face models

hf = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 48, "n_layer": 1, "n_head": 6, "n_positions": 64, "vocab_size": 97}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **IDS, **NO_DROPOUT)),
    "Gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=3.0)
    ),
    "Granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "Cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.3)),
    "ModernBERT": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2, decoder_bias=True)
    ),
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOKENS = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(2))
LABELS = TOKENS.clone()
LABELS[0, 4:7] = -100


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().train()


def gradients(model: Any, **given: Any) -> tuple[Any, dict[str, Any]]:
    """The output of a model and the gradients of its loss."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=LABELS, **given)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, grads


def made(logits: Any) -> bool:
    """Whether logits of a fused loss are there, after all."""
    return logits._made is not None


@pytest.fixture
def fused_loss() -> Callable[..., Any]:
    from tilewise.transformers import fused_loss

    return fused_loss


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_loss_is_the_models_own(name: str, fused_loss: Callable[..., Any]) -> None:
    model = model_of(name)
    for given in ({}, {"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 19}):
        want, right = gradients(model, **given)
        with fused_loss(model):
            out, grads = gradients(model, **given)
        assert not made(out.logits)
        close(out.loss, want.loss)
        assert grads.keys() == right.keys()
        for key, grad in grads.items():
            close(grad / right[key].abs().max(), right[key] / right[key].abs().max(), 1e-5)
        assert torch.equal(out.logits, want.logits) and made(out.logits)


def test_logits_are_there_wherever_they_are_read(fused_loss: Callable[..., Any]) -> None:
    model = model_of("Gemma2")
    want = model(input_ids=TOKENS, labels=LABELS).logits
    with fused_loss(model):
        logits = model(input_ids=TOKENS, labels=LABELS).logits
        assert logits.shape == want.shape and logits.dtype is want.dtype
        for f in (torch.argmax, torch.tanh, lambda x: x[:, -1], lambda x: x + 1, torch.relu):
            got = f(model(input_ids=TOKENS, labels=LABELS).logits)
            assert torch.equal(got, f(want))
        close(
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()),
            model(input_ids=TOKENS, labels=LABELS).loss,
        )
        assert isinstance(model(input_ids=TOKENS).logits, torch.Tensor)
        model.eval()
        out = model(input_ids=TOKENS, labels=LABELS)
        assert isinstance(out.logits, torch.Tensor)
        model.generate(TOKENS[:1], max_new_tokens=2, do_sample=False)


def test_a_model_that_changes_its_logits_gets_them(fused_loss: Callable[..., Any]) -> None:
    model = model_of("Llama")
    own = type(model).forward
    head = model.lm_head.forward

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            out = own(self, *args, **kwargs)
            logits = self.lm_head(out.hidden_states[-1]) if labels is not None else out.logits
            out.loss = self.loss_function(logits.sigmoid() - 1, labels, vocab_size=97)
            return out

    model.__class__ = Changed
    given = {"output_hidden_states": True}
    want, right = gradients(model, **given)
    with fused_loss(model):
        out, grads = gradients(model, **given)
    assert torch.equal(out.loss, want.loss)
    assert all(torch.equal(grads[key], right[key]) for key in right)
    assert model.lm_head.forward == head


def test_a_fused_loss_takes_options_and_is_undone(fused_loss: Callable[..., Any]) -> None:
    model = model_of("Llama")
    want, _ = gradients(model)
    handle = fused_loss(model, z_loss=0.5, label_smoothing=0.1, token_chunk=7)
    out, _ = gradients(model)
    assert out.loss > want.loss
    h = model.model(input_ids=TOKENS).last_hidden_state
    options = {"z_loss": 0.5, "label_smoothing": 0.1, "shift": 1}
    close(out.loss, tw.torch.linear_cross_entropy(h, model.lm_head.weight, LABELS, **options))
    handle.remove()
    again, _ = gradients(model)
    assert torch.equal(again.loss, want.loss) and isinstance(again.logits, torch.Tensor)
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_fused_loss_is_one_graph_with_the_model(
    name: str, fused_loss: Callable[..., Any]
) -> None:
    model = model_of(name)
    want, right = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fused_loss(model):
        model.zero_grad()
        out = compiled(input_ids=TOKENS, labels=LABELS)
        out.loss.backward()
        assert not made(out.logits)
    close(out.loss, want.loss)
    for key, p in model.named_parameters():
        close(p.grad / right[key].abs().max(), right[key] / right[key].abs().max(), 1e-5)
    assert torch.equal(compiled(input_ids=TOKENS, labels=LABELS).logits, want.logits)


def test_labels_that_are_shifted_already(fused_loss: Callable[..., Any]) -> None:
    model = model_of("Llama")
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[..., 1:]
    want, _ = gradients(model)
    with fused_loss(model):
        out, _ = gradients(model, shift_labels=shifted)
    close(out.loss, want.loss)


def test_a_fused_loss_needs_less_memory(fused_loss: Callable[..., Any]) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"vocab_size": 20_011})).train()
    tokens = torch.randint(3, 20_011, (17, 61))
    logits = 4 * 17 * 61 * 20_011

    def step() -> Any:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    step()  # the gradients are there from now on
    _, own = memory.measure(step, lambda _: 0)
    with fused_loss(model):
        step()
        _, fused = memory.measure(step, lambda _: 0)
    assert own.extra > 1.5 * logits
    assert fused.extra < 0.7 * logits


def test_other_models_and_losses_are_refused(fused_loss: Callable[..., Any]) -> None:
    model = model_of("Llama")
    with pytest.raises(TypeError, match=r"model must end in a torch\.nn\.Linear, got NoneType"):
        fused_loss(nn.Linear(3, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcap'"):
        fused_loss(model, softcap=1.0)
    with fused_loss(model), pytest.raises(tw.Unsupported, match="replaced the last layer"):
        fused_loss(model)
    other = copy.deepcopy(model)
    other.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(tw.Unsupported, match="the loss <lambda> of LlamaForCausalLM is not served"):
        fused_loss(other)
