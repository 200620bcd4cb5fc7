"""The forward of a model with the compiled step in front: it takes calls of one token, transformers all others.

Nothing above it changes: `generate()` with its processors, streamers and stopping criteria, and every loop that
calls the model with a cache. A call goes to the step when it continues one sequence by one token, on the CPU,
without gradients, from an ordinary or a packed cache, and asks for logits alone. Only models whose code the step
was written after qualify (parts.py); the first such call of one, and with each kind of cache, runs both ways, and
the step is dropped unless they agree.

BITMILL_DECODE=off leaves all calls to transformers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from bitmill.compat import CACHE_NAMES, cache_argument
from bitmill.errors import UsageError
from bitmill.runtime.decode.guard import ModelGuard
from bitmill.runtime.decode.parts import NotEligibleError, parts_of
from bitmill.runtime.decode.plan import Plan
from bitmill.runtime.decode.step_cache import FloatStepCache, StepCache, packed_step_cache, step_cache_of
from bitmill.runtime.native import activations

# How far the logits of both ways may be apart, relative to their spread. Sums in another order round a few inputs
# to another integer, and that moves all that follow: some blocks on, both differ by as much as rounding costs.
TOLERANCE = {"float32": 1e-3, "int16": 2e-2, "int8": 0.3}
TOLERANCE_BF16 = 0.1

# The step is optional: what it trips over is the model's own to raise.
_FALLBACK_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_HELD = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
_GIVEN = ("input_ids", *CACHE_NAMES, "attention_mask", "position_ids", "cache_position")  # read elsewhere, implied
_IGNORED = ("use_cache", "return_dict")  # True or None


class StepForward:
    """Stands in for `model.forward`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unsupported_reason: str | None = None  # one sentence, while the model as it is cannot use the step
        self._guard: ModelGuard | None = None
        self._plan: Plan | None = None
        self._agrees: dict[str, str | None] = {}  # by kind of cache: None, or why it is left to transformers

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own forward, whose signature this one has."""
        return MethodType(type(self.model).forward, self.model)

    @property
    def __code__(self) -> CodeType:
        """The same; torch.export looks for it."""
        code: CodeType = type(self.model).forward.__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model make their own plan."""
        return {"model": self.model, "unsupported_reason": None, "_guard": None, "_plan": None, "_agrees": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The step where the call is one for it, or else the model's own forward."""
        if torch.compiler.is_compiling():
            return self._own(*args, **kwargs)
        if len(args) == 1:
            kwargs, args = {"input_ids": args[0], **kwargs}, ()
        ids = kwargs.get("input_ids")
        if args or type(ids) is not Tensor or ids.shape != (1, 1) or not _is_plain(kwargs, ids):
            return self._own(*args, **kwargs)
        plan = self._current_plan()
        if plan is None or self._guard is None or self._guard.blocking_reason() is not None:
            return self._own(**kwargs)
        cache = cache_argument(kwargs)
        found = step_cache_of(cache, plan.blocks, plan.kv_heads, plan.dim)
        if found is None or self._agrees.get(found.kind) is not None or not _continues(kwargs, found.length):
            return self._own(**kwargs)
        found.make_room()
        try:
            logits = plan.advance(ids, found)
        except _FALLBACK_ERRORS:  # a token that the table does not have
            return self._own(**kwargs)
        if found.kind not in self._agrees:
            return self._tried(logits, found, kwargs)
        found.advance()
        held: dict[str, Any] = {_HELD: cache}
        return CausalLMOutputWithPast(logits=logits.to(plan.dtype).view(1, 1, -1), **held)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    def prepare(self) -> str | None:
        """Build what the step needs, if it is not there; why the model cannot use it, in one sentence, or None."""
        self._current_plan()
        if self.unsupported_reason is not None or self._guard is None:
            return self.unsupported_reason
        blocking_reason = self._guard.blocking_reason()
        return None if blocking_reason is None else _sentence(blocking_reason)

    def unsupported_reason_with(self, cache: Any) -> str | None:
        """The same for single tokens that a packed cache precedes."""
        reason, plan, packed = self.prepare(), self._plan, packed_step_cache(cache)
        if reason is not None or plan is None or packed is None:
            return reason
        why = packed.unsupported_reason(plan.blocks, plan.kv_heads, plan.dim)
        return self._agrees.get(packed.kind) if why is None else _sentence(why)

    def _current_plan(self) -> Plan | None:
        """None for a model that was refused, until something about it changes."""
        plan, watch = self._plan, self._guard
        if watch is not None and watch.is_current() and (plan is None or plan.is_current()):
            return plan
        self._plan, self._guard, self._agrees, self.unsupported_reason = None, None, {}, None
        try:
            self._guard = ModelGuard(self.model)
            plan = Plan(self.model)
            plan.angles(0)
            self._plan = plan
        except NotEligibleError as error:
            self._refuse(str(error))
        except _FALLBACK_ERRORS as error:
            self._refuse(f"{type(error).__name__}, {error}")
        return self._plan

    def _tried(self, logits: Tensor, past: StepCache, kwargs: dict[str, Any]) -> Any:
        """The model's own answer to the first call; the step is kept if it gave the same.

        The token's keys and values are written once more, to where the step wrote its own.
        """
        output = self._own(**kwargs)
        expected = output.logits.view(-1).to(torch.float32)
        apart = (logits - expected).norm() / (expected - expected.mean()).norm()
        limit = TOLERANCE[activations()]
        if bool(apart <= (limit if output.logits.dtype == torch.float32 else max(limit, TOLERANCE_BF16))):
            self._agrees[past.kind] = None
        elif past.kind == FloatStepCache.kind:
            self._refuse(f"the compiled step differs by {float(apart):.2g}")
        else:
            reason = f"with a packed cache the compiled step differs by {float(apart):.2g}"
            self._agrees[past.kind] = _sentence(reason)
            logging.getLogger("bitmill").info(self._agrees[past.kind])
        return output

    def _refuse(self, reason: str) -> None:
        self.unsupported_reason, self._plan = _sentence(reason), None
        logging.getLogger("bitmill").info(self.unsupported_reason)


def _is_plain(kwargs: dict[str, Any], ids: Tensor) -> bool:
    """Whether the call asks for the logits of one token and nothing else."""
    if torch.is_grad_enabled() or ids.device.type != "cpu":
        return False
    for name, value in kwargs.items():
        if name in _GIVEN or value is None:
            continue
        if name == "logits_to_keep":
            if not isinstance(value, int) or value not in (0, 1):
                return False
        elif name in _IGNORED:
            if value is not True:
                return False
        elif value is not False:  # output_attentions and the like
            return False
    return True


def _continues(kwargs: dict[str, Any], length: int) -> bool:
    """Whether the token follows the `length` of the cache, none of which is masked."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (1, length + 1) and bool(mask.all())):
        return False
    if positions is None:
        return True
    return isinstance(positions, Tensor) and positions.numel() == 1 and int(positions) == length


def attach(model: Any) -> Any:
    """Put the compiled step in front of the forward of a model that it computes (parts.py); returns the model.

    BITMILL_DECODE=off leaves it alone. A shallow copy (copy.copy) shares the model's forward as it shares its
    modules. Raises UsageError for another value of it.
    """
    blocking_reason = os.environ.get("BITMILL_DECODE") or "on"
    if blocking_reason not in ("on", "off"):
        raise UsageError(f"BITMILL_DECODE is {blocking_reason!r}; use on or off.")
    if blocking_reason == "on" and "forward" not in vars(model) and _model_unsupported_reason(model) is None:
        model.forward = StepForward(model)
    return model


def detach(model: Any) -> Any:
    """Give the model its own forward back; returns the model."""
    if isinstance(vars(model).get("forward"), StepForward):
        del model.forward
    return model


def decode_path(model: Any, cache: Any = None) -> str:
    """The path of single tokens: "step", or one sentence that says why it is transformers' own forward.

    cache: a packed one that precedes them; without it, an ordinary one does.
    """
    forward = vars(model).get("forward")
    if isinstance(forward, StepForward):
        return forward.unsupported_reason_with(cache) or "step"
    return _model_unsupported_reason(model) or _sentence("no step is attached")


def _model_unsupported_reason(model: Any) -> str | None:
    try:
        parts_of(model)
    except NotEligibleError as error:
        return _sentence(str(error))
    except _FALLBACK_ERRORS as error:
        return _sentence(f"{type(error).__name__}, {error}")
    return None


def _sentence(reason: str) -> str:
    return f"It decodes by transformers' own forward: {reason}."
