"""How a block is unmasked, and what goes together with what."""

import math
from dataclasses import dataclass

from fastdllm.decoding.drafts import DraftPlan, parse_plan
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, VERIFIED, PolicyName, resolve_parameter
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.masks import ContextAttention


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a block is unmasked."""

    sub_block_size: int = 8
    """Tokens; divides the block size."""
    policy: PolicyName = "threshold"
    """Which proposals are accepted; the best one of a row always is. verified: those that the model chooses token by
    token, so that the answer is the same; needs a model whose context attends causally."""
    threshold: float = DEFAULT_THRESHOLD
    """Policy threshold: confidence in (0, 1] above which a proposal is accepted; 1.0 means one token per denoising
    step."""
    policy_parameter: float = 0.0
    """The number of the other policies (factor and profile: bound on the error; entropy: nats; margin: probability;
    fixed: tokens per step); 0: the policy's default."""
    use_block_cache: bool = True
    """Use the sub-block cache (published name): later steps of a sub-block compute only its own rows. Approximate; the
    block cache itself is exact and always on."""
    fuse_append: bool = False
    """Compute the next block's first denoising step together with the append, on a guess of its first token; a wrong
    guess is computed again, so the tokens stay the same. Pays where rows cost nothing: at small batches."""
    draft_length: int = 7
    """Policy verified: drafts of a pass, 1 to 64; 0: it and draft_groups are chosen while decoding, from how many are
    accepted and how many requests are decoded together."""
    draft_groups: str = "all"
    """Policy verified: the numbers of accepted drafts for which a pass makes the next ones: all, or a list from 0 such
    as 0,4,7. Behind another number those of the next smaller one are used, as far as they reach."""
    temperature: float = 0.0
    """0 is greedy; above 0 proposals are drawn at this temperature."""
    top_p: float = 0.95
    """Probability mass in (0, 1] of the nucleus that is drawn from when temperature is above 0."""

    def __post_init__(self):
        resolve_parameter(self.policy, self.threshold, self.policy_parameter)  # refuses what is wrong or never read
        self._check_drafts()
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError(
                f"decode.temperature must be 0 or more and finite, decode.top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}; temperature 0 is greedy."
            )
        if self.sub_block_size < 1:
            raise ValueError(f"decode.sub_block_size must be 1 or more, got {self.sub_block_size}; try 8.")

    def _check_drafts(self) -> None:
        if self.is_verified:
            parse_plan(self.draft_length, self.draft_groups)
            if self.fuse_append:
                raise ValueError(
                    "decode.fuse_append does nothing in policy verified, which has no blocks; leave it out."
                )
            return
        for name in ("draft_length", "draft_groups"):
            if getattr(self, name) != getattr(DecodeConfig, name):
                raise ValueError(
                    f"decode.{name} does nothing in policy {self.policy}, got {getattr(self, name)}; set decode.policy "
                    "verified."
                )

    @property
    def is_verified(self) -> bool:
        """Whether drafts are verified token by token, in place of unmasking blocks."""
        return self.policy == VERIFIED

    @property
    def token_by_token(self) -> "DecodeConfig":
        """What of this mode ar reads: how a token is drawn."""
        return DecodeConfig(temperature=self.temperature, top_p=self.top_p)

    @property
    def draft_plan(self) -> DraftPlan | None:
        """What a verifying pass drafts; None: chosen while decoding."""
        return parse_plan(self.draft_length, self.draft_groups)

    @property
    def parameter(self) -> float:
        """The policy's number: `threshold`, or `policy_parameter` or its default."""
        return resolve_parameter(self.policy, self.threshold, self.policy_parameter)


def check_decoding(
    mode: str,
    decode: DecodeConfig,
    reuse: ReuseConfig,
    *,
    block_size: int,
    num_layers: int,
    context_attention: ContextAttention,
    has_adapter: bool = False,
) -> None:
    """Raise ValueError for options that the model cannot have, or that do not go together."""
    if has_adapter and mode != "ar" and not decode.is_verified:
        raise ValueError(
            f"a gated adapter drafts behind known text, for decode.policy verified alone, got policy {decode.policy}, "
            "which unmasks blocks; set decode.policy verified, or leave the adapter out."
        )
    if decode.is_verified:
        _check_verified(mode, reuse, context_attention)
    if block_size % decode.sub_block_size:
        raise ValueError(
            f"decode.sub_block_size must divide the block size ({block_size}), got {decode.sub_block_size}; try 8 or "
            "16."
        )
    reuses = reuse.is_on or reuse.is_trimmed
    if reuses and (mode == "ar" or not decode.use_block_cache):
        raise ValueError(
            f"reuse (reuse_k {reuse.reuse_k}, schedule {reuse.schedule}, active_rows {reuse.active_rows}) needs "
            "diffusion decoding with use_block_cache true: without the sub-block cache every denoising step is a full "
            "pass and nothing is ever reused; turn reuse off or the cache on."
        )
    if decode.fuse_append and (reuses or mode == "ar"):
        raise ValueError("decode.fuse_append needs diffusion decoding without reuse; set fuse_append false.")
    reuse.layers(num_layers)  # refuses a subset that the model does not have


def _check_verified(mode: str, reuse: ReuseConfig, context_attention: ContextAttention) -> None:
    if mode == "ar":
        raise ValueError("decode.policy verified does nothing in mode ar, which drafts nothing; use mode diffusion.")
    if context_attention != "causal":
        raise ValueError(
            "decode.policy verified needs a model whose context attends causally, got context_attention "
            f"{context_attention}: such a model has no token-by-token mode to verify with; adapt one with "
            "context_attention causal, or use another policy."
        )
    if reuse.is_on or reuse.is_trimmed:
        raise ValueError(
            f"reuse (reuse_k {reuse.reuse_k}, schedule {reuse.schedule}, active_rows {reuse.active_rows}) does nothing "
            "in decode.policy verified, which has no denoising steps over sub-blocks; turn it off."
        )
