"""pumer-compile: a compiler that makes vision-language transformers cheap to serve."""

from .capture import Program, capture
from .errors import PumerError
from .plan import Plan
from .reduce import Reduced, reduce
from .schedule import Schedule

__version__ = "0.1.0"

__all__ = ["Plan", "Program", "PumerError", "Reduced", "Schedule", "capture", "reduce"]
