"""What to reduce, where, and by which algorithm: the YAML a user writes.

```yaml
method: pumer
semantics: safe               # safe (the default) | reference | paper
layers: [2, 5, 8]             # cross-modal attention nodes in execution order, from 0
prune: 0.1                    # share of image tokens pruned at each
merge: {image: 0.3, text: 0.2}
```

Instead of `layers` a schedule may list `sites`, each with its own budgets. A float is a share of the stream
(0 <= share < 1); an integer is a number of tokens. Unknown keys, duplicate keys and schedules that reduce
nothing are errors: a compiler that silently does nothing is the worst bug there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ScheduleError
from .methods import METHODS, PRESETS
from .methods.base import Method
from .methods.budgets import Budget, Merge
from .methods.budgets import SiteBudget as Site

Schedule = Method
"""What a user writes is a method with its keys: `Schedule(method="fastv", ...)` is an object of that method's class."""

__all__ = ["METHODS", "PRESETS", "Budget", "Merge", "Schedule", "Site", "as_trained", "trained_with"]


# --- models that say what they were trained with ----------------------------------------------------------------------


def trained_with(configs: Iterable[Any]) -> Schedule | None:
    """The schedule that a model was fine-tuned with, where its configuration says so: the key `pumer_schedule`.

    Args:
        configs: of the model and of the modules in it, the outer ones first; the first that has the key counts.

    Raises:
        ScheduleError: it is not a valid schedule.
    """
    found = (getattr(config, "pumer_schedule", None) for config in configs)
    given = next((value for value in found if value is not None), None)
    if given is None:
        return None
    if not isinstance(given, str | Mapping):
        raise ScheduleError(
            f"pumer_schedule of the model's configuration is {given!r}; it must be a preset, a file or a mapping."
        )
    return Schedule.load(given)


def as_trained(schedule: Schedule, configs: Iterable[Any]) -> Schedule:
    """`schedule` under the semantics that the model was fine-tuned with, where it names none itself.

    Raises:
        ScheduleError: see `trained_with`.
    """
    if not schedule.trained_semantics or schedule.names_semantics:
        return schedule
    trained = trained_with(configs)
    if trained is None or type(trained) is not type(schedule) or not trained.names_semantics:
        return schedule
    return schedule.with_semantics(trained.semantics)
