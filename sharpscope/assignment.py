"""Which rank finds which cells of alphas that are measured at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Piece = tuple[int, str]  # chain and kind of a cell
SETUP = ""  # in place of a kind: what comes before the first measure of an alpha


@dataclass(frozen=True)
class Task:
    """Cells of one alpha that one rank finds."""

    index: int
    chain: int
    kinds: tuple[str, ...]  # in their order
    at_home: bool = True  # where the chain's start vectors are


def kind_of(key: str) -> str:
    """Return what a cell is at any alpha: its split and measure.

    >>> kind_of("0.5|id|trace")
    'id|trace'
    """
    return key.partition("|")[2]


def assigned(
    wanted: Mapping[int, Sequence[str]], size: int, seconds: Mapping[Piece, float], bound: Collection[str]
) -> list[list[Task]]:
    """Return the tasks of each of ``size`` ranks in a round.

    Every chain has a home. Until it is known what its cells take, all are found there. Then those that are not bound
    go, the longest first, to the rank that is through with them soonest: alphas that come out even over the ranks stay
    whole, and of those left over one rank finds this and another that.

    Parameters
    ----------
    wanted
        Index of each alpha of the round, in the order of the chains, with the kinds of its cells that are wanted.
    size
        Number of ranks.
    seconds
        What a kind took at the last alpha of a chain; under :data:`SETUP` what was done there before it.
    bound
        Kinds that go on from what they left at the alpha before, and so stay at home.
    """
    pieces = [(chain, kind) for chain, kinds in enumerate(wanted.values()) for kind in kinds]
    rooted = pieces if any(piece not in seconds for piece in pieces) else [p for p in pieces if p[1] in bound]
    shares = _Shares(size, seconds)
    for piece in rooted:
        shares.give(piece, piece[0] % size)
    for piece in sorted(set(pieces) - set(rooted), key=lambda piece: (-seconds[piece], pieces.index(piece))):
        shares.give(piece, shares.soonest(piece))
    found = []
    for rank, mine in enumerate(shares.pieces):
        own = ((i, c, tuple(k for k in kinds if (c, k) in mine)) for c, (i, kinds) in enumerate(wanted.items()))
        found.append([Task(index, chain, kinds, rank == chain % size) for index, chain, kinds in own if kinds])
    return found


class _Shares:
    """What each rank has been given so far, and how long it takes for that."""

    def __init__(self, size: int, seconds: Mapping[Piece, float]) -> None:
        self.pieces: list[set[Piece]] = [set() for _ in range(size)]
        self._loads = [0.0] * size
        self._seconds = seconds

    def give(self, piece: Piece, rank: int) -> None:
        self._loads[rank] = self._end(piece, rank)
        self.pieces[rank].add(piece)

    def soonest(self, piece: Piece) -> int:
        """Return the rank that would be through with the piece first; where several would, its home or the first."""
        ranks, home = range(len(self.pieces)), piece[0] % len(self.pieces)
        return min(ranks, key=lambda rank: (self._end(piece, rank), rank != home))

    def _end(self, piece: Piece, rank: int) -> float:
        begun = any(chain == piece[0] for chain, _ in self.pieces[rank])
        setup = 0.0 if begun else self._seconds.get((piece[0], SETUP), 0.0)
        return self._loads[rank] + setup + self._seconds.get(piece, 0.0)
