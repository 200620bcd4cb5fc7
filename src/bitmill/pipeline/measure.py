"""Quality measured while quantizing: held-out windows pass the float blocks and the quantized blocks.

Both streams pass each block while it is in memory anyway, so a model that does not fit into memory is measured
too.
"""

from __future__ import annotations

from typing import Any

import torch

from bitmill.calibration.walk import HiddenStates
from bitmill.data.text import Windows
from bitmill.evaluation.logits import pieces
from bitmill.evaluation.reference import ReferenceRecorder
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.embeddings import QuantizedEmbeddings
from bitmill.progress import Progress

MEASURING = "measuring"  # name of the task in the progress


class HeldOutMetrics:
    """Hidden states of held-out windows in the float and in the quantized model, one window per batch.

    Attributes:
        float: hidden states of the float model.
        quantized: hidden states of the quantized model.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        windows: Windows,
        recorder: ReferenceRecorder | None = None,
        domains: dict[str, int] | None = None,
    ) -> None:
        """Embed the windows; needs the weights of the side "embedding" in memory.

        Args:
            streamed: the float model.
            windows: held-out windows.
            recorder: receives the float model's predictions.
            domains: domain -> number of its windows, in their order.
        """
        self.domains = domains
        self.streamed, self.windows, self.recorder = streamed, windows, recorder
        self.metric = streamed.task.metric()
        self.quantized = HiddenStates(streamed, [window[None] for window in windows])
        self.float = self.quantized.fork()

    @torch.no_grad()
    def result(
        self, embeddings: QuantizedEmbeddings | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Compare the predictions on all windows; needs the weights of the side "head" in memory.

        Args:
            embeddings: holds the quantized head, which the quantized stream leaves through; None for the float
                head.
            progress: advanced by one for each window.

        Returns:
            The figures of the task's metric.
        """
        progress = progress or Progress()
        progress.start(MEASURING, len(self.windows))
        for window, reference, quantized in zip(self.windows, self.float.batches, self.quantized.batches):
            tokens = window[None]
            expected = self.streamed.deferred_head(tokens, reference)
            head = embeddings.deferred_head if embeddings else self.streamed.deferred_head
            self.metric.add(tokens, head(tokens, quantized), expected)
            if self.recorder:
                self.recorder.add(window, pieces(expected, 0, len(window)))
            progress.advance()
        progress.finish()
        return self.metric.result(self.domains)
