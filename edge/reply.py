"""One assistant reply: reading the state from the first token, then the words of a response.

Owns what the model's tokens mean. Does not know turns nor frames (see `session`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge.contract import TokenIds
from edge.decoder import Decoder
from edge.sampling import Sampler, largest
from edge.tokenizer import ReplyText, Tokenizer
from edge.turn import TurnState


class StateReader:
    """Recognises the three states, spelt as one token each or in pieces.

    A checkpoint trained with state tokens uses one; one trained without spells `</Silence>` in several, and the first
    may be shared. Adding tokens that a model was not trained with would break it, so both are read as exported.
    """

    def __init__(self, tokens: TokenIds) -> None:
        self._states = {
            tokens.silence: TurnState.SILENCE,
            tokens.standby: TurnState.STANDBY,
            tokens.response: TurnState.RESPONSE,
        }
        self.silence_ids = list(tokens.silence)
        self.stop_ids = frozenset((tokens.im_end, tokens.end_of_text))

    def match(self, ids: list[int]) -> TurnState | None:
        """The state that `ids` spell, or None."""
        return self._states.get(tuple(ids))

    def may_become_state(self, ids: list[int]) -> bool:
        """Whether `ids` are the beginning of a state and more tokens are needed to tell."""
        return any(len(state) > len(ids) and state[: len(ids)] == tuple(ids) for state in self._states)


class Reply:
    """The reply of one turn.

    Attributes:
      ids: the reply's tokens, state included, closing tokens not.
      unfed_ids: those of them that the KV cache does not hold yet.
      state, text, truncated, off_protocol: as in `turn.Turn`.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, states: StateReader, sampler: Sampler, max_tokens: int
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._states = states
        self._sampler = sampler
        self._max_tokens = max_tokens
        self.ids: list[int] = []
        self.unfed_ids: list[int] = []
        self.state = TurnState.SILENCE
        self.text = ""
        self.truncated = False
        self.off_protocol = False

    def run(self, logits: np.ndarray, on_text: Callable[[str], None] | None) -> None:
        """Decide from the logits after the turn's prompt; generate the words if the model responds.

        Cost: no decode step for silence and standby; one for each token of a response.
        """
        token_id = largest(logits)
        self.ids = [token_id]
        while self._states.may_become_state(self.ids) and self._states.match(self.ids) is None:
            token_id = largest(self._decoder.decode_step(token_id))
            self.ids.append(token_id)
        self.unfed_ids = [token_id]
        state = self._states.match(self.ids)
        if state in (TurnState.SILENCE, TurnState.STANDBY):
            self.state = state
            return
        self.off_protocol = state is None
        self._speak(on_text)

    def stay_silent(self) -> None:
        """Answer silence without asking the model, as the official loop does before the first question."""
        self.ids = list(self._states.silence_ids)
        self.unfed_ids = self.ids

    def _speak(self, on_text: Callable[[str], None] | None) -> None:
        text = ReplyText(self._tokenizer)

        def give_out(piece: str) -> None:
            if piece and on_text is not None:
                on_text(piece)

        if self.off_protocol:  # the model broke the protocol: its first tokens are words, and stay in the history
            if self.ids[-1] in self._states.stop_ids:
                self.ids.pop()
                self.unfed_ids = []
                return
            for token_id in self.ids:
                give_out(text.push(token_id))
        self.state = TurnState.RESPONSE
        self.truncated = True
        while len(self.ids) < self._max_tokens:
            token_id = self._sampler.choose(self._decoder.decode_step(self.ids[-1]))
            if token_id in self._states.stop_ids:
                self.unfed_ids = []
                self.truncated = False
                break
            self.ids.append(token_id)
            self.unfed_ids = [token_id]
            give_out(text.push(token_id))
        give_out(text.finish())
        self.text = text.text.rstrip()
