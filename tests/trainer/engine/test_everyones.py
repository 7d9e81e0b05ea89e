"""What all processes have of a tensor: in the order of the processes, with the gradient of all their losses."""

import torch
from teams import in_team
from torch import distributed as dist

from trainer.engine.parallel import everyones


def gathered() -> tuple[list, int, list]:
    """(the whole, where the own part begins, the own part's gradient), where each process counts squares once more."""
    rank = dist.get_rank()
    own = torch.arange(4.0).view(2, 2) + 10 * rank
    own.requires_grad_()
    whole, first = everyones(own)
    ((rank + 1) * whole.square().sum()).backward()
    assert own.grad is not None
    return whole.tolist(), first, own.grad.tolist()


def test_a_part_has_the_gradient_of_every_process():
    found = in_team(2, gathered)
    whole = [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert [each[:2] for each in found] == [(whole, 0), (whole, 2)]
    for _, first, gradient in found:  # of 1 + 2 times the squares
        assert gradient == [[6 * number for number in row] for row in whole[first : first + 2]]
