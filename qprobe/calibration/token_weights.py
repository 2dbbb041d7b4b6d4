"""How much the answers depend on each token that a linear reads: the weights of tokens in Gram matrices.

To second order the KL that an error e_t of a linear's outputs costs is 1/2 E[(sum_t <g_t, e_t>)^2], g_t the
gradient at the output for token t of the log-likelihood of an answer drawn from the model itself (the
Fisher metric). Where errors of different tokens and features are unrelated, token t counts E|g_t|^2 times;
GPTQ counts every token once. Gradients of given or greedy answers are no substitute: a model is sure of
those, so they nearly vanish.

The expectation over answers is estimated as the isolated KL is: by random directions with the covariance
diag(p) - p p^T of the logits' Fisher information, seeded by the sample (`qprobe.measure.attribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprobe.calibration.gram import SharedInput, counted_tokens, tiles_that_count
from qprobe.calibration.two_sided import MOST_OUTPUTS
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import FLOAT16_SCALE, direction, random_signs
from qprobe.measure.experts.routing import Product, owned, times
from qprobe.measure.hooks import checkpointed_blocks, replaced_forwards
from qprobe.measure.kl import read_out
from qprobe.measure.outputs import output_rows
from qprobe.measure.subject import Subject

DRAWS = 2  # random directions a sample; four left as much damage on SmolLM2, one 1 % of it more
DRAWS_LARGE = 1  # above `FLOAT32_UP_TO` parameters, where each takes as long as four passes
MIX = 0.5  # share of the weighted matrix; 0.25 to 1 left the same damage on SmolLM2 within the error


def draws(subject: Subject) -> int:
    """How many random directions a sample of this model gets."""
    return DRAWS if subject.path.dtype == torch.float32 else DRAWS_LARGE


@dataclass(frozen=True)
class TokenWeights:
    """Weights of the tokens that shared inputs hold, by leader and number of the batch.

    raw: (tokens,) float32 on the CPU, squared gradient norms summed over the linears that read the tensor and
    over draws. means: their mean over the tokens that count, each as often as its batch. outputs: Gram
    matrices of the gradients by linear, (out_features, out_features) float32, of those that `is_two_sided`. A
    leader that ran more than once in a batch is missing, with its linears: its runs cannot be told apart in
    the backward pass.
    """

    raw: Mapping[str, Sequence[Tensor]]
    means: Mapping[str, float]
    outputs: Mapping[str, Tensor]

    def of(self, leader: str, batch: int) -> Tensor | None:
        """(tokens,) float32 of mean one: what those of batch number `batch` count; None for once each."""
        mean = self.means.get(leader, 0.0)
        if not mean > 0:
            return None
        return (1 - MIX) + MIX * self.raw[leader][batch] / mean


def is_two_sided(subject: Subject, out_features: int) -> bool:
    """True if gradients at so many outputs of a linear are summed, for `qprobe.calibration.two_sided`.

    That is in small models, of linears whose matrix is small as well.
    """
    return subject.path.dtype == torch.float32 and out_features <= MOST_OUTPUTS


class TokenWeighing:
    """Sums up the weights of tokens in some shared inputs, over batches that come one after the other.

    two_sided: linears of which gradients' Gram matrices are summed as well, of those that `is_two_sided`.
    """

    def __init__(
        self, subject: Subject, inputs: Sequence[SharedInput], two_sided: Container[str] | None = None
    ) -> None:
        self._subject = subject
        self._leaders = {name: one.leader for one in inputs for name in one.names}
        self._raw: dict[str, list[Tensor]] = {one.leader: [] for one in inputs}
        self._sums = dict.fromkeys(self._raw, 0.0)
        self._counts = dict.fromkeys(self._raw, 0.0)
        self._repeated: set[str] = set()
        self._outputs: dict[str, Tensor] = {}
        self._one_sided = frozenset(
            name
            for name in self._leaders
            if not is_two_sided(subject, subject.layers[name].out_features)
            or (two_sided is not None and name not in two_sided)
        )

    def add_all(self, batches: Iterable[Batch], done: Callable[[], None] = lambda: None) -> None:
        """Add `batches`, as of `token_weights`; `done` is called after each."""
        for batch in batches:
            self._add(batch)
            done()

    def _add(self, batch: Batch) -> None:
        subject = self._subject
        is_limited = subject.limit is not None
        notes = _Notes(self._leaders, self._outputs, self._one_sided, is_limited, batch.weight)
        with subject.running("weights of tokens", batch.elements):
            _run(subject, batch, notes)
        tiles = tiles_that_count(batch)
        found_here = notes.on_host()
        for leader, found in self._raw.items():
            weights = found_here.get(leader, torch.zeros(notes.tokens.get(leader, 0)))
            mask = counted_tokens(subject.layers[leader], len(weights), batch, tiles)
            self._sums[leader] += batch.weight * float(weights.double().sum())
            self._counts[leader] += batch.weight * (len(weights) if mask is None else int(mask.sum()))
            found.append(weights)
        self._repeated |= notes.repeated

    @property
    def found(self) -> TokenWeights:
        """The weights in all batches so far. Its matrices are the sums themselves, which go on."""
        kept = {leader: list(found) for leader, found in self._raw.items() if leader not in self._repeated}
        means = {leader: self._sums[leader] / max(1, self._counts[leader]) for leader in kept}
        finite = {leader: mean for leader, mean in means.items() if mean < float("inf")}
        once = {name: one for name, one in self._outputs.items() if self._leaders[name] in kept}
        return TokenWeights(kept, finite, once)


def token_weights(
    subject: Subject,
    inputs: Sequence[SharedInput],
    batches: Iterable[Batch],
    done: Callable[[], None] = lambda: None,
) -> TokenWeights:
    """The weights of all tokens of `batches` in each of `inputs`; `done` is called after each batch.

    batches: in the dtype of the subject's path, which is open (`qprobe.measure.attribution.walking`).
    Costs `draws` forward and backward passes per batch. Tokens that reach no answer (padding, tiles that
    nothing attends to, a whole batch that no gradient comes back to) weigh 0. In a model without a language
    head the gradient is that of a random direction of its output.
    """
    weighing = TokenWeighing(subject, inputs)
    weighing.add_all(batches, done)
    return weighing.found


class _Notes:
    """Squared gradient norms of one batch, by leader.

    outputs: sums of gradients' Gram matrices, to which those of this batch are added, but for `one_sided`
    linears; they wait on the host if `is_limited`. weight: of the batch in these sums. tokens: how many each
    leader's linears read. repeated: leaders of linears that ran twice in it.
    """

    def __init__(
        self,
        leaders: Mapping[str, str],
        outputs: dict[str, Tensor],
        one_sided: frozenset[str],
        is_limited: bool,
        weight: float,
    ) -> None:
        self.leaders, self.outputs, self.one_sided = leaders, outputs, one_sided
        self.is_limited, self.weight = is_limited, weight
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.repeated: set[str] = set()
        self._runs: set[str] = set()

    def begin(self) -> None:
        """Begin another draw."""
        self._runs.clear()

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient (..., out_features) at the output of `name`."""
        squares = gradient.float().square().sum(dim=-1).reshape(-1)  # on its device: to wait would cost most
        leader = self.leaders[name]
        if name in self._runs:
            self.repeated.add(leader)
            return
        self._runs.add(name)
        so_far = self.weights.get(leader)
        self.weights[leader] = squares if so_far is None else so_far + squares.to(so_far.device)
        if name not in self.one_sided:
            rows = gradient.float().reshape(-1, gradient.shape[-1])
            product = rows.T @ rows
            if self.weight != 1:
                product *= self.weight
            there = self.outputs.get(name)
            kept = product.cpu() if self.is_limited else product
            self.outputs[name] = kept if there is None else there.add_(kept.to(there.device))

    def on_host(self) -> dict[str, Tensor]:
        """The weights on the CPU; one copy from each device."""
        found: dict[str, Tensor] = {}
        for device in {x.device for x in self.weights.values()}:
            here = {leader: x for leader, x in self.weights.items() if x.device == device}
            sizes = [len(x) for x in here.values()]
            found |= zip(here, torch.cat(list(here.values())).cpu().split(sizes), strict=True)
        return found


def _run(subject: Subject, batch: Batch, notes: _Notes) -> None:
    path = subject.path
    leaf = torch.zeros((), device=subject.reference.device, requires_grad=True)

    def forward(name: str, product: Product, x: Tensor) -> Tensor:
        x = x.to(path.dtype)

        def weight() -> Tensor:  # must not refer to x, which would live until the backward pass
            return subject.dequantized.own(name).to(path.dtype)

        if name not in notes.leaders:
            return times(product, x, weight())
        notes.tokens[notes.leaders[name]] = x.numel() // x.shape[-1]
        return _Weighed.apply(x, leaf.to(x.device), weight, product.bias, notes, name)

    scale = FLOAT16_SCALE if path.dtype == torch.float16 else 1.0
    with torch.enable_grad(), replaced_forwards(subject.modules, forward):
        for draw in range(draws(subject)):  # each with a forward of its own: blocks that run again do so once
            notes.begin()
            with checkpointed_blocks(subject.model, path.room_bytes):
                loss = _loss(subject, batch, draw)
                if loss.requires_grad:  # else none of the linears ran, as of a text those that read images
                    torch.autograd.grad(loss * scale, [leaf], allow_unused=True)


def _loss(subject: Subject, batch: Batch, draw: int) -> Tensor:
    """A scalar whose gradient at the model's output is random direction number `draw` of each sample."""
    if subject.readout is not None:
        rows = read_out(subject.model, batch)
        directions = [
            direction(subject.readout, z.detach(), f"{draw}{s.digest}")
            for z, s in zip(rows, batch.samples, strict=True)
        ]
    else:
        rows = output_rows(subject.model, batch)
        directions = [random_signs(h, f"{draw}{s.digest}") for h, s in zip(rows, batch.samples, strict=True)]
    return torch.stack([(c * y).double().sum() for c, y in zip(directions, rows, strict=True)]).sum()


class _Weighed(torch.autograd.Function):
    """x W^T + b, whose backward pass notes the squared norm of each token's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        notes: _Notes,
        name: str,
    ) -> Tensor:
        """x (..., in_features); leaf: what makes autograd record the first linears as well."""
        ctx.weight, ctx.notes, ctx.name = weight, notes, name
        return owned(F.linear(x, weight(), bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.notes.add(ctx.name, grad)
        towards_x = grad @ ctx.weight() if ctx.needs_input_grad[0] else None
        return towards_x, grad.new_zeros(()), None, None, None, None
