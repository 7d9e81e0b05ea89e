"""Which tokens each expert takes: collected at an evaluation, counted by rank 0, written as JSON and Markdown.

Shapes: N tokens examined, k experts per token, E experts.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config
from models.tasks.task import Task
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.engine.parallel import Place
from trainer.files.own_files import write_text
from trainer.processes import collectives

LOOKED_AT = 1 << 14
"""Tokens examined per evaluation, over all processes: enough to see the common tokens. Gathering them takes
N * k * MoE layers * 2 bytes, 13 MB for 48 layers of top-8."""
KEPT = 5
"""The newest tables, which stay in a run's folder; a tracker keeps all that it was sent. A large model's has 1.5 MB."""
TOP = 10
"""Tokens listed per expert."""

Piece = tuple[np.ndarray, dict[int, np.ndarray]]
"""Tokens, int32 [N], and for each MoE layer (by its index in the model) their experts, int16 [N, k]."""


class Taken(NamedTuple):
    """A token that an expert takes."""

    token: int
    times: int
    """How often the expert took it."""
    share: float
    """`times` as a fraction of the token's occurrences."""


class ExpertTokens:
    """The routers' choices for the first tokens that this process evaluates.

    Tensor-parallel processes see the same tokens, so only one of them keeps them. A sequence-parallel process keeps
    its part of each sequence, a pipeline stage its own layers.
    """

    def __init__(self, config: Config, where: Place, task: Task):
        """For a task with `routed` layers."""
        parallel, self._task = config.parallel, task
        self._layers, self._k = task.routed or [], config.model.top_k
        self._left = -(-LOOKED_AT // (parallel.dp * parallel.sp)) if where.tp == 0 else 0
        self._tokens: list[Tensor] = []
        self._choices: list[Tensor] = []

    def add(self, batch: Any, choices: Sequence[Tensor]) -> None:
        """Add a batch just evaluated.

        Args:
            choices: one [S, k] per MoE layer.
        """
        if not (self._left and choices):
            return
        assert len(choices) == len(self._layers)
        token_S = self._task.routed_tokens(batch)
        shown = (token_S >= 0).nonzero()[: self._left, 0]
        self._left -= len(shown)
        self._tokens.append(token_S[shown].int())
        self._choices.append(torch.stack([choice_Sk[shown] for choice_Sk in choices]).short())

    def gather(self) -> list[Piece] | None:
        """What was added in all processes, on rank 0; None on the others. Every process must call it."""
        if self._tokens:
            token_N, choice_LNk = torch.cat(self._tokens), torch.cat(self._choices, dim=1)
        else:
            token_N, choice_LNk = torch.empty(0, dtype=torch.int32), torch.empty(0, 0, self._k, dtype=torch.int16)
        mine = torch.cat([part.flatten().view(torch.uint8) for part in (token_N, choice_LNk)])
        if not dist.is_initialized():
            return _pieces(mine, self._layers, self._k)
        layers = collectives.from_all(self._layers)
        everyone = collectives.to_chief(mine)
        if everyone is None:
            return None
        return [piece for part, its in zip(everyone, layers, strict=True) for piece in _pieces(part, its, self._k)]


def _pieces(sent: Tensor, layers: Sequence[int], k: int) -> list[Piece]:
    """Decode one process's bytes (its tokens, then the experts of each layer): one piece, or none without tokens."""
    bytes_B, a_token = sent.cpu().numpy(), 4 + 2 * k * len(layers)
    tokens = len(bytes_B) // a_token
    if len(bytes_B) != tokens * a_token:
        raise RuntimeError(f"{len(bytes_B):,} bytes is not a whole number of tokens with {len(layers)} MoE layers")
    if not tokens:
        return []
    choice_LNk = bytes_B[4 * tokens :].view(np.int16).reshape(len(layers), tokens, k)
    return [(bytes_B[: 4 * tokens].view(np.int32), dict(zip(layers, choice_LNk, strict=True)))]


def top_tokens(tokens_N: np.ndarray, choice_Nk: np.ndarray, experts: int) -> list[list[Taken]]:
    """For each expert, up to `TOP` tokens that it takes beyond its share of all tokens, the highest score first.

    The score is count * ln(share of the token's occurrences / share of all tokens that the expert takes), the pair's
    term in the mutual information of token and expert. By count alone every expert would list the most frequent
    tokens; by share alone, tokens that occur once.
    """
    k = choice_Nk.shape[1]
    pair_P, count_P = np.unique(tokens_N.astype(np.int64).repeat(k) * experts + choice_Nk.ravel(), return_counts=True)
    token_P, expert_P = np.divmod(pair_P, experts)
    share_P = count_P / np.bincount(tokens_N)[token_P]
    load_E = np.bincount(choice_Nk.ravel(), minlength=experts) / len(tokens_N)
    score_P = count_P * np.log(share_P / load_E[expert_P])
    above = np.flatnonzero(score_P > 1e-9)
    order = above[np.lexsort((token_P[above], -score_P[above], expert_P[above]))]
    ends = np.searchsorted(expert_P[order], np.arange(experts + 1))
    return [
        [Taken(int(token_P[i]), int(count_P[i]), float(share_P[i])) for i in order[first : min(first + TOP, end)]]
        for first, end in itertools.pairwise(ends)
    ]


def table(pieces: Sequence[Piece], config: Config, tokenizer: TokenizerProcess, step: int) -> dict[str, Any]:
    """The table as written to JSON: for each MoE layer and expert its load, relative to an even share, and its tokens
    as [id, text, count, share]."""
    experts, layers, looked_at = config.model.num_experts, [], 0
    for number, layer in enumerate(sorted({layer for _, choices in pieces for layer in choices})):
        held = [(tokens, choices[layer]) for tokens, choices in pieces if layer in choices]
        tokens_N = np.concatenate([tokens for tokens, _ in held])
        choice_Nk = np.concatenate([choice for _, choice in held])
        looked_at = len(tokens_N)
        load_E = np.bincount(choice_Nk.ravel(), minlength=experts) * (experts / choice_Nk.size)
        rows = [
            {"load": round(float(load), 3),
             "tokens": [[t.token, readable(tokenizer, t.token), t.times, round(t.share, 3)] for t in taken]}
            for load, taken in zip(load_E, top_tokens(tokens_N, choice_Nk, experts), strict=True)
        ]  # fmt: skip
        layers.append({"moe_layer": number, "layer": layer, "experts": rows})
    return {"step": step, "tokens": looked_at, "top_k": config.model.top_k, "layers": layers}


def readable(tokenizer: TokenizerProcess, token: int) -> str:
    """A token's text as a Python literal; for a special token or part of a character, its name in the vocabulary."""
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:
        return tokenizer.id_to_token(token) or f"<{token}>"
    return repr(text)


def write_table(found: dict[str, Any], path: Path) -> list[Path]:
    """Write `table` to `path`.json and, to be read by people, to `path`.md; delete all but the last `KEPT` tables.
    Returns the two files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(found, ensure_ascii=False, separators=(",", ":")))
    lines = [
        f"# Tokens each expert takes, step {found['step']}",
        "",
        f"From {found['tokens']} held-out tokens, each routed to {found['top_k']} experts per layer. For each expert:",
        "its load relative to an even share, and the tokens that it takes most beyond its share of all tokens (by",
        "count * ln(share of the token's occurrences / share of all tokens that it takes)): token, count, share of",
        "the token's occurrences.",
    ]
    for layer in found["layers"]:
        lines += ["", f"## MoE layer {layer['moe_layer']} (layer {layer['layer']} of the model)", ""]
        for expert, row in enumerate(layer["experts"]):
            told = ", ".join(f"{_code(text)} {count} {share:.0%}" for _, text, count, share in row["tokens"])
            lines.append(f"- expert {expert}, {row['load']:.2f}x: {told or 'none'}")
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    for suffix in (".json", ".md"):
        # Names sort by step (eight digits). Tables of later steps predate a rollback and will be overwritten.
        tables = sorted(old for old in path.parent.glob(f"experts-step-*{suffix}") if old.stem <= path.stem)
        for old in tables[:-KEPT]:
            old.unlink(missing_ok=True)
    return [path.with_suffix(".json"), path.with_suffix(".md")]


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"
