"""Encoders from folders in Hugging Face's layout. The only importer of transformers.

``config.json`` says which of the library's own architectures it is, and ``model.safetensors`` holds the
weights. Nothing is downloaded, no code of the folder's is run, and no pickle is read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from privkd.errors import ConfigError, ModelError, one_line
from privkd.models.inputs import InputType

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PIXELS = "preprocessor_config.json"
PAD = 0
"""The token that fills a record up; see `privkd.data`."""


class TextFeatures(nn.Module):
    """Token numbers ``[record, length]``, `PAD` after their end, to the mean of the last hidden states.

    A number that the vocabulary does not have counts as padding.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        tokens = torch.where((tokens >= 0) & (tokens < self.vocabulary), tokens, PAD)
        mask = tokens != PAD
        hidden: Tensor = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class ImageFeatures(nn.Module):
    """Pixels in [0, 1] ``[record, channel, height, width]`` to the mean of the last hidden states.

    They are standardised first by ``mean`` and ``std`` of each channel, as the encoder was trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        hidden: Tensor = self.model(pixel_values=(images - self.mean) / self.std).last_hidden_state
        return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(2).mean(2)


def files_in(folder: Path) -> list[Path]:
    """The files of an encoder in ``folder``.

    Raises:
        ModelError: it is no folder, or one is missing; the message names the cure.
    """
    _check_files(folder)
    return sorted(path for pattern in ("*.json", "*.safetensors") for path in folder.glob(pattern))


def load_folder(folder: Path, inputs: InputType) -> nn.Module:
    """The encoder in ``folder``, for such ``inputs``.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: a file is missing or damaged, weights are missing or of another shape, or the encoder does
            not take such records; the message names the folder and the cure.
    """
    files_in(folder)
    settings = _json(folder / CONFIG)
    if settings.get("is_encoder_decoder"):
        raise ModelError(f"encoder {folder} is an encoder and a decoder: save its encoder by itself")
    _check_layers(folder, settings)
    with _quiet() as transformers:
        try:
            model, found = transformers.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:  # The library raises almost anything on a damaged folder.
            raise ModelError(f"encoder {folder}: transformers cannot load it: {one_line(error)}") from error
    _check_complete(folder, found)
    kind = getattr(model, "main_input_name", "")
    if kind == "input_ids":
        return _text(folder, model, inputs)
    if kind == "pixel_values":
        return _images(folder, model, inputs)
    raise ModelError(f"encoder {folder} takes {kind or 'no known input'}: expected one of tokens or images")


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"encoder {str(folder)!r}: no such folder; expected one with {CONFIG} and {_WEIGHTS[0]}, or "
            "package.module:function"
        )
    if not (folder / CONFIG).is_file():
        raise ModelError(f"encoder {folder}: no {CONFIG} in it; save the whole model by save_pretrained")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = "its weights are pickled, which may run anything" if pickled else "no weights in it"
        raise ModelError(f"encoder {folder}: {why}; save them as {_WEIGHTS[0]} by save_pretrained")


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds a {type(tree).__name__}, not settings by name")
    return tree


def _check_layers(folder: Path, settings: dict[str, Any]) -> None:
    """Layers without weights are refused before any is made."""
    tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors += len(file.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} holds no weights: {one_line(error)}") from error
    for name, value in settings.items():
        if "layers" in name and isinstance(value, int) and value > tensors:
            raise ModelError(
                f"encoder {folder}: {CONFIG} asks for {name}={value}, more than there are weights"
            )


@contextmanager
def _quiet() -> Iterator[Any]:
    """The library, without its reports and progress bars."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            f"an encoder's folder needs transformers ({one_line(error)}); run: pip install 'privkd[hub]'"
        ) from error
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_complete(folder: Path, found: dict[str, Any]) -> None:
    """The library would draw at random what the file lacks; the pooler alone is never looked at."""
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    strange = sorted(str(name) for name in found["mismatched_keys"])
    if missing or strange:
        what = f"lacks {missing[0]}" if missing else f"has another shape of {strange[0]}"
        count = len(missing) + len(strange) - 1
        raise ModelError(
            f"encoder {folder}: {_WEIGHTS[0]} {what}{f' and {count} more' if count else ''}, which {CONFIG} "
            "asks for: save both by save_pretrained"
        )


def _text(folder: Path, model: Any, inputs: InputType) -> nn.Module:
    settings = model.config
    if inputs.dtype.is_floating_point or len(inputs.shape) != 1:
        raise ModelError(f"encoder {folder} takes texts as tokens, and these records are none: see --text")
    pad = getattr(settings, "pad_token_id", None)
    if pad not in (None, PAD):
        raise ModelError(f"encoder {folder} fills records up with token {pad}; here it is {PAD}")
    most = getattr(settings, "max_position_embeddings", None) or inputs.shape[0]
    if inputs.shape[0] > most:
        raise ModelError(
            f"encoder {folder} takes records of at most {most} tokens, but these have {inputs.shape[0]}: "
            "set data.length"
        )
    return TextFeatures(model, int(settings.vocab_size))


def _images(folder: Path, model: Any, inputs: InputType) -> nn.Module:
    channels = int(getattr(model.config, "num_channels", 3))
    if len(inputs.shape) != 3 or inputs.shape[0] != channels:
        raise ModelError(
            f"encoder {folder} takes images of {channels} channels, but the records have {list(inputs.shape)}"
        )
    settings = _json(folder / _PIXELS) if (folder / _PIXELS).is_file() else {}
    mean, std = (
        _by_channel(folder, settings.get(name, fallback), channels)
        for name, fallback in (("image_mean", 0.0), ("image_std", 1.0))
    )
    return ImageFeatures(model, mean, std)


def _by_channel(folder: Path, given: Any, channels: int) -> list[float]:
    try:
        values = [float(value) for value in (given if isinstance(given, list) else [given] * channels)]
    except (TypeError, ValueError):
        values = []
    if len(values) != channels:
        raise ModelError(f"{folder / _PIXELS}: {given!r} is no number for each of {channels} channels")
    return values
