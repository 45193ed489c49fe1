"""Where a block finds and leaves its state: transformers' cache, or a plain dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mambaquant_ext.model import MixerState


@dataclass(frozen=True, slots=True)
class StateDict:
    """The plainest cache: layer index to state. Stands in for a transformers Cache.

    Attributes:
        states: empty at the start of a sequence.
    """

    states: dict[int, MixerState]


def read_cache(
    cache: Any, layer_idx: int, conv_shape: tuple[int, ...], ssm_shape: tuple[int, ...]
) -> MixerState | None:
    """The state of earlier tokens, None at the start of a sequence.

    Raises:
        ValueError: the cache holds states of other shapes. A cache that was reset still holds them: copying into
            them would broadcast one sequence over the batch.
        NotImplementedError: a cache that records the past.
    """
    if isinstance(cache, StateDict):
        held = cache.states.get(layer_idx)
        is_past = held is not None
    else:
        layer = cache.layers[layer_idx]
        if layer.record_past:
            raise NotImplementedError(
                "QuantMambaBlock: expected a cache that does not record the past (no crop)"
            )
        conv, ssm = layer.conv_states[0], layer.recurrent_states[0]
        held = None if conv is None or ssm is None else MixerState(conv, ssm)
        is_past = layer.has_previous_state[0]
    if held is None:
        return None
    shapes = tuple(held.conv.shape), tuple(held.ssm.shape)
    if shapes != (conv_shape, ssm_shape):
        raise ValueError(
            f"QuantMambaBlock: expected cached states of shapes (batch, ...) {conv_shape} and {ssm_shape}, got "
            f"{shapes[0]} and {shapes[1]}; one cache serves one batch size and one model"
        )
    return held if is_past else None


def write_cache(cache: Any, layer_idx: int, state: MixerState) -> None:
    """Stores a state in a transformers cache layer, in place so that the cache keeps its addresses."""
    if isinstance(cache, StateDict):
        cache.states[layer_idx] = state
        return
    layer = cache.layers[layer_idx]
    if not layer.is_conv_states_initialized[0]:
        layer.lazy_initialization(conv_states=state.conv)
    if layer.conv_states[0] is not state.conv:
        layer.conv_states[0].copy_(state.conv)
    layer.has_previous_state[0] = True
    if layer.recurrent_states[0] is not state.ssm:
        cache.update_recurrent_state(state.ssm, layer_idx)
