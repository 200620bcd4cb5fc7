"""KL divergence of the final logits when the inputs of one unit alone are rounded, and its weights are float.

It adds to the cost of the unit's weights, as costs of units add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bitmill.calibration.walk import walk_blocks
from bitmill.errors import UsageError
from bitmill.recipes.scheme import LayerScheme
from bitmill.sensitivities.base import LoadedBlock, Run
from bitmill.sensitivities.candidate import Candidate, Unit
from bitmill.sensitivities.divergence import Divergences, Round
from bitmill.sensitivities.kl import KL
from bitmill.sensitivities.store import Costs, CostStore

TASK = "sensitivity of inputs"


@torch.no_grad()
def measure_inputs(run: Run, units: Sequence[Unit], candidates: Mapping[str, Sequence[Candidate]]) -> Costs:
    """Measure every format of inputs of every unit; what the folder of the run holds is not measured again.

    Args:
        run: the model and the text.
        units: of blocks, in order.
        candidates: name of a unit -> its candidates.

    Returns:
        Name of a unit -> `inputs_key` of a candidate -> divergence in nats per token.

    Raises:
        UsageError: a layer is no module of its own, so that its inputs cannot be rounded.
    """
    options = KL()
    store = CostStore(run.folder, options)
    missing = {unit: _missing(candidates[unit.name], store.load(unit.block).get(unit.name, {})) for unit in units}
    if any(missing.values()):
        divergences = Divergences(run.streamed, run.windows[: options.windows, : options.tokens])
        run.progress.start(TASK, len(run.streamed.blocks))
        for index, block in walk_blocks(run.streamed, run.progress):
            loaded, asked = LoadedBlock(index, block, {}), list[tuple[Unit, str]]()
            for unit in units:
                for key, scheme in missing[unit].items() if unit.block == index else ():
                    divergences.add(loaded, {}, _rounding(run, unit, scheme))
                    asked.append((unit, key))
            found: Costs = {}
            for (unit, key), divergence in zip(asked, divergences.finish(loaded)):
                found.setdefault(unit.name, {})[key] = divergence
            if found:
                store.save(index, found)
        run.progress.finish()
    return {unit.name: store.load(unit.block).get(unit.name, {}) for unit in units}


def _missing(candidates: Sequence[Candidate], known: Mapping[str, float]) -> dict[str, LayerScheme]:
    """Return the formats of inputs whose cost is unknown, each with a scheme that has it."""
    return {
        candidate.inputs_key: candidate.scheme
        for candidate in candidates
        if candidate.inputs_key is not None and candidate.scheme is not None and candidate.inputs_key not in known
    }


def _rounding(run: Run, unit: Unit, scheme: LayerScheme) -> dict[str, Round]:
    """Return what rounds the inputs of the layers of a unit, by path in the block."""
    assert scheme.inputs is not None
    format, prefix = scheme.inputs.around(scheme.weight), f"{run.streamed.block_name(unit.block)}."
    modules = dict(run.streamed.model.named_modules())
    if odd := next((layer for layer in unit.layers if layer not in modules), None):
        raise UsageError(
            f"{odd} is no module of its own, so that the cost of rounding its inputs cannot be measured; leave "
            "methods that round inputs out of --methods (methods)."
        )
    return {layer.removeprefix(prefix): lambda x: format.effective_inputs(x, {}) for layer in unit.layers}
