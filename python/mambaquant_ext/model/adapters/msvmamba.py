"""MSVMamba: one scan over a convolved image, three over a coarser one in a row, summed normalised."""

from __future__ import annotations

from torch import nn

from mambaquant_ext.artifacts.layout import Merge
from mambaquant_ext.model.adapters.kinds import BlockKind, FamilyAdapter
from mambaquant_ext.model.adapters.vmamba import (
    COLUMNS,
    ROWS,
    ss2d_contract,
    ss2d_weights,
)
from mambaquant_ext.model.reading import copied, read_conv
from mambaquant_ext.model.vision.msvmamba import (
    COARSE,
    FINE,
    MSVMamba,
    MSVMambaConfig,
    MultiScaleSS2D,
)
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import ScanRoute

FINE_CONV, COARSE_CONV = 0, 1


def multi_scale_weights(module: nn.Module) -> MixerWeights:
    """The weights of a mixer.

    Its three coarse routes are one sequence in the model: they share weights, and each starts where the last ended.

    Args:
        module: MultiScaleSS2D.
    """
    assert isinstance(module, MultiScaleSS2D)
    weights = ss2d_weights(module)
    conv_of = {COARSE: COARSE_CONV, FINE: FINE_CONV}
    squeeze, excite = (module.se.fc.get_submodule(name) for name in ("0", "2"))
    assert isinstance(squeeze, nn.Linear) and isinstance(excite, nn.Linear)
    return weights.replace(
        convs=(*weights.convs, read_conv(module.conv2d_b1, along_route=False)),
        branches=tuple(
            branch.replace(conv=conv_of[index]) for index, branch in enumerate(weights.branches)
        ),
        routes=(
            ScanRoute(ROWS, reverse=True, branch=COARSE),
            ScanRoute(COLUMNS, branch=COARSE, continues=True),
            ScanRoute(COLUMNS, reverse=True, branch=COARSE, continues=True),
            ScanRoute(ROWS, branch=FINE),
        ),
        merge=Merge.NORMED_SUM,
        squeeze=copied(squeeze.weight),
        excite=copied(excite.weight),
    )


MULTI_SCALE_SS2D = BlockKind(
    lambda module: isinstance(module, MultiScaleSS2D), ss2d_contract, multi_scale_weights
)


class MSVMambaAdapter(FamilyAdapter):
    """MSVMamba of any size."""

    name = "msvmamba"
    head = "classifier.head"
    kinds = (MULTI_SCALE_SS2D,)
    model_class, config_class = MSVMamba, MSVMambaConfig
