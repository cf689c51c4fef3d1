"""Computes how AdamW changes a row in steps that do not look it up; the changes are applied when it is next needed.

A row without a gradient still changes: its weight decays, and its momentum keeps moving it. Let a be the last step
whose update has been applied to the row, with weight w and moments m and v. At step t:

    m_t = beta1^(t-a) m        v_t = beta2^(t-a) v        w_t = D(a) w - m sum_{j=a+1..t} A_j / (sqrt(v) + eps C_j)

    D(a) = prod_{j=a+1..t} (1 - lr_j wd_j)                factor of the weight decay
    C_j  = sqrt(1 - beta2^j) / sqrt(beta2)^(j-a)          bias correction, and decay of sqrt(v)
    A_j  = D(j) lr_j C_j beta1^(j-a) / (1 - beta1^j)

The factors A_j / C_j fall like beta1^(j-a), so the sum ends when the rest is below 1e-7 of it. The terms are grouped
into blocks of growing length. Each block is replaced by the two-point Gauss rule of the weights A_j at the nodes C_j:
two terms with the same sums of A_j C_j^k for k = 0..3. Where the C_j of a block are close together, one term at their
mean replaces the block. All of this is exact in the limit of sqrt(v) >> eps. In general the weight differs from the
result of AdamW on the whole table by less than 1e-4 of one update (lr), if beta1 <= 0.9 and beta2 >= 0.95.
"""

import math

import torch

_NEGLIGIBLE = 1e-7
_LONGEST_BLOCK = 32
_CLOSE = 1e-5
"""A block becomes one term if (squared coefficient of variation of its C_j) x (share of the sum from this block on)
is at most this value.
"""


class MissedSteps:
    """Stores the learning rate and weight decay of the steps since all rows were last brought up to date."""

    def __init__(self, beta1: float, beta2: float, eps: float, first: torch.Tensor) -> None:
        """Args:
        beta1: Adam's beta1; 0 if there is no momentum.
        beta2: Adam's beta2.
        eps: the constant in Adam's denominator.
        first: number of the last step whose update has been applied to all rows, [1] integer.
        """
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.blocks = _blocks(beta1, beta2)
        self.restart(first)

    def restart(self, step: torch.Tensor) -> None:
        """Discards the stored steps, because all rows are now up to date with `step`, [1] integer."""
        self.first = self.last = step.clone()
        self.recorded = 0
        """Number of steps after `first`, including skipped ones, because only the device knows which steps were
        skipped.
        """

        # Per step from `first` on: lr / (1 - beta1^j), sqrt(1 - beta2^j), and the sum of log(1 - lr wd) up to it.
        self._of_steps = torch.zeros(1024, 3, dtype=torch.float64, device=step.device)

    def record(self, learning_rate: float, weight_decay: float, is_applied: torch.Tensor) -> None:
        """Adds a step if `is_applied`, a boolean scalar on the device, is True."""
        self.recorded += 1
        if self.recorded == len(self._of_steps):
            self._of_steps = torch.cat((self._of_steps, torch.zeros_like(self._of_steps)))
        step = (self.last + 1).double()
        corrected = learning_rate / (1 - self.beta1**step), (1 - self.beta2**step).sqrt()
        decay = self._log(self.last) + math.log1p(-learning_rate * weight_decay)
        # The next step overwrites a step that was skipped.
        self._of_steps.index_copy_(0, self.last + 1 - self.first, torch.stack((*corrected, decay), dim=1))
        self.last = self.last + is_applied

    def decay(self, since: torch.Tensor) -> torch.Tensor:
        """Returns D(a) for steps a, [n] integers -> [n] in float64."""
        return (self._log(self.last) - self._log(since)).exp()

    def moment_terms(
        self, since: torch.Tensor, *, host_reads: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the terms of the sum over missed steps, as pairs of A and C.

        Args:
            since: the steps a, [n] integers.
            host_reads: whether the host may read values (on a GPU, it has to wait for them) to omit terms that no row
                needs. The sum is the same in both cases.

        Returns:
            Pairs of tensors [n] in float64; an entry of A is 0 where a row has missed no step of the block.
        """
        reads = host_reads and since.numel() > 0
        longest = int(self.last - since.min()) if reads else self.recorded
        terms = []
        for start, end in self.blocks:
            if start < longest:
                offsets = torch.arange(start + 1, min(end, longest) + 1, device=since.device)
                block = self._block(since, offsets)
                close = _CLOSE / _ratio(self.beta1, self.beta2) ** start
                terms += _gauss_rule(*block, close=close, host_reads=reads)
        return terms

    def _block(self, since: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A and C of the steps `since + offsets`, each [n, length]; A is 0 for steps in the future."""
        steps = since.unsqueeze(1) + offsets
        missed = steps <= self.last
        rate, root, decay = self._of_steps[steps.minimum(self.last) - self.first].unbind(-1)
        shift = root * self.beta2 ** (-offsets.double() / 2)
        weight = (
            (self._log(self.last) - decay).exp_().mul_(rate).mul_(shift).mul_(self.beta1 ** offsets.double())
        )
        return weight.where(missed, 0.0), shift

    def _log(self, step: torch.Tensor) -> torch.Tensor:
        return self._of_steps[step - self.first, 2]


def _ratio(beta1: float, beta2: float) -> float:
    """Returns the factor by which a row's movement falls from step to step."""
    return beta1 / math.sqrt(beta2)


def _blocks(beta1: float, beta2: float) -> list[tuple[int, int]]:
    """Returns the blocks (start, end) of missed steps, until the rest of the sum is negligible."""
    if beta1 == 0.0:
        return []
    end = math.ceil(math.log(_NEGLIGIBLE) / math.log(_ratio(beta1, beta2)))
    blocks, start = [], 0
    while start < end:
        length = min(2 + start // 2, _LONGEST_BLOCK)
        blocks.append((start, start + length))
        start += length
    return blocks


def _gauss_rule(
    weight: torch.Tensor, node: torch.Tensor, *, close: float, host_reads: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the two-point Gauss rule of positive weights at nodes, [n, length] -> one or two pairs of [n].

    Nodes whose variance is at most `close` times their squared mean are replaced by their mean.
    """
    total = weight.sum(1)
    share = weight / total.clamp(min=1e-300).unsqueeze(1)
    # If all weights are 0, any node except 0 can be used; the node becomes a divisor.
    mean = (share * node).sum(1).where(total > 0, 1.0)
    distance = node - mean.unsqueeze(1)
    variance = (share * distance.square()).sum(1)
    several = variance > close * mean.square()
    if host_reads and not several.any():
        return [(total, mean)]
    spread = variance.where(several, 1.0).sqrt()
    skew = ((share * distance.pow(3)).sum(1) / spread.pow(3) / 2).where(several, 0.0)
    spread = spread.where(several, 0.0)
    length = (1 + skew.square()).sqrt()
    return [
        (total / 2 * (1 - sign * skew / length), mean + spread * (skew + sign * length)) for sign in (1, -1)
    ]
