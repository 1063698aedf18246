"""SparK on MinkowskiEngine against the independent dense-and-mask reference: losses, statistics, every gradient."""

import pytest

from patchsparse.backends.minkowski import loading as minkowski_loading

from .parity import Case, make_frames, make_pair, unequal_grid
from .test_spark_parity import CONVNEXT, RESNET18, check_everything, name_of

problem = minkowski_loading.library().problem


@pytest.mark.skipif(problem is not None, reason=str(problem))
@pytest.mark.parametrize("case", [RESNET18, CONVNEXT], ids=name_of)
def test_features_loss_statistics_and_every_gradient(case: Case) -> None:
    check_everything(make_pair(case, "minkowski"), make_frames(4, 64, 96), unequal_grid())
