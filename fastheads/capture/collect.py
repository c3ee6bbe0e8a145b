"""Collect the committed moments of all devices and ranks into a HeadProfile; save and load them for checkpoints."""

from typing import Any

import torch
from torch import Tensor

from fastheads.capture.coverage import samples_of_rows
from fastheads.capture.recorder import Recorder
from fastheads.errors import CheckpointError, ForwardError, ResultsError, StaleFactorError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe
from fastheads.results.head_profile import HeadProfile
from fastheads.results.mean_vectors import MeanVectors
from fastheads.results.merge import difference_of_weights
from fastheads.results.possible import least_of
from fastheads.stats.mean_vectors import RunningMeanVectors
from fastheads.stats.metric import UPDATE
from fastheads.stats.metrics import UPDATE_METRIC
from fastheads.stats.moments import Moments


def collect(recorder: Recorder, weights: dict[str, Any] | None) -> tuple[HeadProfile, int]:
    """Return the profile of the forwards that counted, and the number of samples that were NaN or infinite. `weights`: the
    fingerprint of the weights. Waits for the device, and with tensor parallelism for the other ranks.

    Raises:
        StaleFactorError: a weight changed in a way that only its bits show, or a layer's multiplier did.
        ResultsError: results would be incomplete: a site was skipped or not verified, or a forward could not be measured.
    """
    scope = recorder.scope

    def measured() -> tuple[Moments, Tensor | None]:
        """Return the moments `[all channels' metrics, rows, heads]` of the heads that this rank measures, and the buffer of
        their mean vectors, on the CPU.
        """
        check_fresh(recorder)
        if scope.layout.head_dim is not None:
            _check_one_weight(recorder, weights)
        state = _total(recorder)
        totals = [moments.views() for moments in scope.layout.moments(state)]
        vectors = scope.layout.vectors(state)
        together = Moments(*(torch.cat(planes) for planes in zip(*totals, strict=True)))
        return together, None if vectors is None else vectors.buffer

    whole, vectors = measured() if scope.ranks is None else scope.ranks.whole(measured)
    by_channel = zip(*(plane.split(scope.layout.metrics) for plane in whole), strict=True)
    totals = [Moments(*planes) for planes in by_channel]
    recorder.settle_whole()
    recorder.coverage.check(totals[0])
    _check_verified(recorder, totals[0])
    by_metric = {
        name: Moments(*(plane[m].clone() for plane in total))
        for channel, total in zip(scope.channels, totals, strict=True)
        for name, m in channel.metrics.items()
    }
    nonfinite = sum(int(of_metric.nonfinite.sum()) for of_metric in by_metric.values())
    if scope.options.measures(UPDATE):
        by_metric[UPDATE_METRIC] = scope.updates.moments(by_metric)
    if scope.residuals is not None:
        of_updates = totals[-1] if scope.normed else None
        by_metric.update(scope.residuals.moments(totals[0], of_updates))
    if scope.streaming is not None:
        by_metric.update(scope.streaming.moments(by_metric))
    if scope.options.metrics is not None:
        by_metric = {name: by_metric[name] for name in by_metric if name in scope.options.metrics}
    for name, of_metric in by_metric.items():
        if bool((of_metric.min < least_of(name)).any()):
            raise ResultsError(
                f"metric {name!r} has negative values: register it under a name that does not end in _norm, _ratio or _square"
            )
    found = None if vectors is None else MeanVectors.of(RunningMeanVectors.over(vectors).views())
    return HeadProfile(by_metric, _metadata(recorder, weights), found), nonfinite


def check_fresh(recorder: Recorder) -> None:
    """Measure the deferred forwards. Raises StaleFactorError if samples may be wrong, ResultsError if some are missing."""
    recorder.check_no_whole(ResultsError)
    recorder.deferred.catch_up_all()
    recorder.deferred.check_complete()
    if recorder.scope.streaming is not None:
        recorder.scope.streaming.check()
    channels = recorder.scope.channels
    stale = list(dict.fromkeys(name for channel in channels for name in channel.accumulator.stale()))
    if stale:
        raise StaleFactorError(
            f"the weight of {', '.join(stale)} was changed in place behind autograd's back while profiling: what was "
            "measured since may be wrong. Call reset() after such a change, or use backend='einsum', which reads it each time"
        )
    if changed := recorder.scope.updates.changed():
        raise StaleFactorError(
            f"what the layer multiplies the output of {', '.join(changed)} with was changed while profiling: all samples of "
            f"{UPDATE_METRIC} are multiplied with one number. Call reset() after such a change"
        )


def state(recorder: Recorder) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Copy the committed samples to the CPU, bit for bit: for each device the parts of its state (`StateLayout.parts`), and notes
    that belong to them (JSON). `load_state` takes both, in a manager on the same model with the same options. Raises
    StaleFactorError and ResultsError as `check_fresh` does, and with mean vectors if a weight has changed.
    """
    with recorder.lock:
        check_fresh(recorder)
        if recorder.scope.layout.head_dim is not None:
            _check_followed_none(recorder)
        recorder.settle_whole()
        devices = []
        for queue in recorder.queues:
            with queue.on_its_stream():
                devices.append(queue.state.layout.parts(queue.state.committed_buffer.cpu().clone()))
        used = [sorted(channel.accumulator.used) for channel in recorder.scope.channels]
        return devices, {"used": used, "missed": sorted(recorder.coverage.missed)}


def load_state(recorder: Recorder, devices: list[list[Tensor]], notes: dict[str, Any]) -> None:
    """Restore what `state` returned. Raises CheckpointError if it does not fit this recorder."""
    with recorder.lock:
        recorder.check_no_whole(ForwardError)
        recorder.forwards.forget_all()
        channels, queues = recorder.scope.channels, list(recorder.queues)
        layout = recorder.scope.layout
        here = [layout.parts(queue.state.committed_buffer) for queue in queues]
        used, missed = notes.get("used"), notes.get("missed")
        if not (isinstance(used, list) and len(used) == len(channels) and isinstance(missed, list)):
            raise CheckpointError("the moments come without what belongs to them")
        if [[(part.shape, part.dtype) for part in parts] for parts in devices] != [
            [(part.shape, part.dtype) for part in parts] for parts in here
        ]:
            raise CheckpointError("the moments are those of another model or other options")
        for queue, parts in zip(queues, devices, strict=True):
            queue.deferred.clear()
            with queue.on_its_stream():
                for buffer in queue.state.buffers():
                    for own, part in zip(layout.parts(buffer), parts, strict=True):
                        own.copy_(part)
        for channel, names in zip(channels, used, strict=True):
            channel.accumulator.used.update(map(str, names))
        recorder.coverage.missed.update(row for row in missed if type(row) is int)


def _check_followed_none(recorder: Recorder) -> None:
    """Raise StaleFactorError if a weight is another one than at first: mean vectors are of one weight."""
    if changed := recorder.scope.accumulator.changed:
        raise StaleFactorError(
            f"the weight of {', '.join(sorted(changed))} changed while mean vectors were measured, which are of one weight: call "
            "reset() after such a change, or leave out vectors=True"
        )


def _check_one_weight(recorder: Recorder, weights: dict[str, Any] | None) -> None:
    """As `_check_followed_none`, also for changes that only the bits show, where no factor is verified."""
    _check_followed_none(recorder)
    has_factors = bool(recorder.scope.accumulator.factors)
    if not has_factors and difference_of_weights(weights, fingerprint(recorder.scope.model)):
        raise StaleFactorError(
            "weights changed while mean vectors were measured, which are of one weight: call reset() after such a change, or "
            "leave out vectors=True"
        )


def _total(recorder: Recorder) -> Tensor:
    """Merge the committed state of all devices, on the CPU."""
    total: Tensor | None = None
    for queue in recorder.queues:  # a layer that moved between devices has samples on both
        with queue.on_its_stream():
            here = queue.state.committed_buffer.cpu()
        total = here if total is None else queue.state.layout.merged(total, here)
    assert total is not None  # there is a queue for each weight's device
    return total


def _metadata(recorder: Recorder, weights: dict[str, Any] | None) -> dict[str, Any]:
    scope, accumulator = recorder.scope, recorder.scope.accumulator
    used = sorted(accumulator.used)
    return describe(
        scope.model,
        scope.sites,
        scope.kv_heads,
        **scope.options.metadata(backend="+".join(used) if used else accumulator.backend),
        residual_update=scope.updates.describe(range(len(scope.sites))),
        **(
            {}
            if scope.residuals is None
            else {"residual_stream": scope.residuals.describe(range(len(scope.sites)))}
        ),
        **({} if scope.streaming is None else {"streaming_unknown": scope.streaming.describe(scope.sites)}),
        weights=weights,
    )


def _check_verified(recorder: Recorder, moments: Moments) -> None:
    """Raise ResultsError, with the sites' names, if `verify` was asked for and measured sites were not verified."""
    unchecked = set() if recorder.check is None else set(recorder.check.unchecked())
    given = samples_of_rows(moments)
    missed = [p.name for p in recorder.profiled if p.name in unchecked and given[p.row]]
    if missed:
        raise ResultsError(
            f"verify=True could not check {', '.join(missed)}, which ran in compiled code or CUDA graphs only: run a "
            "batch before that"
        )
