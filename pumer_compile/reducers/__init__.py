"""Token reducers: plain `nn.Module`s without parameters, readable beside the paper."""

from .align import AlignAxis, TokenWeights, UnitWeights
from .attention import SizeBias, TextRowsAttention
from .masked_softmax import PublishedMaskedSoftmax
from .merger import ModalityAwareMerger
from .pruner import TextInformedPruner
from .reducer import ApplyMap, StreamReducer, forced_decisions, noted_decisions

__all__ = [
    "AlignAxis",
    "ApplyMap",
    "ModalityAwareMerger",
    "PublishedMaskedSoftmax",
    "SizeBias",
    "StreamReducer",
    "TextInformedPruner",
    "TextRowsAttention",
    "TokenWeights",
    "UnitWeights",
    "forced_decisions",
    "noted_decisions",
]
