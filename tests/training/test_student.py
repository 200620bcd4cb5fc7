"""The trainable model of a folder: its outputs, its gradients, what it learns."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.models.split import recorded_outputs
from bitmill.progress import Progress
from bitmill.training.distil import Training, WindowSet
from bitmill.training.options import TrainingOptions
from bitmill.training.student import LearnedTensor, Student


def student_of(folder, windows, learn="all"):
    dtypes = {name: entry.dtype for name, entry in open_checkpoint(folder).entries.items()}
    return Student(bitmill.load(folder), dtypes, learn, windows)


@pytest.mark.parametrize("name", ["uniform", "gptqt", "codebook"])
def test_a_student_starts_as_the_folder(folders, windows, name):
    folder = folders(name)
    student, checkpoint = student_of(folder, windows), open_checkpoint(folder)
    with torch.no_grad():
        logits = student.split(windows[:1])[0, slice(0, 32)]
        torch.testing.assert_close(logits, bitmill.load(folder, dense=True)(windows[:1]).logits[0])
    for tensor, stored in student.state().items():
        assert torch.equal(stored, checkpoint.tensor(tensor))


def test_gradients_are_those_of_the_whole_model_at_once(folders, teacher, windows):
    student = student_of(folders("uniform"), windows)
    with torch.no_grad():
        expected = recorded_outputs(teacher, [windows[:1]], Progress(), free_body=False)
    training = Training(
        student, WindowSet(windows[:1], expected), WindowSet(windows[:1], expected), TrainingOptions()
    )
    loss = training._backward([0])
    found = [leaf.grad.clone() for leaf in student.leaves()]
    logits, target = student.split(windows[:1])[0, slice(0, 32)], expected[0][0, slice(0, 32)]
    whole = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(target, -1), log_target=True, reduction="batchmean"
    )
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for gradient, reference in zip(found, torch.autograd.grad(whole, student.leaves()), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-7)
    assert training.measure()["kl_divergence"] == pytest.approx(loss, rel=1e-5)


def test_what_is_learned(folders, windows):
    scales = set(student_of(folders("uniform"), windows, "scales").learned)
    norms = set(student_of(folders("uniform"), windows, "norms").learned)
    assert all(name.endswith(".scale") for name in scales)
    assert norms == {
        "model.norm.weight",
        *(f"model.layers.{k}.{n}_layernorm.weight" for k in range(2) for n in ("input", "post_attention")),
    }
    assert set(student_of(folders("uniform"), windows).learned) == scales | norms


def test_layers_share_what_their_format_shares(folders, windows):
    learned = student_of(folders("shared"), windows, "scales").learned
    assert {name.split(".")[0] for name in learned} == {"model", "shared_parts"}


def test_a_learned_tensor_computes_with_its_stored_form():
    tensor = LearnedTensor(torch.tensor([1.0, 3.0]), torch.float16)
    tensor.parameter.steps.data.fill_(1e-4)
    value = tensor.value()
    assert torch.equal(value.detach(), tensor.stored().float())
    value.sum().backward()
    torch.testing.assert_close(tensor.parameter.steps.grad, tensor.parameter.unit.expand(2))
