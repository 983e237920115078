"""How a block is unmasked."""

from dataclasses import dataclass

from fastdllm.decoding.policies import DEFAULT_THRESHOLD, PolicyName, resolve_parameter
from fastdllm.decoding.quantized import STORED, WeightFormat


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a block is unmasked."""

    sub_block_size: int = 8
    """Tokens; divides the block size."""
    policy: PolicyName = "threshold"
    """Which proposals are accepted; the best one of a row always is."""
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
    weight_format: WeightFormat = "model"
    """int8, float8: one byte a weight in the layers' matrices and the head, for small batches, where reading weights
    takes the time; they are rounded, so answers differ. model: as loaded."""
    temperature: float = 0.0
    """0 is greedy; above 0 proposals are drawn at this temperature."""
    top_p: float = 0.95
    """Probability mass in (0, 1] of the nucleus that is drawn from when temperature is above 0."""

    def __post_init__(self):
        resolve_parameter(self.policy, self.threshold, self.policy_parameter)  # refuses what is wrong or never read
        if self.weight_format not in ("model", *STORED):
            formats = ", ".join(("model", *STORED))
            raise ValueError(f"decode.weight_format must be one of {formats}, got {self.weight_format!r}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"decode.temperature must be 0 or more and decode.top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}; temperature 0 is greedy."
            )
        if self.sub_block_size < 1:
            raise ValueError(f"decode.sub_block_size must be 1 or more, got {self.sub_block_size}; try 8.")

    @property
    def parameter(self) -> float:
        """The policy's number: `threshold`, or `policy_parameter` or its default."""
        return resolve_parameter(self.policy, self.threshold, self.policy_parameter)
