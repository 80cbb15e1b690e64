"""The averaged copy follows its rule exactly, whatever the student does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysemi.engine.teacher import AveragedCopy
from raysemi.methods.base import Average

YES = torch.tensor(True)
NO = torch.tensor(False)


class Student(nn.Module):
    """One weight, one constant, one counter: all that an average has to treat differently."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("constant", torch.tensor([0.485, 0.1]))
        self.register_buffer("counter", torch.tensor(0))

    def set(self, value: float) -> None:
        self.weight.data.fill_(value)
        self.counter += 1


def test_ema_gives_the_worked_values():
    """data-and-eval.md section 6: s = 1, 2, 4, 8 gives t = 1, 1.5, 2.3333, 3.75."""
    student = Student(-5.0)
    teacher = AveragedCopy(student, Average(kind="ema", decay=0.996), period=3)
    got = []
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        student.set(value)
        teacher.after_step(student, step, YES)
        got.append(teacher.model.weight.item())
    assert got == pytest.approx([1.0, 1.5, 7 / 3, 3.75], abs=1e-6)
    assert got[0] == 1.0  # after the first step teacher and student are the same to the last bit
    assert torch.equal(teacher.model.constant, student.constant)
    assert teacher.model.counter.dtype == torch.int64
    assert teacher.model.counter.item() == 4


@pytest.mark.parametrize("step", [0, 1, 300])
def test_ema_stays_where_a_step_was_not_finite(step):
    student = Student(2.0)
    teacher = AveragedCopy(student, Average(kind="ema"), period=3)
    teacher.after_step(student, step, NO)
    student.set(3.0)
    teacher.after_step(student, step, NO)
    if step:
        assert teacher.model.weight.item() == 2.0


def test_ema_copies_before_its_start_and_for_some_periods_after():
    """Periods of 2 steps: a start at 1 and one copied period make a copy of steps 0-3; then i counts from step 2."""
    student = Student(-5.0)
    teacher = AveragedCopy(student, Average(kind="ema", decay=0.7, start=1, copied=1), period=2)
    got = []
    for step in range(7):
        student.set(float(step))
        teacher.after_step(student, step, YES)
        got.append(teacher.model.weight.item())
    assert got[:4] == [0.0, 1.0, 2.0, 3.0]
    expected = [3.0]
    for value, decay in ((4.0, 1 - 1 / 3), (5.0, 0.7), (6.0, 0.7)):  # i = 2, 3, 4
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert got[4:] == pytest.approx(expected[1:], abs=1e-6)


def test_own_buffers_are_copied_until_the_start_and_then_left_alone():
    """u2pl.md section 2: parameters alone are the student's in the first semi-supervised epoch, and then averaged."""
    student = Student(1.0)
    teacher = AveragedCopy(student, Average(kind="ema", start=1, copied=1, buffers="own"), period=1)
    student.set(2.0)
    student.constant.fill_(0.5)
    teacher.after_step(student, 0, YES)
    assert torch.equal(teacher.model.constant, student.constant)
    for step, (value, expected) in enumerate(((4.0, 4.0), (8.0, 6.0)), start=1):  # copied, then d = 1 - 1/2
        teacher.model.constant.fill_(0.25 * step)  # as its own pass would
        counter = teacher.model.counter.clone()
        student.set(value)
        student.constant.fill_(3.0)
        teacher.after_step(student, step, YES)
        assert teacher.model.weight.tolist() == pytest.approx([expected])
        assert teacher.model.constant.tolist() == [0.25 * step] * 2
        assert torch.equal(teacher.model.counter, counter)


def test_the_copy_is_the_student_during_the_first_period():
    """augseg.md section 7.7; afterwards d = min(1 - 1/(i+1), decay) with the global step i."""
    student = Student(0.1)
    teacher = AveragedCopy(student, Average(kind="ema", decay=0.6, copied=1), period=3)
    expected = 0.0
    for step, value in enumerate((0.3, 0.7, 1 / 3, 2.0, 5.0)):
        student.set(value)
        teacher.after_step(student, step, YES)
        if step < 3:
            assert torch.equal(teacher.model.weight, student.weight)
            expected = value
        else:
            expected = 0.6 * expected + 0.4 * value
            assert teacher.model.weight.item() == pytest.approx(expected, abs=1e-6)
            assert not torch.equal(teacher.model.weight, student.weight)
    student.set(9.0)
    before = teacher.model.weight.clone()
    teacher.after_step(student, 5, NO)
    assert torch.equal(teacher.model.weight, before)


def test_running_statistics_are_averaged_like_weights():
    """augseg.md section 7.8: running mean = d * old + (1 - d) * student's."""
    student = nn.BatchNorm1d(2)
    teacher = AveragedCopy(student, Average(kind="ema", decay=0.75), period=3)
    student.running_mean.copy_(torch.tensor([4.0, -8.0]))
    teacher.model.running_mean.copy_(torch.tensor([2.0, 1.0]))
    teacher.after_step(student, 100, YES)
    torch.testing.assert_close(teacher.model.running_mean, torch.tensor([2.5, -1.25]))


def test_momentum_network_averages_once_a_period():
    """derprop.md section 10: theta = 1, 2, 3 from 0 with ratio 0.5 gives 0.5, 1.25, 2.125."""
    student = Student(0.0)
    network = AveragedCopy(student, Average(kind="period", ratio=0.5), period=2)
    assert not network.started
    got = []
    for step in range(6):
        student.set(float(step // 2 + 1))
        network.before_step(student, step)
        network.after_step(student, step, YES)
        got.append(network.model.weight.item())
    assert got == [0.0, 0.5, 0.5, 1.25, 1.25, 2.125]
    assert network.started


def test_reference_averages_at_the_start_of_every_period_but_the_first():
    student = Student(0.0)
    network = AveragedCopy(student, Average(kind="period", ratio=0.5, at="start"), period=2)
    got = []
    for step in range(6):
        network.before_step(student, step)
        student.set(float(step + 1))
        network.after_step(student, step, YES)
        got.append(network.model.weight.item())
    # theta after steps 0..5 is 1..6; averaged with theta = 2 at the start of step 2, with 4 at the start of step 4
    assert got == [0.0, 0.0, 1.0, 1.0, 2.5, 2.5]


def test_no_gradient_reaches_the_copy():
    student = Student(1.0)
    copy = AveragedCopy(student, Average(kind="ema"), period=1)
    assert not any(p.requires_grad for p in copy.model.parameters())
    assert not copy.model.training
