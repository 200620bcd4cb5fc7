"""A replacement for a model's forward: compiled code for single tokens and prompts, transformers for other calls.

Callers do not change: `generate()` with its processors, streamers and stopping criteria, and loops that call the
model with a cache. A call uses the step if it continues one sequence by one token, on the CPU, without gradients,
from an ordinary or a packed cache, and requests only logits. The models are those that the step was written for
(parts.py). The first such call of a model with each kind of cache runs both ways, and the step is dropped unless
both agree. More tokens of one sequence, without padding and with such a cache, are a prompt (prompt.py); the first
tokens of the first prompt run both ways.

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
from bitmill.runtime.activations import activations
from bitmill.runtime.decode.guard import ModelGuard
from bitmill.runtime.decode.parts import NotEligibleError, model_parts
from bitmill.runtime.decode.plan import Plan
from bitmill.runtime.decode.prompt import (
    first_difference,
    new_cache,
    prompt_cache,
    prompt_unsupported_reason,
    read_prompt,
)
from bitmill.runtime.decode.step_cache import FloatStepCache, StepCache, packed_step_cache, step_cache_of
from bitmill.runtime.kernels.compiled import MAX_TOKENS

# Allowed difference of the logits of both ways, relative to their spread. Sums in another order round a few inputs
# to another integer, which changes everything that follows: after some blocks both differ by the error of
# rounding.
TOLERANCE = {"float32": 1e-3, "int16": 2e-2, "int8": 0.3}
TOLERANCE_BF16 = 0.1

# The step is optional: after one of these the model's own forward runs, and raises its own error.
_FALLBACK_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_CACHE_FIELD = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
_HANDLED = (
    "input_ids",
    *CACHE_NAMES,
    "attention_mask",
    "position_ids",
    "cache_position",
)  # handled elsewhere, or implied
_IGNORED = ("use_cache", "return_dict")  # True or None


class StepForward:
    """A replacement for `model.forward`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unsupported_reason: str | None = None  # one sentence while the model cannot use the step
        self._guard: ModelGuard | None = None
        self._plan: Plan | None = None
        self._prompts: tuple[str | None] | None = None  # after the first prompt, the reason against the step
        self._kind_reasons: dict[str, str | None] = {}  # by kind of cache: None, or the reason against the step

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own forward, which has the signature."""
        return MethodType(type(self.model).forward, self.model)

    @property
    def __code__(self) -> CodeType:
        """The code of the model's own forward, for torch.export."""
        code: CodeType = type(self.model).forward.__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the plan, which copies and pickles of the model rebuild."""
        return {
            "model": self.model,
            "unsupported_reason": None,
            "_guard": None,
            "_plan": None,
            "_kind_reasons": {},
            "_prompts": None,
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step if it supports the call, or else the model's own forward."""
        if torch.compiler.is_compiling():
            return self._own(*args, **kwargs)
        if len(args) == 1:
            kwargs, args = {"input_ids": args[0], **kwargs}, ()
        ids = kwargs.get("input_ids")
        if args or type(ids) is not Tensor or not _is_one_sequence(ids) or not _is_plain(kwargs, ids):
            return self._own(*args, **kwargs)
        cache = cache_argument(kwargs)
        if cache is None and not kwargs.get("use_cache"):
            return self._own(**kwargs)
        plan = self._current_plan()
        if plan is None or self._guard is None or self._guard.blocking_reason() is not None:
            return self._own(**kwargs)
        if cache is None or ids.shape[1] > 1:
            return self._read_prompt(plan, ids, kwargs)
        found = step_cache_of(cache, plan.windows, plan.kv_heads, plan.dim)
        if found is None or self._kind_reasons.get(found.kind) is not None or not _continues(kwargs, found.length):
            return self._own(**kwargs)
        if found.kind != FloatStepCache.kind and plan.packed_unsupported_reason() is not None:
            return self._own(**kwargs)
        found.make_room()
        try:
            logits = plan.advance(ids, found)
        except _FALLBACK_ERRORS:  # a token that the table does not have
            return self._own(**kwargs)
        if found.kind not in self._kind_reasons:
            return self._compare_first(logits, found, kwargs)
        found.advance()
        held: dict[str, Any] = {_CACHE_FIELD: cache}
        return CausalLMOutputWithPast(logits=logits.to(plan.dtype).view(1, 1, -1), **held)

    def _read_prompt(self, plan: Plan, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """Return the output for a prompt, by the compiled model if it supports the call."""
        given = cache_argument(kwargs)
        cache = new_cache(self.model.config) if given is None else given
        if self._prompts_reason(plan, ids) is not None:
            return self._own(**kwargs)
        past = prompt_cache(cache, plan, ids.shape[1])
        if past is None or not _continues(kwargs, past.length, ids.shape[1]):
            return self._own(**kwargs)
        length = past.length
        try:
            logits = read_prompt(plan, ids, past, kwargs.get("logits_to_keep") or 0)
        except _FALLBACK_ERRORS:
            if past.length != length:
                raise
            return self._own(**kwargs)  # a token that the table does not have
        held: dict[str, Any] = {_CACHE_FIELD: cache}
        return CausalLMOutputWithPast(logits=logits.to(plan.dtype)[None], **held)

    def _prompts_reason(self, plan: Plan, ids: Tensor) -> str | None:
        """Return one sentence if transformers reads prompts, or None; decided by the first prompt."""
        if self._prompts is None:
            reason = prompt_unsupported_reason(plan)
            if reason is None:
                difference = first_difference(plan, self._own, ids, self.model.config)
                limit = max(TOLERANCE.values()) if ids.shape[1] <= MAX_TOKENS else TOLERANCE[activations().many]
                limit = TOLERANCE["float32"] if activations().few == "float32" else limit
                if not difference <= (limit if plan.dtype == torch.float32 else max(limit, TOLERANCE_BF16)):
                    reason = f"the compiled model differs by {difference:.2g}"
            self._prompts = (None if reason is None else f"Its prompts use transformers' own forward: {reason}.",)
        return self._prompts[0]

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    def prepare(self) -> str | None:
        """Build the compiled model if needed; returns one sentence if the model cannot use the step, or None."""
        self._current_plan()
        if self.unsupported_reason is not None or self._guard is None:
            return self.unsupported_reason
        reason = self._guard.blocking_reason()
        return None if reason is None else _sentence(reason)

    def unsupported_reason_with(self, cache: Any) -> str | None:
        """Return one sentence if single tokens after a packed cache cannot use the step, or None."""
        reason, plan, packed = self.prepare(), self._plan, packed_step_cache(cache)
        if reason is not None or plan is None or packed is None:
            return reason
        why = plan.packed_unsupported_reason()
        why = packed.unsupported_reason(len(plan.windows), plan.kv_heads, plan.dim) if why is None else why
        return self._kind_reasons.get(packed.kind) if why is None else _sentence(why)

    def _current_plan(self) -> Plan | None:
        """Return the plan, rebuilt after changes of the model; None if the step does not support the model."""
        plan, watch = self._plan, self._guard
        if watch is not None and watch.is_current() and (plan is None or plan.is_current()):
            return plan
        self._plan, self._guard, self._kind_reasons, self.unsupported_reason = None, None, {}, None
        self._prompts = None
        try:
            self._guard = ModelGuard(self.model)
            self._plan = Plan(self.model)
        except NotEligibleError as error:
            self._refuse(str(error))
        except _FALLBACK_ERRORS as error:
            self._refuse(f"{type(error).__name__}, {error}")
        return self._plan

    def _compare_first(self, logits: Tensor, past: StepCache, kwargs: dict[str, Any]) -> Any:
        """Return the output of the model's own forward, and drop the step if its logits differ.

        The token's keys and values are written again, over those of the step.

        Args:
            logits: Logits of the step.
            past: The cache, before the token is counted.
            kwargs: Arguments of the call.
        """
        output = self._own(**kwargs)
        expected = output.logits.view(-1).to(torch.float32)
        difference = (logits - expected).norm() / (expected - expected.mean()).norm()
        limit = TOLERANCE[activations().few]
        if bool(difference <= (limit if output.logits.dtype == torch.float32 else max(limit, TOLERANCE_BF16))):
            self._kind_reasons[past.kind] = None
        elif past.kind == FloatStepCache.kind:
            self._refuse(f"the compiled step differs by {float(difference):.2g}")
        else:
            reason = f"with a packed cache the compiled step differs by {float(difference):.2g}"
            self._kind_reasons[past.kind] = _sentence(reason)
            logging.getLogger("bitmill").info(self._kind_reasons[past.kind])
        return output

    def _refuse(self, reason: str) -> None:
        self.unsupported_reason, self._plan = _sentence(reason), None
        logging.getLogger("bitmill").info(self.unsupported_reason)


def _is_one_sequence(ids: Tensor) -> bool:
    """Return True for token ids (1, length) that are not empty."""
    return ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1] > 0


def _is_plain(kwargs: dict[str, Any], ids: Tensor) -> bool:
    """Return True if the call requests only the logits of one token."""
    if torch.is_grad_enabled() or ids.device.type != "cpu":
        return False
    for name, value in kwargs.items():
        if name in _HANDLED or value is None:
            continue
        if name == "logits_to_keep":
            if not isinstance(value, int) or value < 0:
                return False
        elif name in _IGNORED:
            if value is not True:
                return False
        elif value is not False:  # output_attentions and the like
            return False
    return True


def _continues(kwargs: dict[str, Any], length: int, tokens: int = 1) -> bool:
    """Return True if the tokens follow the `length` tokens of the cache, and none is masked."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (1, length + tokens)):
        return False
    if mask is not None and not bool(mask.all()):
        return False
    if positions is None:
        return True
    if not isinstance(positions, Tensor) or positions.numel() != tokens:
        return False
    return positions.flatten().tolist() == list(range(length, length + tokens))


def attach(model: Any) -> Any:
    """Replace the forward of a supported model by one with the compiled step; returns the model.

    BITMILL_DECODE=off leaves it unchanged. A shallow copy (copy.copy) shares the model's forward, as it shares its
    modules. Raises UsageError for other values of BITMILL_DECODE than on and off.
    """
    setting = os.environ.get("BITMILL_DECODE") or "on"
    if setting not in ("on", "off"):
        raise UsageError(f"BITMILL_DECODE is {setting!r}; use on or off.")
    if setting == "on" and "forward" not in vars(model) and _model_unsupported_reason(model) is None:
        model.forward = StepForward(model)
    return model


def detach(model: Any) -> Any:
    """Restore the model's own forward; returns the model."""
    if isinstance(vars(model).get("forward"), StepForward):
        del model.forward
    return model


def decode_path(model: Any, cache: Any = None) -> str:
    """Return "step" if single tokens use the compiled step, or one sentence with the reason why not.

    Args:
        model: The model.
        cache: The packed cache before the tokens; None for an ordinary cache.
    """
    forward = vars(model).get("forward")
    if isinstance(forward, StepForward):
        return forward.unsupported_reason_with(cache) or "step"
    return _model_unsupported_reason(model) or _sentence("no step is attached")


def _model_unsupported_reason(model: Any) -> str | None:
    try:
        model_parts(model)
    except NotEligibleError as error:
        return _sentence(str(error))
    except _FALLBACK_ERRORS as error:
        return _sentence(f"{type(error).__name__}, {error}")
    return None


def _sentence(reason: str) -> str:
    return f"It decodes by transformers' own forward: {reason}."
