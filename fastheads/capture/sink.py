"""The part that the eager and the graph sink share: what they take inputs to."""

from dataclasses import dataclass

from fastheads.capture.coverage import Coverage
from fastheads.capture.deferral.launches import DeferredLaunches
from fastheads.capture.forwards import Forwards
from fastheads.capture.input_check import InputCheck
from fastheads.capture.queue import DeviceQueues
from fastheads.capture.scope import Scope
from fastheads.capture.stats import LaunchCounter


@dataclass(frozen=True, eq=False)
class SinkParts:
    """The parts of a recorder that both sinks use."""

    scope: Scope
    queues: DeviceQueues
    forwards: Forwards
    deferred: DeferredLaunches
    coverage: Coverage
    inputs: InputCheck
    counter: LaunchCounter


class Sink:
    """Takes the inputs of projections to the moments: `put` and `put_scaled` one input each, `flush` at the decoder's end."""

    def __init__(self, parts: SinkParts) -> None:
        self._scope, self._queues, self._forwards = parts.scope, parts.queues, parts.forwards
        self._deferred, self._coverage = parts.deferred, parts.coverage
        self._inputs, self._counter = parts.inputs, parts.counter
        residuals = self._scope.residuals
        # The rows whose residual stream is read; those of them whose input comes with it.
        self._sourced = frozenset(() if residuals is None else residuals.sources)
        self._paired = frozenset(() if residuals is None else residuals.at_input)
