"""LoRA: low-rank updates of the weights of linear layers, which are trained in place of these weights.

`peft` puts an update beside a layer. The layer then computes W x + (alpha / rank) B A x, where W is fixed, A (rank,
inputs) is random and B (outputs, rank) begins as 0 (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022). Dropout of updates is not offered: activations are computed again in the backward pass, and a resumed run
equals one that was not stopped, so nothing may depend on the state of a random generator.

Checkpoints hold the encoder with the updates added to its weights, under the names that every encoder has, and the
updates beside it, as `lora.LAYER.lora_A.weight` and `lora.LAYER.lora_B.weight`.

Legend: R rank; I inputs and O outputs of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from slim.config import LoraSettings
from slim.model.hiera import Hiera

PREFIX = "lora."  # of updates in a checkpoint
_A, _B = ".lora_A.weight", ".lora_B.weight"
_UPDATE = re.compile(r"encoder\.(.+\.lora_[AB])\.default\.weight")  # in a model of `peft`
_FIXED = ".base_layer."


def inject(encoder: Hiera, lora: LoraSettings, freeze: int) -> None:
    """Put updates beside the layers of an encoder above `freeze` stages, and fix all its other parameters.

    A is drawn with the caller's generator.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in layers(encoder, lora, freeze)]
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names), encoder)


def layers(encoder: Hiera, lora: LoraSettings, freeze: int) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that get an update, by name: the targets in the blocks above the first `freeze` stages."""
    for number in range(encoder.ends[freeze - 1] if freeze else 0, encoder.n):
        for target in lora.targets:
            name = f"blocks.{number}.{f'attn.{target}' if target in ('qkv', 'proj') else target}"
            layer = encoder.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            yield name, layer


def shapes(encoder: Hiera, lora: LoraSettings, freeze: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all updates of an encoder."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in layers(encoder, lora, freeze):
        found |= {f"{name}{_A}": (lora.rank, layer.in_features), f"{name}{_B}": (layer.out_features, lora.rank)}
    return found


@torch.no_grad()
def merged(tensors: Mapping[str, Tensor], lora: LoraSettings) -> dict[str, Tensor]:
    """The parameters of a model in training, as a checkpoint holds them.

    Parameters
    ----------
    tensors : mapping
        Whole parameters of an `Answerer` with updates, by name.
    lora : LoraSettings

    Returns
    -------
    dict
        The parameters by the names of a model without updates, with the updates added; and the updates.
    """
    updates = {f"{found[1]}.weight": value for name, value in tensors.items() if (found := _UPDATE.fullmatch(name))}
    plain = {name.replace(_FIXED, "."): value for name, value in tensors.items() if not _UPDATE.fullmatch(name)}
    weights = {name.removeprefix("encoder."): value for name, value in plain.items() if name.startswith("encoder.")}
    whole = {f"encoder.{name}": value for name, value in added(weights, updates, lora).items()}
    return plain | whole | {f"{PREFIX}{name}": value for name, value in updates.items()}


def added(weights: Mapping[str, Tensor], updates: Mapping[str, Tensor], lora: LoraSettings) -> dict[str, Tensor]:
    """The weights of an encoder with updates added, by name; `updates` are named LAYER.lora_A.weight and so on."""
    found = dict(weights)
    for name, a_RI in updates.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            update_OI = updates[f"{layer}{_B}"] @ a_RI * (lora.alpha / lora.rank)
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + update_OI
    return found
