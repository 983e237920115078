"""Unmasking: what is proposed for a masked position, how sure the model is, and which proposals a policy accepts.

Everything runs where the logits are: no host reads and no shapes that depend on values, so that a CUDA graph can hold
it. Wherever two candidates are equally good, the earlier position comes first.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

PolicyName = Literal["threshold", "factor", "profile", "entropy", "margin", "fixed", "verified"]
DEFAULT_POLICY, VERIFIED = "threshold", "verified"
DEFAULT_THRESHOLD = 0.9  # published with Fast-dLLM v1 and v2
LARGEST = torch.finfo(torch.float32).max  # of a policy's parameter, which slots keep as float32


class Proposals(NamedTuple):
    """What is proposed for S positions of B rows; margin and entropy only where a policy needs them.

    Both are those of the distribution at temperature 1, whatever token was drawn.
    """

    token: Tensor
    """[B, S] int64."""
    confidence: Tensor
    """[B, S] float32, probability of the proposal."""
    margin: Tensor | None = None
    """[B, S] float32, probability of the most likely token minus that of the second."""
    entropy: Tensor | None = None
    """[B, S] float32, nats."""


def propose(logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, uniform: Tensor | None = None):
    """Propose a token for every position.

    At temperature 0 the proposal is the most likely token and its confidence the softmax probability at temperature 1.
    Above 0 it is drawn from the nucleus: the smallest set of most likely tokens whose probability exceeds `top_p`; the
    confidence is then its renormalised probability. All probabilities are float32.

    Args:
        logits: [..., V] float32.
        uniform: [...] float32 in [0, 1), one draw for each position; needed above temperature 0.
    Returns:
        token: [...] int64; confidence: [...] float32.
    Source: method.md 3.2; the published code takes the softmax in the model's dtype and samples for the first row only.
    """
    if temperature == 0:
        best, token = logits.max(-1)
        return token, (best - logits.logsumexp(-1)).exp()
    assert uniform is not None, "sampling needs uniform draws"
    probability = (logits / temperature).softmax(-1)
    if top_p == 1:  # everything may be drawn: no need to sort the vocabulary
        cumulative = probability.cumsum(-1)
        total = cumulative[..., -1]
        below_total = total.nextafter(torch.zeros_like(total))  # so that what is drawn has a probability above 0
        token = torch.searchsorted(cumulative, (uniform * total).minimum(below_total)[..., None], right=True)
        return token.squeeze(-1), probability.gather(-1, token).squeeze(-1)
    probability, order = probability.sort(dim=-1, descending=True)
    below = probability.cumsum(-1) - probability  # mass of the more likely tokens
    nucleus = probability.masked_fill(below > top_p, 0.0)  # the most likely token always stays
    nucleus = nucleus / nucleus.sum(-1, keepdim=True)
    rank = (nucleus.cumsum(-1) <= uniform[..., None]).sum(-1, keepdim=True)
    rank = rank.clamp(max=(nucleus > 0).sum(-1, keepdim=True) - 1)  # rounding must not leave the nucleus
    return order.gather(-1, rank).squeeze(-1), nucleus.gather(-1, rank).squeeze(-1)


def make_proposals(
    logits: Tensor,
    needs: frozenset[str] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    uniform: Tensor | None = None,
) -> Proposals:
    """Propose as `propose` does, and measure what a policy `needs`; each of the two is another pass over the logits.

    Args:
        logits: [B, S, V] float32; -inf is allowed and stands for probability 0.
        needs: of "margin" and "entropy".
        uniform: [B, S] float32 in [0, 1); needed above temperature 0.
    """
    token, confidence = propose(logits, temperature, top_p, uniform)
    margin = entropy = None
    if "margin" in needs:
        best_two = (logits.topk(2).values - logits.logsumexp(-1, keepdim=True)).exp()  # [B, S, 2]
        margin = best_two[..., 0] - best_two[..., 1]
    if "entropy" in needs:
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # entr(0) is 0
    return Proposals(token, confidence, margin, entropy)


def accept_by_threshold(confidence: Tensor, is_candidate: Tensor, threshold: float | Tensor) -> Tensor:
    """Accept every candidate above the threshold, and always the most confident one of each row.

    Threshold 1.0 therefore means one token per denoising step.

    Args:
        confidence: [B, S] float32, or any finite score that is higher where the model is surer.
        is_candidate: [B, S] bool, the masked positions of the current sub-block.
        threshold: one for all rows, or [B, 1] float32.
    Returns:
        [B, S] bool; a row without candidates accepts nothing.
    Source: method.md 3.2.
    """
    confidence = torch.where(is_candidate, confidence, -torch.inf)
    best = torch.zeros_like(is_candidate).scatter_(-1, confidence.argmax(-1, keepdim=True), True)  # the first, if equal
    return is_candidate & (best | (confidence > threshold))


def comes_first(confidence: Tensor, is_candidate: Tensor) -> Tensor:
    """Return [B, S, S] bool: at [b, i, j] whether j is i, or comes before it in falling order of confidence.

    Equally confident ones keep their order, and candidates come before all others. With S of at most a block, comparing
    all pairs is cheaper than a sort and leaves no tie open. Its sum over j is the rank, from 1.
    """
    confidence = confidence.masked_fill(~is_candidate, -torch.inf)
    mine, other = confidence[:, :, None], confidence[:, None, :]
    place = torch.arange(confidence.shape[1], device=confidence.device)
    return (other > mine) | ((other == mine) & (place <= place[:, None]))


@dataclass(frozen=True)
class ParameterRange:
    """Which values a policy's parameter may have: low < value <= high, and finite in float32."""

    default: float
    high: float = math.inf
    low: float = 0.0
    is_whole: bool = False

    def __contains__(self, value: float) -> bool:
        is_inside = self.low < value <= min(self.high, LARGEST)
        return is_inside and (not self.is_whole or float(value).is_integer())

    def __str__(self) -> str:
        if self.is_whole:
            return f"a whole number above {self.low:g}"
        return f"above {self.low:g}" if math.isinf(self.high) else f"in ({self.low:g}, {self.high:g}]"


class Policy(Protocol):
    """Which proposals are accepted. Always the best candidate of a row that has one, never what is no candidate."""

    needs: frozenset[str]
    """What `make_proposals` must measure besides the confidence."""
    parameter_range: ParameterRange

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        """Return [B, S] bool; is_candidate: [B, S] bool; parameter: [B] float32, each row's own."""
        ...


class Threshold:
    """Accept where the confidence is above the parameter (1.0: one token per denoising step).

    Source: Fast-dLLM (arXiv 2505.22618), section 3.3, and v2 (2509.26328); v1's code accepts at equality too.
    """

    needs = frozenset[str]()
    parameter_range = ParameterRange(default=DEFAULT_THRESHOLD, high=1.0)

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        return accept_by_threshold(proposals.confidence, is_candidate, parameter[:, None])


class Factor:
    """With confidences c in falling order, accept the largest n for which (n + 1)(1 - c_n) < parameter.

    Greedy proposals accepted with a parameter up to 1.0 are also the most likely ones jointly.
    Source: Fast-dLLM (arXiv 2505.22618), section 3.3; its code accepts at equality too, and the last candidate whenever
    all others are accepted.
    """

    needs = frozenset[str]()
    parameter_range = ParameterRange(default=1.0)  # the published scripts'

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        rank = comes_first(proposals.confidence, is_candidate).sum(-1)
        error = (1 - proposals.confidence).double()
        return is_candidate & ((rank == 1) | ((rank + 1) * error < parameter[:, None]))


class Profile:
    """With confidences c in falling order, accept the largest n whose error mass is below the parameter.

    The error mass is (1 - c_1) + ... + (1 - c_n), and (1 - c_n) once more. Greedy proposals accepted with a parameter
    up to 1.0 are also the most likely ones jointly. At the same parameter it accepts at least what the factor rule
    does, and the same where all confidences are equal.
    Source: Fast-dLLM++ (arXiv 2606.02955), Frechet profile; its margin delta is 1 - parameter.
    """

    needs = frozenset[str]()
    parameter_range = ParameterRange(default=0.75)  # delta 0.25, the paper's for all tasks

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        first = comes_first(proposals.confidence, is_candidate)
        # 1 - c is a multiple of 2^-24 in float32, so the float64 sum is exact: no order, no batch can change it
        error = (1 - proposals.confidence).double()
        error_mass = torch.where(first, error[:, None, :], 0.0).sum(-1)
        return is_candidate & ((first.sum(-1) == 1) | (error_mass + error < parameter[:, None]))


class Entropy:
    """Accept where the entropy is below the parameter, in nats; the best candidate is the one of lowest entropy.

    Source: WeDLM (arXiv 2512.22737), without its penalty on the distance.
    """

    needs = frozenset({"entropy"})
    parameter_range = ParameterRange(default=0.4)  # WeDLM's

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        assert proposals.entropy is not None, "the entropy policy needs entropies"
        return accept_by_threshold(-proposals.entropy, is_candidate, -parameter[:, None])


class Margin:
    """Accept where the margin is above the parameter; the best candidate is the one of largest margin.

    Source: the top probability margin that Kim et al. (arXiv 2502.06768) order positions by; as a threshold it is ours.
    """

    needs = frozenset({"margin"})
    parameter_range = ParameterRange(default=0.8, high=1.0)  # confidence above 0.9 implies it

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        assert proposals.margin is not None, "the margin policy needs margins"
        return accept_by_threshold(proposals.margin, is_candidate, parameter[:, None])


class Fixed:
    """Accept the n most confident candidates; n is the parameter, rounded.

    Source: LLaDA (arXiv 2502.09992), low-confidence remasking, with n tokens in every denoising step.
    """

    needs = frozenset[str]()
    parameter_range = ParameterRange(default=2.0, is_whole=True)

    def accept(self, proposals: Proposals, is_candidate: Tensor, parameter: Tensor) -> Tensor:
        rank = comes_first(proposals.confidence, is_candidate).sum(-1)
        return is_candidate & ((rank == 1) | (rank <= parameter.round()[:, None]))


# Beside these stands `verified`, which accepts by the model's token-by-token mode: see verify.py.
POLICIES: dict[str, Policy] = {
    "threshold": Threshold(),
    "factor": Factor(),
    "profile": Profile(),
    "entropy": Entropy(),
    "margin": Margin(),
    "fixed": Fixed(),
}


def check_parameter(name: str, value: float) -> None:
    """Raise ValueError if there is no such policy, or if it cannot have this parameter."""
    _check_name(name)
    if name == VERIFIED:
        raise ValueError(f"policy {name} has no parameter, got {value}; leave it out, or set decode.draft_length.")
    allowed = POLICIES[name].parameter_range
    if value not in allowed:
        option = "decode.threshold" if name == "threshold" else "decode.policy_parameter"
        way_out = "1.0 is one token per step" if name == "threshold" else f"try {allowed.default:g}"
        limit = f"at most {LARGEST:.2g}" if math.isinf(allowed.high) and value > LARGEST else allowed
        raise ValueError(f"{option} of policy {name} must be {limit}, got {value}; {way_out}.")


def _check_name(name: str) -> None:
    names = (*POLICIES, VERIFIED)
    if name not in names:
        raise ValueError(f"decode.policy must be one of {', '.join(names)}, got {name!r}.")


def resolve_parameter(name: str, threshold: float, policy_parameter: float) -> float:
    """Return the parameter that the options decode.policy, .threshold and .policy_parameter ask for.

    The threshold is that of policy threshold alone; policy_parameter is that of the others, and 0 means their default.
    Policy verified has none: 0.
    Raises ValueError for a value out of range, and for an option that the policy does not read.
    """
    if name == "threshold":
        if policy_parameter:
            raise ValueError(
                f"decode.policy_parameter does nothing in policy {name}, got {policy_parameter}; set decode.threshold."
            )
        value = threshold
    else:
        if threshold != DEFAULT_THRESHOLD:
            raise ValueError(
                f"decode.threshold does nothing in policy {name}, got {threshold}; set decode.policy_parameter."
            )
        _check_name(name)
        if name == VERIFIED and not policy_parameter:
            return 0.0
        value = policy_parameter or (POLICIES[name].parameter_range.default if name in POLICIES else 0.0)
    check_parameter(name, value)
    return value
