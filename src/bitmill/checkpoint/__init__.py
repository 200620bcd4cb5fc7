"""The quantized model on disk: an ordinary Hugging Face folder with packed tensors and a full record."""

from bitmill.checkpoint.config import quantization_config
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.checkpoint.writer import FolderSink

__all__ = ["Checkpoint", "FolderSink", "open_checkpoint", "quantization_config", "verify"]
