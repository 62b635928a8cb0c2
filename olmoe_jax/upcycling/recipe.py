"""What an upcycled model is, and whether it computes what the dense model did.

Letters: N experts, k chosen, G granularity, f the dense FFN, p_i the softmax over all N experts.

Every expert is one of G parts of the FFN, cut across its hidden units; f is the sum of its parts,
as the hidden units of a SwiGLU do not interact. Experts r·G … r·G + G − 1 are copy r, a *group*.
The router's rows are equal within a group, so equal logits make top-k take whole groups (k is a
multiple of G), and each part of f is counted once for each chosen group. What remains is the sum of
the weights of the chosen experts, S, which `Recipe.method` deals with:

  reference   the raw p_i, as OLMoE's upcycling has it: every MoE layer gives S · f(x), and S is
              another number below 1 for every token. No constant undoes that. It is 1 only for
              k = N. (Behind an FFN that is normalised, `norm_position` "post", S falls out again.)
  normalized  the p_i divided by S: f(x) for every k and router. While the copies are equal, the
              router gets no gradient of the cross entropy, as any choice gives the same output; for
              k = 1 it never does, as the one weight is constant.
  scaled      the raw p_i, `w_down` multiplied by N / k (N · G / k for parts), and a router so small
              that S is k / N for every token: logits of 1e-6 still order the experts (float32
              tells some ten levels apart, a tie goes to the lower id: loads lean by a tenth), but
              leave S within some 1e-6 of that. Of 16 layers of 64 experts, top-8, the logits were
              off by 5e-6 of the largest. With a router of ordinary size there is no such factor:
              8 experts, top-2 and logits of deviation 0.9 give S = 0.54 ± 0.10 over tokens.

Only `w_down` is scaled: the output is linear in it, but not in `w_gate`. Parts make S smaller by G,
so `w_down` is multiplied by G under the first two methods as well; "reference" then computes the
same as with whole copies.
"""

import dataclasses
import difflib
import math

REFERENCE, NORMALIZED, SCALED = METHODS = ("reference", "normalized", "scaled")
NONE, NOISE, DROP = DIVERSIFY = ("none", "noise", "drop")
ROUTER_STD = 0.02
NOISE_STD = 0.02
SMALL_LOGITS = 1e-6  # standard deviation of the logits of "scaled", if its input has mean square 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dense model becomes a Mixture of Experts.

    Attributes:
      num_experts: N, in each MoE layer.
      num_experts_per_token: k.
      method: one of METHODS, see above.
      granularity: G parts into which the FFN is cut; each of N / G copies has all of them.
      diversify: what tells copies apart from the beginning. "none": nothing but the router.
        "noise": every entry of an expert is replaced by one of N(0, 0.02) with probability
        `fraction`. "drop": `fraction` of an expert's hidden units, chosen for each expert, have
        their entries of each of the three matrices replaced by a normal distribution with the mean
        and the deviation of those that are dropped.
      fraction: see `diversify`.
      shared_expert: also copy the FFN into a shared expert (`model.num_shared_experts` = G), which
        every token passes. The methods that preserve the function halve both; "reference" adds it.
      moe_every: every `moe_every`-th layer becomes MoE, the last of each group (2: layers 1, 3, …).
      seed: of the router and of `diversify`.

    Raises:
      ValueError: the numbers contradict each other.

    Source: reference, noise, shared expert and interleaved layers: OLMoE (arXiv 2409.02060) and its
      script; there w_down takes part in "noise" by an option, here always. Parts and groups: He et
      al. (arXiv 2410.07524). "drop": Nakamura et al. (arXiv 2502.19261), with `fraction` r.
    """

    num_experts: int
    num_experts_per_token: int
    method: str = REFERENCE
    granularity: int = 1
    diversify: str = NONE
    fraction: float = 0.5
    shared_expert: bool = False
    moe_every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("method", METHODS), ("diversify", DIVERSIFY)):
            if (value := getattr(self, name)) not in choices:
                near = difflib.get_close_matches(str(value), choices, 1, cutoff=0.0)[0]
                raise ValueError(
                    f"{name} is {value!r}: must be one of {', '.join(choices)} (nearest: {near})"
                )
        for name, low in (("num_experts", 2), ("granularity", 1), ("moe_every", 1), ("seed", 0)):
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{name} is {value}: must be at least {low}")
        n, k, parts = self.num_experts, self.num_experts_per_token, self.granularity
        if not 1 <= k <= n:
            raise ValueError(f"num_experts_per_token is {k}: must lie in 1..num_experts ({n})")
        for name, value in (("num_experts", n), ("num_experts_per_token", k)):
            if value % parts:
                least = value - value % parts
                near = " or ".join(str(x) for x in (least, least + parts) if x)
                raise ValueError(
                    f"{name} is {value}: must be a multiple of granularity ({parts}), as experts "
                    f"come as whole copies of {parts} parts; the nearest: {near}"
                )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}: must lie above 0 and at most at 1")
        if parts > 1 and self.moe_every > 1:
            raise ValueError(
                f"granularity is {parts} and moe_every {self.moe_every}: a model has one d_ff for "
                "experts and dense layers, so parts need experts in every layer; set one of them "
                "to 1"
            )

    @property
    def num_copies(self) -> int:
        """Copies of the whole FFN among the routed experts."""
        return self.num_experts // self.granularity

    @property
    def scale(self) -> float:
        """What `w_down` of the routed experts is multiplied by."""
        n, k, parts = self.num_experts, self.num_experts_per_token, self.granularity
        scale = n * parts / k if self.method == SCALED else float(parts)
        return scale * self.shared_scale if self.shared_expert else scale

    @property
    def shared_scale(self) -> float:
        """What `w_down` of the shared expert is multiplied by."""
        return 1.0 if self.method == REFERENCE else 0.5

    def router_std(self, d_model) -> float:
        """Standard deviation of the router's entries."""
        return SMALL_LOGITS / d_model**0.5 if self.method == SCALED else ROUTER_STD


def moe_config(dense, recipe, where="the input"):
    """The ModelConfig of the upcycled model.

    Args:
      dense: ModelConfig of the dense model.
      recipe: a Recipe.
      where: what to call the dense model in messages.

    Raises:
      ValueError: it is a MoE already, or the recipe does not fit its shapes.
    """
    if dense.num_experts:
        raise ValueError(
            f"{where}: is a MoE already (num_experts={dense.num_experts}); upcycling begins with a "
            "dense model"
        )
    parts = recipe.granularity
    if dense.d_ff % parts:
        raise ValueError(
            f"{where}: its FFN has d_ff={dense.d_ff}, which cannot be cut into granularity={parts} "
            f"experts of one width; the nearest that divide it: {_nearest(dense.d_ff, parts)}"
        )
    if dense.num_layers % recipe.moe_every:
        raise ValueError(
            f"{where}: moe_every is {recipe.moe_every}: must divide its {dense.num_layers} layers; "
            f"the nearest: {_nearest(dense.num_layers, recipe.moe_every)}"
        )
    if recipe.method == SCALED and dense.norm_position == "post":
        raise ValueError(
            f"{where}: norm_position is 'post', where the router sees the residual stream, of no "
            "known size: method 'scaled' needs logits of a known size; take method 'normalized'"
        )
    return dataclasses.replace(
        dense, num_experts=recipe.num_experts, num_experts_per_token=recipe.num_experts_per_token,
        num_shared_experts=parts if recipe.shared_expert else 0, moe_every=recipe.moe_every,
        d_ff=dense.d_ff // parts, router="token_choice",
        normalize_expert_weights=recipe.method == NORMALIZED,
    )  # fmt: skip


def preserves(recipe, dense) -> str | None:
    """How well the upcycled model computes the dense model's function; None: it does not."""
    if recipe.diversify != NONE:
        return None
    if recipe.method == NORMALIZED:
        return "exactly (but for rounding)"
    if recipe.method == SCALED:
        return "up to some 1e-6 for each layer (but for rounding)"
    if recipe.num_experts == recipe.num_experts_per_token and not recipe.shared_expert:
        return "exactly (but for rounding): every token passes all experts"
    if dense.norm_position == "post":
        return f"up to norm_eps ({dense.norm_eps:g}): the norm behind the FFN takes out any factor"
    return None


def remarks(recipe, dense, dtype) -> tuple[str, ...]:
    """What a person should know before training with this recipe, one line each.

    Args:
      dtype: name of the dtype of the dense model's FFN.
    """
    out = []
    how = preserves(recipe, dense)
    if how is not None:
        out.append(f"the new model computes what the dense one does, {how}")
    elif recipe.diversify != NONE:
        out.append(
            f"the new model does not compute what the dense one does: {recipe.fraction:.0%} of its "
            f"experts' {'entries' if recipe.diversify == NOISE else 'hidden units'} are new"
        )
    else:
        out.append(
            "the new model does not compute what the dense one does: raw softmax weights of the "
            f"{recipe.num_experts_per_token} chosen of {recipe.num_experts} experts sum to less "
            "than 1, for each token differently (--method=normalized preserves the function)"
        )
    if recipe.method == NORMALIZED and recipe.num_experts_per_token == 1:
        out.append(
            "note: the one weight of a top-1 choice is always 1 when normalized: the cross entropy "
            "never teaches this router, only the auxiliary losses do"
        )
    scales = {recipe.scale, recipe.shared_scale if recipe.shared_expert else 1.0}
    if dtype != "float32" and any(not _is_power_of_two(scale) for scale in scales):
        out.append(
            f"note: w_down is multiplied by {recipe.scale:g} in {dtype}, which rounds; port the "
            "input with --dtype=float32 first to avoid it"
        )
    return tuple(out)


def _nearest(number, divisor):
    """The divisors of `number` next to one that is none."""
    divisors = [x for x in range(1, number + 1) if number % x == 0]
    near = [x for x in divisors if x < divisor][-1:] + [x for x in divisors if x > divisor][:1]
    return " or ".join(map(str, near))


def _is_power_of_two(x):
    return math.frexp(x)[0] == 0.5
