"""The labeled loss, and the same on a second classifier: U2PL's and AEL's.

Axes: B images of a pass, the labeled ones first, K classes, H x W pixels, h x w cells.
"""

from __future__ import annotations

from torch import Tensor, nn

from raysemi.data.types import SemiBatch
from raysemi.methods.base import StepContext
from raysemi.models.decoders import Keep, resize
from raysemi.models.heads import AuxiliaryHead
from raysemi.models.segmentor import Channels, Prediction
from raysemi.ops.losses import Criterion, Objective, labeled_loss, supervised


def auxiliary_head(channels: Channels, weight: float, num_classes: int) -> dict[str, nn.Module]:
    """The second classifier where it has a weight, by the name of its head."""
    if weight == 0.0:
        return {}
    assert channels.middle is not None  # the config refuses an encoder without it
    return {"auxiliary": AuxiliaryHead(channels.middle, num_classes)}


def labeled_terms(
    prediction: Prediction, keep: Keep, criterion: Criterion, weight: float, batch: SemiBatch, context: StepContext
) -> dict[str, Objective]:
    """The criterion on both classifiers: `supervised`, and `auxiliary` where it has a weight.

    Args:
        prediction: the student's; further images than the labeled ones do not count.
        keep: the dropout of the pass.
        criterion: `method.criterion.*`.
        weight: `method.auxiliary_weight`.
        batch: the labels.
        context: the step.
    """
    num_labeled, size = len(batch.image_L3HW), batch.label_LHW.shape[1:]

    def loss(logits_BKHW: Tensor) -> tuple[Tensor, Tensor]:
        return labeled_loss(criterion, logits_BKHW[:num_labeled], batch.label_LHW, context.across)

    terms = {"supervised": supervised(loss(prediction.logits_BKHW), weight=1.0)}
    if weight > 0.0:
        middle_BDhw = prediction.features.middle_BDhw
        assert middle_BDhw is not None  # the config refuses an encoder without it
        scores_BKhw = context.student.heads["auxiliary"](middle_BDhw, keep)
        terms["auxiliary"] = supervised(loss(resize(scores_BKhw, size)), weight)
    return terms
