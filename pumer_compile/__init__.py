"""pumer-compile: a compiler that makes vision-language transformers cheap to serve.

```python
import pumer_compile as pumer

program = pumer.capture(model, inputs)          # inputs: tensors by forward argument
reduced = pumer.reduce(program, "vilt-vqa")     # reduced.module runs and trains in eager PyTorch
pumer.export(reduced, "model.onnx")             # proved before it is published
report = pumer.parity("model.onnx", model)
outputs = pumer.Engine("model.onnx")(**inputs)  # runs any artifact
```
"""

from .capture import Program, capture
from .distill import Teacher, distillation_loss
from .engine import Engine
from .errors import PumerError
from .exporters import Exported, OnnxOptions, OnnxSession, export
from .parity import parity
from .parity_report import ParityReport
from .plan import Plan
from .reduce import Reduced, reduce
from .schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Exported",
    "OnnxOptions",
    "OnnxSession",
    "ParityReport",
    "Plan",
    "Program",
    "PumerError",
    "Reduced",
    "Schedule",
    "Teacher",
    "capture",
    "distillation_loss",
    "export",
    "parity",
    "reduce",
]
