"""Pack token stores into endless batches of one shape.

A row packs whole documents of one head, so that each row trains exactly one head; every batch holds first a fixed
number of coherence rows, then diversity rows, so shapes never change under `torch.compile`. Sources are drawn by the
token share that they are behind on; the order of documents is a seeded shuffle per epoch. The state is a few integers
per source: a resumed packer yields the very batches that an uninterrupted one would.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from duet_moe.finetune.corpus import read_sources
from duet_moe.finetune.token_store import TokenStore, encode, encode_corpus
from duet_moe.finetune.tokenizer import PAD

__all__ = ["COHERENCE", "DIVERSITY", "IGNORED", "Packer", "TokenStore", "encode", "encode_corpus"]

IGNORED = -100  # label that the loss skips
COHERENCE, DIVERSITY = 0, 1
_BUFFER = 64  # pieces that a row may be packed from
_TAIL = 64  # tokens left in a row below which the best fit is taken instead of the next piece


@dataclass(frozen=True)
class _Piece:
    """Tokens `start` to `stop` of one document of one store."""

    store: int
    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class _Lane:
    """The endless stream of pieces for one head on one rank."""

    def __init__(self, stores: Sequence[TokenStore], head: int, packer: "Packer") -> None:
        names = ("both", "coherence" if head == COHERENCE else "diversity")
        self.stores = stores
        self.members = [index for index, store in enumerate(stores) if store.source.head in names and len(store)]
        self.head = head
        self.packer = packer
        self.drawn = [0] * len(stores)  # tokens
        self.epochs = [0] * len(stores)
        self.cursors = [0] * len(stores)
        self.buffer: list[_Piece] = []
        self.orders: dict[int, np.ndarray] = {}

    def weight(self, index: int) -> float:
        source = self.stores[index].source
        return source.weight / 2 if source.head == "both" else source.weight

    def order(self, index: int) -> np.ndarray:
        """Documents of a store that this lane reads in its current epoch."""
        if index not in self.orders:
            self.orders[index] = self.epoch_order(index, self.epochs[index])
        return self.orders[index]

    def epoch_order(self, index: int, epoch: int) -> np.ndarray:
        """Documents of a store that this lane reads in `epoch`."""
        both = self.stores[index].source.head == "both"
        lanes = self.packer.world * (2 if both else 1)
        lane = self.packer.rank * 2 + self.head if both else self.packer.rank
        shuffled = np.random.default_rng([self.packer.seed, index, epoch]).permutation(len(self.stores[index]))
        return shuffled[lane::lanes] if len(shuffled) >= lanes else shuffled

    def refill(self) -> None:
        while len(self.buffer) < _BUFFER:
            index = min(self.members, key=lambda member: self.drawn[member] / self.weight(member))
            order = self.order(index)
            document = int(order[self.cursors[index]])
            self.cursors[index] += 1
            if self.cursors[index] == len(order):
                self.epochs[index] += 1
                self.cursors[index] = 0
                del self.orders[index]
            pieces = self.packer.pieces(index, document)
            self.drawn[index] += sum(map(len, pieces))
            self.buffer.extend(pieces)

    def row(self) -> list[_Piece]:
        """Take the pieces of the next row: oldest first, best fit at the end."""
        taken: list[_Piece] = []
        left = self.packer.seq_len
        while left:
            self.refill()
            fitting = [piece for piece in self.buffer if len(piece) <= left]
            if not fitting:
                break
            piece = fitting[0] if left > _TAIL else max(fitting, key=len)
            self.buffer.remove(piece)
            taken.append(piece)
            left -= len(piece)
        return taken


class Packer(Iterator[dict[str, torch.Tensor]]):
    """Endless batches of packed rows.

    A batch has `input_ids` and `labels` (B, T) int64, `document_ids` (B, T) int32 and `head` (B,) int64 (0 coherence,
    1 diversity). Labels stand at the index of their token; they are -100 on padding, on the first token of every
    document or piece, and on prompts with `response_only`. `document_ids` count from 0 in each row, -1 on padding.

    Args:
        coherence_rows (`int`, *optional*): rows of the coherence head in every batch, which come first;
            by default the weights decide.
        rank, world (`int`): this process and their number; ranks read disjoint documents in every epoch.

    Raises:
        ValueError: no documents, impossible sizes, or rows asked for a head that has no source.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        coherence_rows: int | None = None,
        response_only: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or seq_len < 2:
            raise ValueError(f"batch_size {batch_size}, seq_len {seq_len}; give at least 1 row of 2 tokens")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; give 0 <= rank < world")
        self.stores = list(stores)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.response_only, self.rank, self.world = response_only, rank, world
        self._lanes = [_Lane(self.stores, head, self) for head in (COHERENCE, DIVERSITY)]
        self.coherence_rows = self._rows(coherence_rows)

    @classmethod
    def from_recipe(
        cls,
        recipe: str | Path | Mapping[str, object],
        root: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        cache: str | Path,
        **options: object,
    ) -> "Packer":
        """Read, encode (or take from `cache`) and pack the sources of a recipe; `options` as for `Packer`."""
        train, _ = encode_corpus(read_sources(recipe), root, tokenizer, cache)
        return cls(train, **options)  # type: ignore[arg-type]

    def __next__(self) -> dict[str, torch.Tensor]:
        heads = [COHERENCE] * self.coherence_rows + [DIVERSITY] * (self.batch_size - self.coherence_rows)
        shape = (self.batch_size, self.seq_len)
        input_ids, labels = np.full(shape, PAD, np.int64), np.full(shape, IGNORED, np.int64)
        document_ids = np.full(shape, -1, np.int32)
        for row, head in enumerate(heads):
            at = 0
            for number, piece in enumerate(self._lanes[head].row()):
                span = slice(at, at + len(piece))
                input_ids[row, span], labels[row, span] = self._tokens(piece)
                document_ids[row, span] = number
                at += len(piece)
        arrays = {"input_ids": input_ids, "labels": labels, "document_ids": document_ids, "head": np.array(heads)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def pieces(self, store: int, document: int) -> list[_Piece]:
        """Cut a document into pieces of at most `seq_len` tokens; neighbours share one token, so all get a label."""
        ids, loss_start = self.stores[store].document(document)
        starts = range(0, max(len(ids) - 1, 1), self.seq_len - 1)
        pieces = [_Piece(store, document, start, min(start + self.seq_len, len(ids))) for start in starts]
        return [piece for piece in pieces if piece.stop > loss_start] if self.response_only else pieces

    def epochs(self) -> dict[str, float]:
        """Return how often this rank has gone through its part of every source, for the log."""
        passes = {}
        for index, store in enumerate(self.stores):
            lanes = [lane for lane in self._lanes if index in lane.members]
            done = [lane.epochs[index] + lane.cursors[index] / len(lane.order(index)) for lane in lanes]
            passes[store.source.name] = sum(done) / max(len(done), 1)
        return passes

    def documents_read(self) -> dict[str, set[int]]:
        """Return, by source, the documents that this rank has drawn from its store, those in waiting included."""
        read: dict[str, set[int]] = {store.source.name: set() for store in self.stores}
        for lane in self._lanes:
            for index in lane.members:
                drawn = [lane.epoch_order(index, epoch) for epoch in range(lane.epochs[index])]
                drawn.append(lane.order(index)[: lane.cursors[index]])
                read[self.stores[index].source.name].update(np.concatenate(drawn).tolist())
        return read

    def state_dict(self) -> dict[str, object]:
        """Return the position of every source and the pieces in waiting, as plain numbers (JSON-able)."""
        lanes = [
            {
                "drawn": list(lane.drawn),
                "epochs": list(lane.epochs),
                "cursors": list(lane.cursors),
                "buffer": [[piece.store, piece.document, piece.start, piece.stop] for piece in lane.buffer],
            }
            for lane in self._lanes
        ]
        return {"fingerprint": self._fingerprint(), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on exactly where `state_dict` was taken; ValueError when data or settings have changed since."""
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"packer state is for {state['fingerprint']}, this packer has {self._fingerprint()}; "
                "resume with the same recipe, data and batch settings"
            )
        for lane, saved in zip(self._lanes, state["lanes"], strict=True):  # type: ignore[call-overload]
            lane.drawn, lane.epochs = list(saved["drawn"]), list(saved["epochs"])
            lane.cursors = list(saved["cursors"])
            lane.buffer = [_Piece(*piece) for piece in saved["buffer"]]
            lane.orders = {}

    def _rows(self, wanted: int | None) -> int:
        weights = [sum(lane.weight(index) for index in lane.members) for lane in self._lanes]
        if not any(weights):
            raise ValueError("no source has documents; check the recipe's paths")
        if wanted is None:
            share = round(self.batch_size * weights[COHERENCE] / sum(weights))
            wanted = min(max(share, int(weights[COHERENCE] > 0)), self.batch_size - int(weights[DIVERSITY] > 0))
        rows = (wanted, self.batch_size - wanted)
        if min(rows) < 0 or any(number and not weight for number, weight in zip(rows, weights, strict=True)):
            raise ValueError(f"coherence_rows is {wanted} of {self.batch_size}, but the heads have weights {weights}")
        return wanted

    def _tokens(self, piece: _Piece) -> tuple[np.ndarray, np.ndarray]:
        ids, loss_start = self.stores[piece.store].document(piece.document)
        tokens = ids[piece.start : piece.stop]
        labels = tokens.astype(np.int64)
        first = max(1, loss_start - piece.start) if self.response_only else 1
        labels[:first] = IGNORED
        return tokens, labels

    def _fingerprint(self) -> str:
        settings = [self.batch_size, self.seq_len, self.seed, self.coherence_rows, self.response_only, self.world]
        sources = [[asdict(store.source), len(store), store.tokens] for store in self.stores]
        return hashlib.sha256(json.dumps([settings, self.rank, sources]).encode()).hexdigest()[:16]
