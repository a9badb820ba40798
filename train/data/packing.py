"""Packs samples into rows."""

from __future__ import annotations

from collections.abc import Sequence

# Candidates for filling a row, spread over all remaining lengths: more hardly fill it better, and take longer.
_WINDOW = 32


def pack(lengths: Sequence[int], images: Sequence[int], rows: int, context: int, images_per_row: int):
    """Puts every sample into one of `rows` rows of `context` tokens and at most `images_per_row` images.

    Each row takes the longest remaining sample and then, from a window over the others, the subset that fills it best:
    a subset sum over token counts, one for each number of images. (On Janus's mix, where half the samples have the same
    length, best-fit decreasing leaves 5% of the tokens empty, and this 2%.)

    Args:
      lengths, images: tokens and images of each sample, integers.
    Returns: a list of `rows` lists of sample indices, or None if they do not all fit. Deterministic.
    """
    if sum(lengths) > rows * context or sum(images) > rows * images_per_row:
        return None
    lengths, images = [int(n) for n in lengths], [int(n) for n in images]
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packed: list[list[int]] = []
    for _ in range(rows):
        if not left:
            packed.append([])
            continue
        first = left[0]
        if lengths[first] > context or images[first] > images_per_row:
            return None
        left = left[1:]
        window = _spread(len(left))
        chosen = _fill(
            [lengths[left[at]] for at in window],
            [images[left[at]] for at in window],
            context - lengths[first],
            images_per_row - images[first],
        )
        packed.append([first, *(left[window[j]] for j in chosen)])
        for at in sorted((window[j] for j in chosen), reverse=True):
            del left[at]
    return None if left else packed


def _spread(count: int) -> Sequence[int]:
    """Positions in a list of so many samples: all, or as many as the window has."""
    return range(count) if count <= _WINDOW else [j * count // _WINDOW for j in range(_WINDOW)]


def _fill(lengths: list[int], images: list[int], room: int, images_room: int) -> list[int]:
    """Indices whose lengths sum as close to `room` as can be, with at most `images_room` images."""
    # Bit n of reachable[c]: some subset has n tokens and c images. One snapshot per sample, for backtracking.
    below = (1 << (room + 1)) - 1
    reachable = [1] + [0] * images_room
    history = [reachable]
    for length, count in zip(lengths, images, strict=True):
        shifted = [(reachable[c - count] << length) & below if c >= count else 0 for c in range(images_room + 1)]
        reachable = [old | new for old, new in zip(reachable, shifted, strict=True)]
        history.append(reachable)
        if any(sums >> room for sums in reachable):
            break
    # Among equally full rows, the one with most images, since those are harder to place later.
    c = max(range(images_room + 1), key=lambda c: (reachable[c].bit_length(), c))
    total, chosen = reachable[c].bit_length() - 1, []
    for j in range(len(history) - 2, -1, -1):
        if not history[j][c] >> total & 1:
            chosen.append(j)
            total, c = total - lengths[j], c - images[j]
    return chosen
