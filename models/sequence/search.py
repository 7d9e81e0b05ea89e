"""Writes the likeliest target of a source, token by token: greedily, or by beam search."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def search(
    module: Any, source_BS: Tensor, mask_BS: Tensor, end: int, *, beams: int, most: int, stops: bool = True
) -> list[list[int]]:
    """The tokens found for each source, without the end-of-text token.

    Of the beams, those with the highest probability so far are kept, and of those that are left at the end the one with
    the highest mean log-probability per token is returned (arXiv:1609.08144, eq. 14 with alpha 1).

    Args:
        module: see `models.sequence.encoder_decoder.encoder_decoder`.
        end: the token that a target begins after and ends with.
        beams: 1: greedy.
        most: tokens.
        stops: as soon as all have ended. False: `most` steps in any case, for modules whose steps are collectives.
    """
    batch, device = len(source_BS), source_BS.device
    state = tuple(each.repeat_interleave(beams, 0) for each in module.begin(source_BS, mask_BS))
    tokens = torch.full((batch * beams, 1), end, device=device)
    score_BK = torch.full((batch, beams), float("-inf"), device=device)
    score_BK[:, 0] = 0  # all beams are equal as yet
    ended = torch.zeros(batch * beams, dtype=torch.bool, device=device)
    row_B1 = torch.arange(batch, device=device)[:, None] * beams
    for _ in range(most):
        logits, state = module.step(tokens[:, -1], state)
        log_p = logits.float().log_softmax(-1)
        only_end = torch.full_like(log_p[0], float("-inf"))
        only_end[end] = 0
        log_p = torch.where(ended[:, None], only_end, log_p).view(batch, beams, -1)
        score_BK, chosen_BK = (score_BK[..., None] + log_p).flatten(1).topk(beams)
        rows = (row_B1 + chosen_BK // log_p.shape[2]).flatten()
        added = (chosen_BK % log_p.shape[2]).flatten()
        tokens, state = torch.cat([tokens[rows], added[:, None]], 1), tuple(each[rows] for each in state)
        ended = ended[rows] | (added == end)
        if stops and bool(ended.all()):
            break
    lengths_BK = ((tokens[:, 1:] != end).sum(1) + ended).view(batch, beams)
    best_B = (score_BK / lengths_BK.clamp(min=1)).argmax(1)
    found = tokens[(row_B1[:, 0] + best_B), 1:].tolist()
    return [row[: row.index(end)] if end in row else row for row in found]
