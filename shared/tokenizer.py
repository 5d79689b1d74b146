"""The Llama tokenizer of published MobileVLM folders, and what makes two of them the same."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from shared.errors import CheckpointError
from shared.readable import check_readable, is_file
from shared.spec import canonical_digest

PROBES = (
    "USER: ",
    "\nWhat is in the picture? ASSISTANT: A boat.</s>USER: And  where?",
    "  two  spaces, \u00e9\u4e2d\U0001f600 1234.5\n\n",
)
"Texts whose ids tell two tokenizers of one vocabulary apart (spaces, after `</s>`, bytes, digits)."


@runtime_checkable  # tests check annotations while running
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this project uses."""

    if TYPE_CHECKING:  # made by `__getattr__`: from Python 3.12 on a check at run time misses them
        bos_token_id: int
        eos_token_id: int
    all_special_tokens: list[str]
    backend_tokenizer: Any

    def __call__(self, text: str) -> Any: ...
    def __len__(self) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...
    def decode(self, ids: Any, *, skip_special_tokens: bool) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's sentencepiece tokenizer with the original code's behaviour.

    `legacy=True`: transformers 5 splits text after `</s>` differently from the slow tokenizer that
    MobileVLM was trained with, unless told so. And sentencepiece puts a space before every text;
    transformers 5 leaves it out where one stands there already, which is another token.

    Raises:
        CheckpointError: no tokenizer.model, one that cannot be read, or not a Llama tokenizer.
    """
    from tokenizers.normalizers import Prepend, Replace, Sequence
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    if not is_file(folder / "tokenizer.model", CheckpointError):
        raise CheckpointError(f"{folder}: no tokenizer.model; expected a MobileVLM or Llama folder")
    check_readable(folder / "tokenizer.model", CheckpointError)  # transformers asks for tiktoken
    try:
        tokenizer: Tokenizer = LlamaTokenizer.from_pretrained(
            # No limit here: it would only warn of long texts, which the spec's max_tokens refuses.
            str(folder), legacy=True, model_max_length=VERY_LARGE_INTEGER,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: tokenizer cannot be read ({error})") from error
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        raise CheckpointError(
            f"{folder}: tokenizer adds no BOS token; is tokenizer_config.json there?"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError(f"{folder}: tokenizer.model holds no vocabulary")
    backend = tokenizer.backend_tokenizer
    space = "\u2581"  # as sentencepiece writes it
    backend.normalizer = Sequence([Prepend(space), Replace(" ", space)])
    backend.pre_tokenizer = None
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Special tokens that no template writes may lie beyond it: prompts refuse their text.

    Raises:
        CheckpointError: names the id and the model's vocabulary.
    """
    written = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    token, largest = max(
        (
            (token, number)
            for token, number in tokenizer.get_vocab().items()
            if token not in tokenizer.all_special_tokens or number in written
        ),
        key=lambda pair: pair[1],
    )
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer gives id {largest} (for {token!r}), but vocab_size "
            f"is {vocab_size}; take the tokenizer.model that the model was trained with"
        )


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """Digests of the vocabulary and of its behaviour on `PROBES`: equal iff ids will be equal."""
    return {
        "vocab_size": len(tokenizer),
        "vocab_sha256": canonical_digest(tokenizer.get_vocab()),
        "behaviour_sha256": canonical_digest([tokenizer(text).input_ids for text in PROBES]),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
