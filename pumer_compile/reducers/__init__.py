"""Token reducers: plain `nn.Module`s, readable beside the paper; without parameters, but for those that learn."""

from .align import AlignAxis, OwnWeights, TokenWeights, UnitWeights
from .attention import SizeBias, TextRowsAttention
from .base import ApplyMap, Reducer, Reduction, Signal, forced_decisions, noted_decisions, reducers_of
from .crops import CropReducer
from .dart import DartReducer
from .fastervlm import VotesReducer
from .holov import HoloVReducer
from .last_query import LastQueryPruner, LastQueryReducer, NextQueryReducer
from .learned import KeepPredictor, LearnedReducer, MaskingReducer
from .masked_softmax import PublishedMaskedSoftmax
from .merger import ModalityAwareMerger
from .prune_merge import StreamReducer
from .pruner import TextInformedPruner
from .relevance import MeanOfWords, RowsOfTower
from .sparsevlm import RatedReducer, TextRating
from .video import ChangeReducer, UniqueReducer
from .visionzip import VisionZipReducer
from .vispruner import VisPruner
from .visual import MemberVotes, VisualReducer, WithSeparators

__all__ = [
    "AlignAxis",
    "ApplyMap",
    "ChangeReducer",
    "CropReducer",
    "DartReducer",
    "HoloVReducer",
    "KeepPredictor",
    "LastQueryPruner",
    "LastQueryReducer",
    "LearnedReducer",
    "MaskingReducer",
    "MeanOfWords",
    "MemberVotes",
    "ModalityAwareMerger",
    "NextQueryReducer",
    "OwnWeights",
    "PublishedMaskedSoftmax",
    "RatedReducer",
    "Reducer",
    "Reduction",
    "RowsOfTower",
    "Signal",
    "SizeBias",
    "StreamReducer",
    "TextInformedPruner",
    "TextRating",
    "TextRowsAttention",
    "TokenWeights",
    "UniqueReducer",
    "UnitWeights",
    "VisPruner",
    "VisionZipReducer",
    "VisualReducer",
    "VotesReducer",
    "WithSeparators",
    "forced_decisions",
    "noted_decisions",
    "reducers_of",
]
