"""Text as token ids: integers, of which 0 fills a record up to the common length. The only importer of
tokenizers.

A tokenizer is learned from public text alone, or brought along: a public constant like any other. It is a
byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of the text in lower case, so that no text is
unknown to it, and the same texts give the same bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privkd.config import DataConfig
from privkd.data.dataset import Array
from privkd.errors import ConfigError, one_line

PADDING = 0
"""The id that fills a record up to the common length, and stands for nothing."""
TOKENIZER_FILE = "tokenizer.json"

_VOCABULARY = 2000
_MOST_BY_DEFAULT = 64
_MOST_BYTES = 64 << 20
_SHARE = 0.95
_AT_ONCE = 1024
_PADDING_NAME = "[PAD]"
_PADDING_NAMES = frozenset({_PADDING_NAME, "<pad>", "<PAD>", "<|pad|>", "[pad]", "<|endoftext|>"})
_FEWEST = 3


@dataclass(frozen=True)
class Tokens:
    """How records become token ids: the same for everybody.

    Attributes:
        vocabulary: ids are of ``0 .. vocabulary - 1``.
        length: of each record in ids; what is longer is cut.
        tokenizer: contents of a ``tokenizer.json``, which cuts and pads to ``length`` too; ``None`` where
            records are ids as they come, of which those that are too large become ``vocabulary - 1``, the
            unknown token.
    """

    vocabulary: int
    length: int
    tokenizer: str | None = None

    def ids(self, raw: Array) -> Tensor:
        """Ids int64 ``[record, length]`` of texts ``[record]``, or of ids ``[record, any length]``."""
        found = np.zeros((len(raw), self.length), dtype=np.int64)
        if self.tokenizer is None:
            kept = raw[:, : self.length]
            unknown = self.vocabulary - 1
            found[:, : kept.shape[1]] = np.where(kept > unknown, unknown, kept)
            return torch.from_numpy(found)
        for start in range(0, len(raw), _AT_ONCE):
            texts = raw[start : start + _AT_ONCE].tolist()
            for row, encoding in enumerate(self._parsed.encode_batch(texts), start):
                found[row] = encoding.ids
        return torch.from_numpy(np.minimum(found, self.vocabulary - 1))

    @cached_property
    def _parsed(self) -> Any:
        return _cut_to(_parsed(self.tokenizer or "", TOKENIZER_FILE), self.length)

    @property
    def digest(self) -> str | None:
        """SHA-256 of the tokenizer's file in hexadecimal; ``None`` without one."""
        return None if self.tokenizer is None else hashlib.sha256(self.tokenizer.encode()).hexdigest()


def tokens_of_texts(public: Sequence[str], config: DataConfig) -> tuple[Tokens, str]:
    """The tokens of a data set of text, and how they were found, in words.

    Args:
        public: the text of the public records alone.
        config: ``tokenizer``, ``vocabulary`` and ``length``.

    Raises:
        ConfigError: the tokenizer that is brought along cannot be read, or its id 0 is no padding; or
            tokenizers is not installed.
    """
    if config.tokenizer is not None:
        tokenizer, how = _brought(config.tokenizer), f"by {config.tokenizer.name}"
    else:
        tokenizer = _learned(public, config.vocabulary or _VOCABULARY)
        how = "by a byte-level BPE learned from the public text"
    size = 1 + max(tokenizer.get_vocab().values())
    length = config.length or _usual_length(tokenizer, public)
    said = f"token ids of {size}, {how}; the first {length} of each text"
    return Tokens(size, length, _cut_to(tokenizer, length).to_str()), said


def tokens_of_ids(public: Sequence[Array], config: DataConfig) -> tuple[Tokens, str]:
    """The tokens of a data set of whole numbers that are ids, and how they were found, in words.

    Args:
        public: ids ``[record, position]`` of the public records alone.
        config: ``vocabulary`` and ``length``.
    """
    largest = max((int(part.max()) for part in public if part.size), default=0)
    vocabulary = config.vocabulary or largest + 2
    length = config.length or max(part.shape[1] for part in public)
    where = "as set" if config.vocabulary else f"by the largest of the public records, {largest}"
    said = f"token ids of {vocabulary} {where}; larger ones become {vocabulary - 1}; {length} a record"
    return Tokens(vocabulary, length), said


def check_tokenizer(text: str, length: int, name: str) -> None:
    """Do nothing where ``text`` is a tokenizer whose ids depend on a text alone.

    Raises:
        ConfigError: it is none, or draws at random.
    """
    try:
        _cut_to(_parsed(text, name), length).encode("a text")
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise ConfigError(f"{name}: fails on a text ({one_line(error)})") from error


def _cut_to(tokenizer: Any, length: int) -> Any:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, pad_token=_PADDING_NAME, length=length)
    return tokenizer


def _tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("text needs tokenizers; run: pip install 'privkd[text]'") from error
    return tokenizers


def _parsed(text: str, name: str) -> Any:
    try:
        found = _tokenizers().Tokenizer.from_str(text)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise ConfigError(f"{name}: not a readable tokenizer ({one_line(error)})") from error
    if getattr(found.model, "dropout", None):
        raise ConfigError(
            f"{name}: it draws tokens at random (dropout), which no run can repeat; turn it off"
        )
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True  # a text that spells one is no padding
    return found


def _brought(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"data.tokenizer={path}: larger than {_MOST_BYTES >> 20} MiB; give a smaller one"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={path}: not readable ({one_line(error)})") from error
    found = _parsed(text, f"data.tokenizer={path}")
    first = found.id_to_token(PADDING)
    if first not in _PADDING_NAMES:
        raise ConfigError(
            f"data.tokenizer={path}: its id 0 is {first!r}, and 0 pads records here; bring one whose id 0 is "
            f"{_PADDING_NAME}, or leave it out to have one learned from the public text"
        )
    return found


def _learned(texts: Sequence[str], size: int) -> Any:
    library = _tokenizers()
    found = library.Tokenizer(library.models.BPE())
    steps = (library.normalizers.NFKC(), library.normalizers.Lowercase())
    found.normalizer = library.normalizers.Sequence(list(steps))
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    found.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[_PADDING_NAME],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found


def _usual_length(tokenizer: Any, texts: Sequence[str]) -> int:
    """That which most of ``texts`` do not exceed, up to a limit."""
    lengths = [
        len(encoding.ids)
        for start in range(0, len(texts), _AT_ONCE)
        for encoding in tokenizer.encode_batch(texts[start : start + _AT_ONCE])
    ]
    usual = int(np.quantile(lengths, _SHARE, method="higher")) if lengths else _FEWEST
    return min(max(usual, _FEWEST), _MOST_BY_DEFAULT)
