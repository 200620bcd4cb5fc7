"""The compiled functions refuse arguments of wrong sizes, types and ranges before they touch memory.

Calls of every function are recorded while kernels run, and repeated with one argument changed. In a process of its
own a wrong access would end it; here it ends the tests, which is as clear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmill import native
from bitmill.formats import FORMATS, Format
from bitmill.formats.integer_coding import IntegerCoding
from bitmill.kv.scheme import TensorScheme
from bitmill.runtime.attention.dispatch import NativeTokenViews, attend
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.reference import Reference
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from helpers.cases import gram_of, inputs, weights
from helpers.native_kernels import CPU, needs_native
from helpers.packed_past import Case, made

pytestmark = needs_native
REFUSED = (ValueError, TypeError, IndexError)
SHAPE = (36, 144)
FORMAT_NAMES = {
    "uniform": [{"bits": 3, "group_size": 40}, {"bits": 8, "group_size": 48}],
    "codebook": [{"bits": 3}, {"bits": 4, "group_size": 48}, {"bits": 6}],
    "binary_coding": [{"bits": 4, "group_size": 48}],
    "integer_coding": [{"bits": 3, "group_size": 48}, {"bits": 4, "group_size": 48}],
    "additive": [{"bits": 4}, {"bits": 8}],
    "e8": [{"bits": 2}, {"bits": 2, "group_size": 48}],
    "trellis": [{"bits": 2, "state_bits": 8}],
    "pyramid": [{"bits": 3}, {"bits": 1}, {"bits": 2, "group_size": 48}],
}
FORMATS_RUN: list[Format] = [FORMATS.get(name)(**given) for name, all_ in FORMAT_NAMES.items() for given in all_]
WRAPPERS = ("sum", "permuted", "rotated")
SCHEMES = (
    TensorScheme(3, "static", outliers=0.03),
    TensorScheme(4, "page"),
    TensorScheme(3, "channel", levels="learned"),
)
# Other values that are sound: the last block of a row may be cut, a list of rows or steps may be shorter, ...
ANY_NUMBER = {"threads", "zero", "rope_scaling", "scale", "first_slot"}
ANY_VALUE = {
    "coding",
    "words",
    "y",
    "odd",
    "start",
    "first",
    "loose_keys",
    "loose_values",
    "values",
    "left",
    "right",
}
ANY_SIZE = {
    "additive": ("x",),
    "cheapest_codings": ("costs", "weight"),
    "codes_of": ("out",),
    "coordinates": ("words",),
    "decode": ("tables",),
    "from_layout": ("words",),
    "lattice_decode": ("out",),
    "lattice_linear": ("x",),
    "lookup_linear": ("tables",),
    "panel_linear": ("tables",),
    "points_decode": ("out",),
    "points_linear": ("x",),
    "rotate": ("numbers", "orders", "steps", "x"),
    "rotated_linear": ("numbers", "orders", "steps", "out_numbers", "out_orders", "out_steps"),
    "sparse_add": ("x",),
    "step_vector_linear": ("scales", "words"),
    "to_layout": ("words",),
    "vector_decode": ("out", "scales", "words"),
    "vector_linear": ("scales", "words", "x"),
}
CHECKED_LATER = ("KvSide", "KvPages")  # when the pages are made, and when they are read
CONVERTED = ("KvLayer", "KvBlock", "kv_attend", "codes_at")  # their arrays may have other types
Call = tuple[str, tuple[Any, ...]]


class Recorder:
    """The extension module; calls of its functions and classes are kept, one for each kind of arguments."""

    def __init__(self, module: Any) -> None:
        self._module, self.calls = module, dict[Any, Call]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            kinds = tuple(str(a.dtype) if isinstance(a, Tensor) else type(a).__name__ for a in arguments)
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
            self.calls.setdefault((name, kinds), (name, copies))
            return found(*arguments)

        return call


def run_everything() -> None:
    """Run kernels of all formats, rotations, sparse entries, attention on packed tokens and a decode step."""
    X = inputs(columns=SHAPE[1])
    stats = Statistics(gram_of(X), X.shape[0], fisher=torch.rand(SHAPE))
    wrapped = [FORMATS.get(name)(inner=FORMATS_RUN[0]) for name in WRAPPERS]
    wrapped.append(FORMATS.get("rotated")(inner=FORMATS_RUN[0], kind="orthogonal"))
    rounded = FORMATS.get("quantized_inputs")
    row = FORMATS.get("uniform")(bits=4, group_size="row")
    wrapped += [rounded(inner=FORMATS_RUN[0], inputs=row, threshold=threshold) for threshold in (0.0, 1.0)]
    wrapped += [FORMATS.get(name)(inner=FORMATS_RUN[0]) for name in ("outlier_columns", "low_rank")]
    for format in (*FORMATS_RUN, *wrapped):
        matrix = solve(Nearest(), weights(*SHAPE), stats, format)
        spec = KernelSpec(format, SHAPE, CPU)
        kernel = choose_kernel(spec)(spec, matrix.pack())
        assert not isinstance(kernel, Reference)
        for tokens in (1, 17):
            kernel.apply(torch.randn(tokens, SHAPE[1]))
        if format.core is format:
            kernel.rows(torch.tensor([0, 35]))
        kernel.step_linear()
        kernel.restore()
    solve(GPTQ(column_passes=1, group_passes=1), weights(*SHAPE), stats, IntegerCoding(3, 48))
    for keys in SCHEMES:
        q, layer, past, *_ = made(Case(keys, TensorScheme(4, "token", outliers=0.02), pre_rope=True))
        attend(q, layer, past, 0.1)
        layer.block(NativeTokenViews().update(past.slabs, past.fp16_keys, past.fp16_values))


@pytest.fixture(scope="module")
def calls() -> Iterator[list[Call]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BITMILL_KERNEL")
        recorder = Recorder(native._native)
        patch.setattr(native, "_native", recorder)
        torch.manual_seed(0)
        run_everything()
        patch.undo()
        yield list(recorder.calls.values())


def names_of(function: str) -> list[str]:
    """The arguments' names, of the first signature in the docstring."""
    found = getattr(native._native, function)
    text = found.__init__.__doc__ if isinstance(found, type) else found.__doc__
    inside = text.splitlines()[0].split("(", 1)[1]
    names = [part.split(":")[0].strip() for part in inside.split(",") if ":" in part.split("[")[0]]
    return [name for name in names if name.isidentifier() and name != "self"]


def wrong_sizes(given: Tensor, converted: bool) -> Iterator[Tensor]:
    """Arrays with one number less or more along an axis, of another type and number of axes.

    Args:
        given: An array that fits.
        converted: The function takes other types, and bytes of any number of axes.
    """
    for axis in range(given.dim()):
        if given.shape[axis] > 1:
            yield given.narrow(axis, 0, given.shape[axis] - 1).contiguous()
        yield torch.cat([given, given.narrow(axis, 0, min(1, given.shape[axis]))], axis)
    if not converted:
        yield given.to(torch.float64 if given.dtype != torch.float64 else torch.float32)
    if given.dtype != torch.uint8:
        yield given[None]


def wrong_values(given: Tensor) -> Iterator[Tensor]:
    """Integer arrays with one number that is too small or too large."""
    if not given.numel() or given.is_floating_point() or given.dtype == torch.uint8:
        return
    info = torch.iinfo(given.dtype)
    for at in (0, given.numel() // 2, given.numel() - 1):
        for value in (info.min, info.max):
            changed = given.clone()
            changed.view(-1)[at] = value
            yield changed


def is_refused(function: str, arguments: tuple[Any, ...], at: int, value: Any) -> bool:
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    copies[at] = value
    try:
        getattr(native._native, function)(*copies)
    except REFUSED:
        return True
    return False


def changed_calls(call: Call) -> Iterator[tuple[str, int, Any]]:
    """Return the name of an argument, its place and another value, one that no call of the function can take."""
    function, arguments = call
    names = names_of(function)
    for at, given in enumerate(arguments):
        name = names[at]
        if isinstance(given, Tensor):
            if name not in ANY_SIZE.get(function, ()):
                yield from ((name, at, other) for other in wrong_sizes(given, function in CONVERTED))
            if name not in ANY_VALUE:
                yield from ((name, at, other) for other in wrong_values(given))
        elif type(given) is int and name not in ANY_NUMBER and function not in CHECKED_LATER:
            yield from ((name, at, other) for other in (-7, 2**31, 2**62, -(2**63)))


def test_every_function_is_recorded(calls):
    found = {name for name, _ in calls}
    bound = {name for name in dir(native._native) if not name.startswith("_")}
    unchecked = {"isa", "isas", "use_isa", "read_all", "int8_peak"}
    methods = {
        "linear",
        "Linear",
        "LookupLinear",
        "GridLinear",
        "PanelLinear",
        "dense_linear",
        "bf16_linear",
        "transposed_linear",
        "StepNorm",
        "StepLayers",
        "StepAttention",
        "StepMlp",
        "Model",
        "ModelBuilder",
        "FixedInputs",
        "Codes",
        "codes",
        "StepExperts",
    }
    assert found | unchecked | methods == bound
    for name, arguments in calls:
        getattr(native._native, name)(*(a.clone() if isinstance(a, Tensor) else a for a in arguments))


def test_changed_arguments_refused(calls):
    accepted = [
        (call[0], name, tuple(value.shape) if isinstance(value, Tensor) else value)
        for call in calls
        for name, at, value in changed_calls(call)
        if not is_refused(*call, at, value)
    ]
    assert not accepted


def test_sound_sizes_hold(calls):
    """Sizes that are not refused stay inside the memory of the arguments."""
    for function, arguments in calls:
        for at, given in enumerate(arguments):
            if isinstance(given, Tensor):
                for other in (*wrong_sizes(given, True), *wrong_values(given)):
                    is_refused(function, arguments, at, other)
            elif type(given) is int:
                for number in (-1, 0, 1, 2**31 - 1, 2**31, 2**62, -(2**63)):
                    is_refused(function, arguments, at, number)


def step_layers(*layers):
    made = native.native().StepLayers()
    for layer in layers:
        made.add(layer, None)
    return made


def test_model_of_other_shapes():
    library, norm = native.native(), torch.ones(8)
    square, long = library.dense_linear(torch.eye(8)), library.dense_linear(torch.ones(8, 9))
    for shape in [
        (8, 2**40, 1, 4, 4),
        (8, 2, 0, 4, 4),
        (2**62, 2, 2, 4, 4),
        (8, 3, 2, 4, 4),
        (8, 2, 2, 3, 3),
        (8, 2, 2, 4, 6),
    ]:
        with pytest.raises(ValueError, match="no model's"):
            library.ModelBuilder(*shape, False, 1.0, 0.0)
    with pytest.raises(ValueError, match="bias has another size"):
        library.StepLayers().add(square, norm[:3].clone())
    with pytest.raises(ValueError, match="has no bias"):
        library.StepNorm(norm, norm, 1e-5, False)
    with pytest.raises(ValueError, match="bias has another size"):
        library.StepNorm(norm, norm[:3].clone(), 1e-5, True)
    one, two, three = step_layers(square), step_layers(square, square), step_layers(square, square, square)
    with pytest.raises(ValueError, match="have starts"):
        library.StepAttention(three, one, [0, 8], 4, None, None, False, 1.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="are missing"):
        library.StepAttention(three, one, [0, 8, 16], 4, None, None, True, 1.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="come from one layer"):
        library.StepAttention(three, two, [0, 8, 16], 4, None, None, False, 1.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="an activation is"):
        library.StepMlp(two, one, True, 4)
    with pytest.raises(ValueError, match="out of range"):
        square.row(8)
    attention = library.StepAttention(three, one, [0, 8, 16], 4, None, None, False, 1.0, 0.0, 0, 0)
    mlp, short = library.StepMlp(two, one, True, 0), library.StepNorm(norm[:7], None, 1e-5, False)
    wrong = [
        (attention, mlp, short),
        (attention, library.StepMlp(two, step_layers(long), True, 0), None),
        (attention, library.StepMlp(three, one, False, 0), None),
        (library.StepAttention(two, one, [0, 8, 16], 4, None, None, False, 1.0, 0.0, 0, 0), mlp, None),
        (library.StepAttention(three, one, [0, 8, -1], 4, None, None, False, 1.0, 0.0, 0, 0), mlp, None),
        (library.StepAttention(three, one, [0, 8, 16], 4, short, None, False, 1.0, 0.0, 0, 0), mlp, None),
    ]
    for parts in wrong:
        builder = library.ModelBuilder(8, 2, 2, 4, 4, False, 1.0, 0.0)
        builder.block(*parts, None, None, None, False, 1.0)
        with pytest.raises(ValueError, match="does not fit"):
            builder.build(None, one)


def test_fixed_inputs_of_other_shapes():
    inputs = native.native().FixedInputs()
    with pytest.raises(ValueError, match="no inputs"):
        inputs.product(torch.ones(4, 0), torch.ones(0, 4), 0, 1)
    with pytest.raises(ValueError, match="no columns"):
        inputs.read(torch.ones(2, 0), 1)
    inputs.read(torch.ones(2, 8), 1)
    wrong = [((4, 9), (2, 4), 0), ((4, 8), (3, 4), 0), ((4, 8), (2, 4), 1), ((4, 8), (2, 4), 2**63 - 1)]
    for W, y, first in wrong:
        with pytest.raises(ValueError, match="another shape"):
            inputs.product(torch.ones(W), torch.ones(y), first, 1)


@pytest.mark.parametrize("threads", [-(2**31), -1, 0, 2**31 - 1])
def test_any_number_of_threads(threads):
    inputs, y = native.native().FixedInputs(), torch.zeros(2, 4)
    inputs.read(torch.ones(2, 8), threads)
    inputs.product(torch.ones(4, 8), y, 0, threads)
    assert torch.allclose(y, torch.full((2, 4), 8.0), rtol=1e-3)
