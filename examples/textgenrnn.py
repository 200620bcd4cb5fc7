"""Port the pretrained LSTM of textgenrnn, check it against NumPy, and quantize it.

    pip install h5py && python examples/textgenrnn.py PACKAGE

PACKAGE is the folder `textgenrnn` inside the source distribution textgenrnn 2.0.0 of PyPI (`pip download --no-deps
textgenrnn==2.0.0`, then unpack it). The network is a program of its own and no demo model of bitmill, because it
is no stream: it predicts each character from a window of exactly 40, padded in front, and fails on other lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bitmill
from bitmill.recurrent.config import LstmConfig
from bitmill.recurrent.convert import load_layer
from bitmill.recurrent.model import LstmForCausalLM

WINDOW = 40
START = "<s>"
Arrays = dict[str, np.ndarray]  # layer/name -> array


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of textgenrnn's HDF5 file."""
    import h5py

    found: Arrays = {}

    def keep(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            layer, *_, leaf = name.split("/")
            found[f"{layer}/{leaf.removesuffix(':0')}"] = np.asarray(item[()], np.float32)

    with h5py.File(path, "r") as file:
        file.visititems(keep)
    return found


def gates(arrays: Arrays, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return W (4 hidden, in), U (4 hidden, hidden) and b (4 hidden,) of a layer of Keras' CuDNNLSTM.

    In the kernel the numbers of each gate are those of (hidden, in), row by row, whatever its shape says.
    """
    kernel, recurrent, bias = (arrays[f"{layer}/{name}"] for name in ("kernel", "recurrent_kernel", "bias"))
    hidden, columns = recurrent.shape[0], kernel.shape[0]
    W = np.concatenate([part.reshape(hidden, columns) for part in np.hsplit(kernel, 4)])
    return W, np.concatenate(np.hsplit(recurrent, 4)), bias.reshape(2, -1).sum(0)


@torch.no_grad()
def port(arrays: Arrays) -> LstmForCausalLM:
    """Return the network as a recurrent language model."""
    vocabulary, width = arrays["embedding/embeddings"].shape
    hidden = arrays["rnn_1/recurrent_kernel"].shape[0]
    config = LstmConfig(
        vocab_size=vocabulary,
        embedding_size=width,
        hidden_size=hidden,
        num_hidden_layers=2,
        concat_layers=True,
        attention_average=True,
        head_bias=True,
    )
    model = LstmForCausalLM(config).eval()
    assert model.model.average is not None
    for layer, name in zip(model.model.layers, ("rnn_1", "rnn_2")):
        load_layer(layer, *(torch.from_numpy(array) for array in gates(arrays, name)))
    model.model.embed_tokens.weight.copy_(torch.from_numpy(arrays["embedding/embeddings"]))
    model.model.average.weight.copy_(torch.from_numpy(arrays["attention/attention_W"][:, 0]))
    model.lm_head.weight.copy_(torch.from_numpy(arrays["output/kernel"].T))
    model.lm_head.bias.copy_(torch.from_numpy(arrays["output/bias"]))
    return model


def reference(arrays: Arrays, ids: np.ndarray) -> np.ndarray:
    """Return the probabilities of the next character after a window of ids (length,), by NumPy alone."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    streams = [arrays["embedding/embeddings"][ids]]
    for name in ("rnn_1", "rnn_2"):
        W, U, b = gates(arrays, name)
        h = c = np.zeros(U.shape[1], np.float32)
        outputs = []
        for x in streams[-1]:
            i, f, g, o = np.split(W @ x + U @ h + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            outputs.append(h)
        streams.append(np.stack(outputs))
    joined = np.concatenate(streams, 1)
    scores = np.exp(joined @ arrays["attention/attention_W"][:, 0])
    average = (scores / scores.sum()) @ joined
    logits = average @ arrays["output/kernel"] + arrays["output/bias"]
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def windows_of(text: str, vocabulary: dict[str, int]) -> Tensor:
    """Return every window (characters, 41) of a text: 40 ids, padded with 0 in front, and the next one."""
    ids = [0] * (WINDOW - 1) + [vocabulary[START]] + [vocabulary.get(character, 0) for character in text]
    return torch.tensor(ids).unfold(0, WINDOW + 1, 1)


@torch.no_grad()
def bits_per_character(model: nn.Module, windows: Tensor) -> float:
    """Return the mean -log2 P of the last character of every window."""
    logits = torch.cat([model(part[:, :-1], use_cache=False).logits[:, -1] for part in windows.split(256)])
    return float(nn.functional.cross_entropy(logits, windows[:, -1])) / float(np.log(2))


def main() -> None:
    """Port, check, quantize, and print bits per character."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("package", type=Path)
    options.add_argument("--text", type=Path, help="to measure on; novels without")
    options.add_argument("--characters", type=int, default=4000)
    given = options.parse_args()

    arrays = read_arrays(given.package / "textgenrnn_weights.hdf5")
    vocabulary = json.loads((given.package / "textgenrnn_vocab.json").read_text(encoding="utf-8"))
    model = port(arrays)
    from bitmill.data.text import load_documents

    if given.text:
        text = given.text.read_text(encoding="utf-8")
        measured, calibration = text[: given.characters], text[given.characters :]
    else:
        measured = "\n".join(load_documents("prose", "eval"))[: given.characters]
        calibration = "\n".join(load_documents("prose", "calib"))
    windows = windows_of(measured, vocabulary)
    probabilities = model(windows[:20, :-1]).logits[:, -1].softmax(-1).detach().numpy()
    pairs = zip(windows[:20, :-1].numpy(), probabilities)
    worst = max(np.abs(reference(arrays, ids) - found).max() for ids, found in pairs)
    print(f"largest difference of a probability from NumPy: {worst:.1e}")
    print(f"float: {bits_per_character(model, windows):.3f} bits per character")
    calib = windows_of(calibration[: 64 * 50], vocabulary)[::50, :-1]
    for method in ("rtn", "gptq"):
        for bits in (4, 3, 2):
            quantized = copy.deepcopy(model)
            outcome = bitmill.quantize(quantized, method, bits=bits, calib=calib, measure=0)
            found = bits_per_character(quantized, windows)
            print(f"{method}, {bits} bits ({outcome.summary['bits_per_weight']:.2f}): {found:.3f}")


if __name__ == "__main__":
    main()
