"""Makes code that torch.compile compiled before see hooks that came later.

Dynamo does not guard on a module's hooks by default: a graph that was compiled without them would go on without them, silently.
It does guard on a module's class, so a module gets a fresh subclass of its own class while hooks are attached, and its class back
after.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

# module -> (its own class, number of managers attached)
_attached: WeakKeyDictionary[nn.Module, tuple[type[nn.Module], int]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class RetraceHandle:
    """Undoes one `attach`."""

    module: nn.Module

    def remove(self) -> None:
        """Compiled code is compiled anew once more; after the last one the module has its own class again."""
        own, count = _attached.pop(self.module)
        if count > 1:
            _attached[self.module] = (own, count - 1)
            self.module.__class__ = _fresh_subclass(own)
        else:
            self.module.__class__ = own


def attach(module: nn.Module) -> RetraceHandle:
    """Compiled code that runs `module` is compiled anew at its next call."""
    own, count = _attached.get(module, (type(module), 0))
    _attached[module] = (own, count + 1)
    module.__class__ = _fresh_subclass(own)
    return RetraceHandle(module)


def _fresh_subclass(own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (own,), {"__module__": own.__module__, "__qualname__": own.__qualname__})
