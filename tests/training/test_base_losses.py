"""Base losses: worked numbers, a float64 formula, chunks, and which positions count."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_kernels.training import base_losses
from trimkv_kernels.training.packing import Packing

pytestmark = pytest.mark.numeric

TEACHER = torch.tensor([0.7, 0.2, 0.1])
STUDENT = torch.tensor([0.5, 0.3, 0.2])


def test_worked_numbers() -> None:
    """Hidden states are log probabilities here, and the head passes them on."""
    losses = base_losses(
        STUDENT.log()[None, None],
        TEACHER.log()[None, None],
        nn.Identity(),
        torch.tensor([[2]]),
        base_loss="fwkl_rvkl_ntp",
    )
    assert {name: round(loss.item(), 6) for name, loss in losses.items()} == {
        "fwkl": 0.085123,
        "rvkl": 0.092033,
        "ntp": round(-STUDENT[2].log().item(), 6),
    }


def make_inputs(seed: int = 0) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    torch.manual_seed(seed)
    head = nn.Linear(6, 11, bias=False).requires_grad_(False)
    student = torch.randn(2, 9, 6, requires_grad=True)
    target = torch.randint(11, (2, 9))
    target[torch.rand(2, 9) < 0.4] = -100
    return student, torch.randn(2, 9, 6), head, target


def exact_losses(student: Tensor, teacher: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    """fwkl, rvkl and ntp, position by position in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for row in range(student.shape[0]):
        for t in range(student.shape[1]):
            if target[row, t] >= 0:
                q = (head.weight.double() @ student[row, t].double()).softmax(0)
                p = (head.weight.double() @ teacher[row, t].double()).softmax(0)
                forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
                sums = sums + torch.stack([forward, reverse, -q[target[row, t]].log()])
                count += 1
    return sums / count


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_against_float64(chunk: int) -> None:
    student, teacher, head, target = make_inputs()
    shapes: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: shapes.append(len(inputs[0])))
    found = base_losses(student, teacher, head, target, base_loss="fwkl_rvkl_ntp", chunk=chunk)
    values = torch.stack([found[name] for name in ("fwkl", "rvkl", "ntp")])
    expected = exact_losses(student, teacher, head, target)
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(values.sum(), student)
    (exact_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=1e-7)
    assert not grad[target < 0].any()
    assert max(shapes) == min(chunk, int((target >= 0).sum()))


def test_ntp_needs_no_teacher() -> None:
    student, _, head, target = make_inputs()
    loss = base_losses(student, None, head, target, base_loss="ntp")["ntp"]
    expected = F.cross_entropy(head(student).flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_no_target_is_zero_with_a_graph() -> None:
    student, teacher, head, target = make_inputs()
    losses = base_losses(student, teacher, head, torch.full_like(target, -100))
    loss = losses["fwkl"] + losses["ntp"]
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_targets_stand_before_their_labels() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 8, 9]])
    whole = Packing.of((1, 6), labels.device)
    assert whole.targets(labels).tolist() == [[5, 6, -100, 8, 9, -100]]
    # The last token of a document predicts nothing, and padding is not predicted.
    packed = Packing.of((1, 6), labels.device, position_ids=torch.tensor([[0, 1, 0, 1, 2, 0]]))
    assert packed.targets(labels).tolist() == [[5, -100, -100, 8, -100, -100]]
    padded = Packing.of((1, 6), labels.device, valid=torch.tensor([[0, 1, 1, 1, 1, 0]]))
    assert padded.targets(labels).tolist() == [[-100, 6, -100, 8, -100, -100]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_loss": "kl"}, "base_loss must be one of 'fwkl', 'rvkl', 'ntp'"),
        ({"base_loss": "ntp_ntp"}, "different ones joined by '_'"),
        ({"teacher": None}, "teacher must be given: base_loss 'fwkl_ntp' compares with it"),
        ({"teacher": torch.zeros(2, 9, 5)}, "teacher must have shape [2, 9, 6], got [2, 9, 5]"),
        ({"target": torch.zeros(2, 8).long()}, "target must have shape [2, 9], got [2, 8]"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    names = ("student", "teacher", "head", "target")
    arguments = {**dict(zip(names, make_inputs(), strict=True)), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        base_losses(**arguments)
