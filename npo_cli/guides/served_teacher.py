"""A dense target's teacher behind an HTTP server: vLLM's prompt log-probabilities of the policy's own token ids.

The server returns, for each position, the log-probabilities of the token and of the K most probable tokens, at
temperature 1. The divergence compares K + 1 probabilities, the last one of all other tokens together (`target.top_k`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from npo_cli.errors import NpoError, RunFailed
from npo_cli.losses.divergence import DivergenceName
from npo_cli.policy.logprobs import TokenScores, TopTokens
from npo_cli.policy.model import Policy
from npo_cli.policy.packing import PackedRows, TokenRow

if TYPE_CHECKING:
    from npo_cli.inference.openai_client import OpenAIClient, ScoredToken

NUM_CHECKED_TOKENS = 64
"""Tokens of the policy's vocabulary whose text is compared with the server's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTeacher:
    """The model of a server, with the policy's tokenizer."""

    client: OpenAIClient
    top_k: int
    """Tokens per position; 0: the response's own tokens only."""

    def score(
        self,
        rows: Sequence[TokenRow],
        *,
        temperature: float,
        chunk_tokens: int,
        pack_sizes: Sequence[int] | None = None,
    ) -> TokenScores:
        """Log-probability of each response token, `(N, T)`."""
        logps_NT = torch.zeros(len(rows), max(len(row.response_ids) for row in rows))
        for number, (row, scored) in enumerate(zip(rows, self.score_tokens(rows), strict=True)):
            logps_NT[number, : len(row.response_ids)] = torch.tensor([token.logp for token in scored])
        return TokenScores(logps_NT=logps_NT)

    def check(self, policy: Policy) -> None:
        """Refuse a server whose tokens are not the policy's, by the text of some of them."""
        size = len(policy.tokenizer)
        ids = tuple(range(0, size, max(1, size // NUM_CHECKED_TOKENS)))[:NUM_CHECKED_TOKENS]
        (scored,) = self.score_tokens([TokenRow(prompt_ids=ids[:1], response_ids=ids[1:])])
        for token_id, token in zip(ids[1:], scored, strict=True):
            if token.text is not None and token.text != policy.tokenizer.decode([token_id]):
                raise NpoError(
                    f"token {token_id} is {token.text!r} on the server, and {policy.tokenizer.decode([token_id])!r} in "
                    "the policy's tokenizer: its probabilities are of other tokens",
                    "choose a teacher with the policy's tokenizer, or use it as a guide: npo sample-guide",
                )

    def score_tokens(self, rows: Sequence[TokenRow]) -> list[list[ScoredToken]]:
        """The response tokens of each row, after the teacher's prompt."""
        rows = [row.as_teacher_reads for row in rows]
        found = self.client.score([(*row.prompt_ids, *row.response_ids) for row in rows], top_k=self.top_k)
        answers = [tokens[len(row.prompt_ids) :] for row, tokens in zip(rows, found, strict=True)]
        if any(len(token.top) != self.top_k for tokens in answers for token in tokens):
            raise RunFailed(
                f"{self.client.url} returned fewer than {self.top_k} tokens at a position",
                "lower target.top_k, or start the server with a higher --max-logprobs",
            )
        return answers


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedDistillation:
    """The comparison of the policy's distributions with the K most probable tokens of a served teacher."""

    teacher: ServedTeacher
    divergence: DivergenceName

    def compute_states(
        self, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None, packed: PackedRows, *, temperature: float
    ) -> TopTokens:
        """The teacher's tokens at each position of the packed rows; the first of several responses to a prompt stands
        for the distribution of their first token."""
        scored = self.teacher.score_tokens(rows)
        firsts = list(packed.first_token_of_unit[:-1])
        places = zip(packed.response_M[firsts].tolist(), packed.token_M[firsts].tolist(), strict=True)
        tops = [scored[row][token].top for row, token in places]
        device = packed.input_ids_BL.device
        return TopTokens(
            ids_UK=torch.tensor([list(top) for top in tops], device=device),
            logps_UK=torch.tensor([list(top.values()) for top in tops], device=device),
            divergence=self.divergence,
        )
