"""Any model that contains mixers of a known kind: each is a block by itself, everything else stays as it is.

U-Mamba, MambaMIM, and what people build themselves of mamba_ssm's Mamba or VMamba's SS2D.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mambaquant_ext.artifacts.layout import Skip
from mambaquant_ext.model.adapters.kinds import BlockKind, FamilyAdapter, KindsAdapter
from mambaquant_ext.model.adapters.mhs_vm import MULTI_HEAD_SCAN
from mambaquant_ext.model.adapters.msvmamba import MULTI_SCALE_SS2D
from mambaquant_ext.model.adapters.vmamba import SS2D
from mambaquant_ext.model.hf import MIXER_PARTS, mixer_weights
from mambaquant_ext.model.vision.unet import MambaUNet, UNetConfig
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import Grid


class MixerCall:
    """mamba_ssm's forward(hidden_states, inference_params=None): a whole sequence, without a state."""

    def read(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Grid]:
        """See Contract.

        Raises:
            ValueError: an argument beside hidden_states that is not None, such as a cache or a mask.
        """
        named = {**{f"argument {index}": value for index, value in enumerate(args, 2)}, **kwargs}
        given = [name for name, value in named.items() if value is not None]
        if given:
            raise ValueError(
                f"quantized mixer: expected hidden_states alone, or None beside it, got {', '.join(given)}"
            )
        return hidden_states, (hidden_states.shape[1],)

    def write(self, out: Tensor, _grid: Grid) -> Tensor:
        """See Contract."""
        return out


def has_mixer_parts(module: nn.Module) -> bool:
    """Whether a module has the parts of mamba_ssm's Mamba.

    Args:
        module: any.
    """
    return all(hasattr(module, name) for name in MIXER_PARTS)


def lone_mixer_weights(module: nn.Module) -> MixerWeights:
    """The weights of a mixer without norm and residual add.

    Args:
        module: see has_mixer_parts.

    Raises:
        TypeError, ValueError: parts of another kind.
    """
    return mixer_weights(module, norm=None).replace(skip=Skip.NONE)


MAMBA = BlockKind(has_mixer_parts, lambda _: MixerCall(), lone_mixer_weights)


class MixersAdapter(KindsAdapter):
    """The most general adapter: asked last."""

    name = "mixers"
    kinds = (MAMBA, SS2D, MULTI_SCALE_SS2D, MULTI_HEAD_SCAN)


class UNetAdapter(FamilyAdapter):
    """U-Mamba's and MambaMIM's U-Nets, which `mixers` would know, too, but could not build."""

    name = "mamba_unet"
    kinds = (MAMBA,)
    model_class, config_class = MambaUNet, UNetConfig
