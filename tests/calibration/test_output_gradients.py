"""Gradients of the loss by the outputs of blocks equal autograd's on the whole model, up to a factor."""

from __future__ import annotations

import torch

from bitmill.calibration.output_gradients import OutputGradients
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.sources.module import ModuleSource
from bitmill.tasks.image import ImageClassifier
from helpers.tiny_models import tiny_vision_model

PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_equal_autograd(tmp_path):
    model = tiny_vision_model("dinov2_classifier")
    streamed, folder = StreamedModel(ModuleSource(model)), OutputGradients(tmp_path)
    with torch.no_grad():
        folder.measure(streamed, PICTURES, 2, Progress())
    loss, blocks = ImageClassifier().loss(), model.get_submodule(streamed.adapter.blocks)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for picture in PICTURES.repeat(2, 1, 1, 1):
        outputs: list[torch.Tensor] = []
        hooks = [block.register_forward_hook(lambda m, a, out, kept=outputs: kept.append(out)) for block in blocks]
        logits = model(picture[None]).logits
        for index, gradient in enumerate(torch.autograd.grad(loss(picture[None], logits), outputs)):
            seen[index].append(gradient)
        for hook in hooks:
            hook.remove()
    for index, expected in seen.items():
        whole = torch.cat(expected).view(2, 4, *expected[0].shape[1:])
        whole = whole / whole.square().mean().sqrt()
        found = torch.cat(folder.block(index, [torch.zeros(3, 5, 32), torch.zeros(1, 5, 32)]), 1)
        assert torch.allclose(found, whole, rtol=1e-3, atol=1e-3)
    assert folder.complete


def test_mean_square_of_a_classifiers_loss_is_the_fisher_information_of_its_logits():
    logits = torch.tensor([[1.0, -0.5, 0.3]], requires_grad=True)
    loss = ImageClassifier().loss()
    gradients = torch.stack([torch.autograd.grad(loss(torch.zeros(1), logits), logits)[0][0] for _ in range(3000)])
    p = logits[0].detach().softmax(-1)
    expected = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(gradients.T @ gradients / len(gradients), expected, atol=0.03)
