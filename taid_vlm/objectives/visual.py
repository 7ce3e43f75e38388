"""What a teacher sees: weights for the tokens that need the image, and losses on visual features.

Features are those that enter the language model, one vector per image token; they are averaged
over the cells of a grid first, so that models with other numbers of tokens can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def advantage_weight(advantage: Tensor, strength: float) -> Tensor:
    """1 + strength (1 - exp(-max(A, 0))), in [1, 1 + strength].

    A function of the token alone: dividing by a batch's sum would make the gradient depend on how
    a step is cut into batches.

    Args:
        advantage: [N] nats that the image adds to the teacher's log-likelihood of each token.
        strength: how much more the most advantaged token counts, >= 0.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import advantage_weight
        >>> advantage_weight(torch.tensor([-1.0, 0.0, 0.7, 50.0]), strength=1.0)
        tensor([1.0000, 1.0000, 1.5034, 2.0000])
    """
    return 1 - strength * torch.expm1(-advantage.clamp(min=0))


def pool(features: Tensor, shape: tuple[int, int], grid: int) -> Tensor:
    """Average features over the cells of a grid (adaptive average pooling, as in torch).

    Cell i of n covers rows floor(i r / n) to ceil((i + 1) r / n), so that any number of rows
    r works: cells share rows, or several cells show the same one. As products of matrices the
    gradient is the same at every run, which torch's own pooling on a GPU does not promise.

    Args:
        features: [rows * columns, D], row by row.
        shape: (rows, columns).

    Returns:
        [grid * grid, D], float32 at least.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import pool
        >>> pool(torch.arange(8.0)[:, None], shape=(2, 4), grid=2).T  # two rows of four, D = 1
        tensor([[0.5000, 2.5000, 4.5000, 6.5000]])
    """
    vertical, horizontal = (_cells(size, grid, features) for size in shape)
    laid = features.to(vertical.dtype).unflatten(0, shape)
    return torch.einsum("ir,jc,rcd->ijd", vertical, horizontal, laid).flatten(0, 1)


def _cells(size: int, grid: int, like: Tensor) -> Tensor:
    """[grid, size]: how much of every row goes into every cell."""
    weights = torch.zeros(grid, size, dtype=torch.promote_types(like.dtype, torch.float32))
    for cell in range(grid):
        start, end = cell * size // grid, -(-(cell + 1) * size // grid)
        weights[cell, start:end] = 1 / (end - start)
    return weights.to(like.device)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each cell, averaged over cells.

    Args:
        student, teacher: [images, cells, D], of one width. No gradient flows into the teacher's.

    Returns:
        [images], each in [0, 2].

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import feature_loss
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # an image of two cells
        >>> teacher = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> feature_loss(student, teacher)  # 0 where they point alike, 1 where they are orthogonal
        tensor([0.5000])
    """
    return (1 - cosine_similarity(student, teacher.detach(), dim=-1)).mean(-1)


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all cells of an image.

    Args:
        student, teacher: [images, cells, D] and [images, cells, D'].

    Returns:
        [images]; the mean is over all cells * cells pairs.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import relation_loss
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # two cells alike
        >>> teacher = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # unlike; another width
        >>> relation_loss(student, teacher)  # two of the four pairs differ by 1
        tensor([0.5000])
    """
    ours, theirs = (normalize(x, dim=-1) for x in (student, teacher.detach()))
    return (ours @ ours.mT - theirs @ theirs.mT).square().mean((-2, -1))
