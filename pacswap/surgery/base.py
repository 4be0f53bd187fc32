"""What an upgraded model remembers of the network that it was made from: a digest per tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pacswap.fingerprint import digests

BASE = "_pacswap_base_digests"


def base_of(model: nn.Module) -> dict[str, str] | None:
    """The digests of the network that was upgraded, by `state_dict` keys; None if not known.

    It is not known of a model that was made on the meta device.
    """
    found = vars(model).get(BASE)
    return None if found is None else dict(found)


def remember_base(model: nn.Module, known: Mapping[str, str] | None) -> None:
    """Say what the base of an upgraded model was."""
    vars(model)[BASE] = None if known is None else dict(known)


def retake_base(model: nn.Module, added: set[str]) -> None:
    """Note that the model's tensors but for the added ones are the base now."""
    state = {name: value for name, value in model.state_dict().items() if name not in added}
    remember_base(model, digests(state))
