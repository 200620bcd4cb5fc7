"""A causal language model in two parts: the body computes hidden states, the head turns some of them into logits.

The model's own forward runs in both parts, so scales and soft caps after the head count: for the head it finds, in
place of its decoder, a function that returns the chosen hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.evaluation.logits import DeferredLogits, Output, OutputFn
from bitmill.models.block_call import output_fn, output_tensor
from bitmill.models.meta import trim_malloc
from bitmill.progress import Progress

# Largest difference of logits, relative to the largest one, between a head that computes one position and one that
# computes two; rounding to bf16 is 0.004. A model whose head looks at several positions differs by far more.
TOLERANCE = 0.02


class CannotSplit(Exception):
    """The model does not pass the hidden states of its decoder to its head, position by position."""


class SplitModel:
    """A model of transformers whose body and head run apart.

    Args:
        model: a causal language model.

    Raises:
        CannotSplit: It has no decoder of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        find: Any = getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else None
        if not isinstance(decoder, nn.Module) or decoder is model:
            raise CannotSplit
        self.model, self.decoder = model, decoder
        self._device = next(model.parameters()).device
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._options = {"use_cache": False} if hasattr(text, "use_cache") else {}
        self._output: Any = None  # the last output of the decoder, without hidden states

    def __call__(self, tokens: Tensor) -> DeferredLogits:
        """Return the logits of tokens (windows, length). Raises CannotSplit."""
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return what the decoder computes for tokens, (windows, length, width). Raises CannotSplit."""
        return self.run(lambda: self.model(tokens.to(self._device), **self._options))

    def logits(self, hidden: Tensor) -> DeferredLogits:
        """Return the logits of hidden states (windows, length, width) that `run` returned."""
        return DeferredLogits(lambda window, positions: self.head(hidden[window, positions]))

    def run(self, call: Callable[[], object]) -> Tensor:
        """Run a call of the model, whose head sees the last position alone.

        Args:
            call: calls the model once.

        Returns:
            The hidden states (windows, length, width) that the decoder returned.

        Raises:
            CannotSplit: The decoder was not called once, or returns something else than hidden states.
        """
        own, outputs = self.decoder.forward, []

        def body(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            outputs.append(output)
            return _with_hidden(output, _hidden(output)[:, -1:])

        with self._decoder_forward(body):
            call()
        if len(outputs) != 1:
            raise CannotSplit
        hidden = _hidden(outputs[0])
        self._output = _with_hidden(outputs[0], hidden[:, :0].detach().clone())
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, vocabulary) of hidden states (n, width) that the body computed."""
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=self._device)
        with self._decoder_forward(lambda *_, **__: _with_hidden(self._output, hidden[None])):
            return output_tensor(self.model(tokens, **self._options))[0]

    def free_body(self) -> None:
        """Free the parameters of the decoder, but for those that the head shares."""
        inside = set(self.decoder.modules())
        others = (module for module in self.model.modules() if module not in inside)
        kept = {id(parameter) for module in others for parameter in module._parameters.values()}
        for module in inside:
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in kept:
                    module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        trim_malloc()

    @contextmanager
    def _decoder_forward(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Run another function in place of the decoder's forward."""
        attributes = vars(self.decoder)
        before = attributes.get("forward")
        attributes["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


def split_model(model: nn.Module, tokens: Tensor) -> SplitModel | None:
    """Return a model in two parts; None where both parts do not give the logits of the whole.

    Args:
        model: any model.
        tokens: (windows, length) token ids, of which the first two are tried.
    """
    few = tokens[:1, :2]
    last = slice(few.shape[1] - 1, None)
    try:
        split = SplitModel(model)
        expected = output_tensor(model(few.to(next(model.parameters()).device)))[0, last]
        found = split(few)[0, last]
        return split if is_close(found, expected) else None
    except Exception:  # of the model's own code, which may want more from its decoder
        return None


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return True if both are the logits (n, vocabulary) of one computation, rounded differently."""
    if found.shape != expected.shape:
        return False
    both = torch.stack([found.float(), expected.float()]).nan_to_num(0.0, 0.0, 0.0)
    return bool((both[0] - both[1]).abs().max() <= TOLERANCE * both.abs().max())


def deferred_output_fn(model: nn.Module) -> OutputFn:
    """Return a function from tokens (windows, length) on any device to logits, or hidden states of an encoder.

    Logits are computed when they are read, unless the model cannot be split.
    """
    found: list[OutputFn] = []

    def output(tokens: Tensor) -> Output:
        if not found:
            found.append(split_model(model, tokens) or output_fn(model))
        return found[0](tokens)

    return output


def recorded_output_fn(
    model: nn.Module, batches: Iterable[Tensor], progress: Progress, free_body: bool
) -> OutputFn:
    """Run a model on all its tokens now, so that only its head is needed when the outputs are requested.

    Args:
        model: the model.
        batches: tokens (windows, length), batch by batch.
        progress: advanced by one for each window.
        free_body: free the parameters that the head does not need; the model is not used afterwards.

    Returns:
        A function that returns the output for each batch, in order.
    """
    outputs = recorded_outputs(model, list(batches), progress, free_body)
    if outputs is None:
        return output_fn(model)
    following = iter(outputs)
    return lambda _: next(following)


def recorded_outputs(
    model: nn.Module, batches: Sequence[Tensor], progress: Progress, free_body: bool
) -> list[DeferredLogits] | None:
    """Run a model on all its tokens now; returns the output for each batch, None where it cannot be split.

    Args:
        model: the model.
        batches: tokens (windows, length), batch by batch.
        progress: advanced by one for each window.
        free_body: free the parameters that the head does not need; the model is not used afterwards.
    """
    split = split_model(model, batches[0])
    if split is None:
        return None
    outputs = []
    for tokens in batches:
        outputs.append(split(tokens))
        progress.advance(len(tokens))
    if free_body:
        split.free_body()
    return outputs


def share_equal_parameters(model: nn.Module, other: nn.Module) -> None:
    """Let a model use the parameters of another one that have its names and values, which frees its own.

    Quantization leaves embeddings, head and norms as they are unless it is asked to change them.
    """
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for key, own in module._parameters.items():
            found = theirs.get(f"{path}.{key}" if path else key)
            if own is None or found is None or found.is_meta or found is own:
                continue
            if (own.dtype, own.device) == (found.dtype, found.device) and torch.equal(own, found):
                module._parameters[key] = found


def _hidden(output: Any) -> Tensor:
    """Return the hidden states (windows, length, width) in the output of a decoder. Raises CannotSplit."""
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise CannotSplit
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return the output of a decoder with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})
