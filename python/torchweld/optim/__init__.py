"""Drop-ins for `torch.optim`: the same constructors and state_dicts, the step in one pass over memory."""

from torchweld.optim.adamw import Adam, AdamW
from torchweld.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]


def __dir__() -> list[str]:
    return __all__
