"""Token ids that the stream protocol needs, found by name in `tokenizer.json`.

Owns the look-up, and the tokens that training added without leaving a tokenizer. Does not tokenise conversations (see
`edge.tokenizer`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from edge.contract import TOKENIZER_FILE, TokenIds
from edge.errors import CheckpointError
from edge.prompt import END_OF_TEXT, IM_END, IMAGE_PAD, VISION_END, VISION_START, Protocol
from export.checkpoint import Checkpoint, parse_json, read_file

CONFIG_IDS = {
    "image_token_id": IMAGE_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TRAINING_FILE = "args.json"
"""Where ms-swift leaves the options of a training, beside an adapter too."""


def read_tokenizer(checkpoint: Checkpoint) -> bytes:
    """Content of the tokenizer file, with the tokens that training added.

    ms-swift leaves no tokenizer beside an adapter, only the names of the added tokens; they have the ids that follow
    the base tokenizer's, as transformers gives them.

    Raises:
      CheckpointError: a file is missing, is not what its name says, or belongs to another model.
    """
    folder = checkpoint.folder_of(TOKENIZER_FILE)
    content = read_file(folder, TOKENIZER_FILE)
    _check_model(content, checkpoint.config)
    adapter = checkpoint.adapter
    if adapter is None or folder == adapter.folder or not (adapter.folder / TRAINING_FILE).is_file():
        return content
    added = parse_json(TRAINING_FILE, read_file(adapter.folder, TRAINING_FILE)).get("new_special_tokens") or []
    if not isinstance(added, list) or not all(isinstance(text, str) for text in added):
        raise CheckpointError(f"`{TRAINING_FILE}` key `new_special_tokens`: expected a list of texts, found {added!r}")
    return with_special_tokens(content, added)


def _check_model(tokenizer_json: bytes, config: Mapping[str, Any]) -> None:
    """A tokenizer of another model has other ids for the tokens that `config.json` names by their ids."""
    ids = _names(parse_json(TOKENIZER_FILE, tokenizer_json))
    for key, text in CONFIG_IDS.items():
        if key in config and text in ids and config[key] != ids[text]:
            raise CheckpointError(
                f"`{TOKENIZER_FILE}` gives `{text}` the id {ids[text]}, `config.json` key `{key}` is {config[key]!r}",
                hint="Give the tokenizer that the model was trained with",
            )


def with_special_tokens(tokenizer_json: bytes, texts: list[str]) -> bytes:
    """The tokenizer file with special tokens added behind the others; those that it has stay as they are."""
    document = parse_json(TOKENIZER_FILE, tokenizer_json)
    ids = _names(document)
    missing = [text for text in dict.fromkeys(texts) if text not in ids]
    if not missing:
        return tokenizer_json
    first = max(ids.values(), default=-1) + 1
    form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = document.get("added_tokens") or []
    new = [{"id": first + place, "content": text, **form} for place, text in enumerate(missing)]
    return json.dumps({**document, "added_tokens": [*added, *new]}, ensure_ascii=False, indent=2).encode()


def token_ids(tokenizer_json: bytes, protocol: Protocol, rows: int, *, spelled_states: bool = False) -> TokenIds:
    """Find the ids.

    Args:
      tokenizer_json: content of the tokenizer file.
      rows: rows of the embedding table; every id must be below.
      spelled_states: a state that is no token of its own is taken as the pieces it is spelt in. Only for a model
        that was trained so; any text can be spelt, so without this a missing state would go unnoticed.

    Raises:
      CheckpointError: no tokenizer, a token missing, more ids than the embedding table has rows, or states that
        cannot be told apart.
    """
    document = parse_json(TOKENIZER_FILE, tokenizer_json)
    ids = _names(document)
    largest = max(ids.values(), default=-1)
    smallest = min(ids.values(), default=0)
    if smallest < 0:
        raise CheckpointError(f"`{TOKENIZER_FILE}` has the id {smallest}, ids start at 0", hint="Copy the file again")
    if largest >= rows:
        raise CheckpointError(
            f"`{TOKENIZER_FILE}` has ids up to {largest}, the embedding table has {rows} rows",
            hint="Resize the embeddings after adding tokens, as training did, and save model and tokenizer together",
        )
    spelled = tokenizer_json if spelled_states else None
    names = (protocol.silence, protocol.standby, protocol.response)
    states = [_state(text, ids, spelled) for text in names]
    _check_distinct(dict(zip(names, states, strict=True)))
    return TokenIds(
        silence=states[0],
        standby=states[1],
        response=states[2],
        image_pad=_required(IMAGE_PAD, ids),
        im_end=_required(IM_END, ids),
        end_of_text=_required(END_OF_TEXT, ids),
    )


def encoder(tokenizer_json: bytes) -> Callable[[str], list[int]]:
    """A function from text to token ids.

    Raises:
      CheckpointError: the tokenizer cannot be loaded.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise CheckpointError(
            f"`{TOKENIZER_FILE}` cannot be loaded: {error}", hint="Save the tokenizer with transformers"
        ) from None
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _names(document: dict[str, Any]) -> dict[str, int]:
    try:
        ids = dict(document["model"]["vocab"])
        ids.update((token["content"], token["id"]) for token in document.get("added_tokens") or [])
        return {str(text): int(token_id) for text, token_id in ids.items()}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(
            f"`{TOKENIZER_FILE}` has no vocabulary of byte-level BPE", hint="Save the tokenizer with transformers"
        ) from None


def _required(text: str, ids: dict[str, int]) -> int:
    if text not in ids:
        raise CheckpointError(f"`{TOKENIZER_FILE}` lacks the token `{text}`", hint="Use the tokenizer the model had")
    return ids[text]


def _state(text: str, ids: dict[str, int], tokenizer_json: bytes | None) -> tuple[int, ...]:
    if text in ids:
        return (ids[text],)
    if tokenizer_json is not None:
        pieces = encoder(tokenizer_json)(text)
        if pieces:
            return tuple(pieces)
    raise CheckpointError(
        f"`{TOKENIZER_FILE}` lacks the state token `{text}`: this model was not trained for streams",
        hint='Export a Streamo-trained checkpoint; if it spells its states in pieces, add `{"spelled_states": true}`'
        " as `streamo.json`",
    )


def _check_distinct(states: dict[str, tuple[int, ...]]) -> None:
    """No state's ids may begin another's: the decoder would have to guess."""
    for one, two in itertools.permutations(states, 2):
        if states[two][: len(states[one])] == states[one]:
            raise CheckpointError(
                f"`{TOKENIZER_FILE}` gives `{one}` the ids {list(states[one])} and `{two}` {list(states[two])}: "
                "the states cannot be told apart",
                hint="Give each state token an id of its own, as training did",
            )
