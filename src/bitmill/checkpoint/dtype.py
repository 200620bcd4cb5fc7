"""The dtype that config.json states, the default of transformers when it loads a folder."""

from __future__ import annotations

import torch

from bitmill.models.streamed import StreamedModel

HEADROOM = 2  # of float16's largest value over the largest hidden state seen: other texts may have larger ones


def stated_dtype(streamed: StreamedModel) -> torch.dtype:
    """Return the dtype for config.json: that of the tensors outside the blocks, where the model can run in it.

    float16 is stated only if it holds the hidden states seen while quantizing; where none were seen, only if the
    source states it. Otherwise it is float32, in which the model is calibrated and measured.
    """
    dtypes = (streamed.dtype(name) for name in streamed.non_block_tensors())
    stored = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    if stored != torch.float16:
        return stored
    largest = streamed.largest_hidden_state
    if largest is None:
        return stored if streamed.source.states_dtype else torch.float32
    return stored if largest * HEADROOM <= torch.finfo(stored).max else torch.float32
