"""tilewise as an attention implementation of Hugging Face transformers.

Importing this module registers `"tilewise"` with transformers::

    import tilewise.transformers

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tilewise")
"""

from __future__ import annotations

from importlib import import_module

from ._attention import MAKES_MASKS, attention_forward
from ._cache import contiguous_cache
from ._loss import FusedLoss, fused_loss
from ._masks import as_attention_mask, attention_mask

__all__ = [
    "IMPLEMENTATION",
    "FusedLoss",
    "as_attention_mask",
    "attention_forward",
    "attention_mask",
    "contiguous_cache",
    "fused_loss",
    "register",
]

IMPLEMENTATION = "tilewise"
"""The name under which transformers knows tilewise."""


def register() -> None:
    """Register tilewise with transformers; importing this module does it.

    Raises:
        ImportError: transformers is missing, or older than 4.50.
    """
    try:
        modelling = import_module("transformers.modeling_utils")
        functions = modelling.ALL_ATTENTION_FUNCTIONS
    except (ImportError, AttributeError) as error:
        raise ImportError("tilewise.transformers needs transformers 4.50 or later") from error
    if isinstance(functions, dict):  # before 4.51
        functions[IMPLEMENTATION] = attention_forward
        return
    modelling.AttentionInterface.register(IMPLEMENTATION, attention_forward)
    if MAKES_MASKS:
        masking = import_module("transformers.masking_utils")
        # A mask is data: torch.compile leaves the graph for it once per forward pass.
        outside = import_module("torch").compiler.disable(attention_mask)
        masking.AttentionMaskInterface.register(IMPLEMENTATION, outside)


register()
