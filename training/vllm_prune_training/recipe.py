"""What a training run is told: the recipe, every field with its type, its range and what it means.

Unknown fields and wrong types are errors. Shares are of the run, 0 to 1; schedules follow steps and never the clock, so
that an interrupted and resumed run is the same run. ``recipe_file`` reads one from YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_prune.gates import GATES

from .boundary_recipe import BOUNDARY_METHODS, Boundaries
from .data_recipe import Count, Data, NotNegative, Part, Positive, Share, Text
from .prompt_recipe import Prompts, check_prompts, whole_prompts
from .recipe_ftp import FTPObjective

NO_GATES = "none"


class NewModel(Part):
    """A base model with random weights, and a tokenizer: trained on the training data, or taken from a folder.

    Attributes:
        config: fields of the Hugging Face config; ``model_type`` names the family. ``vocab_size`` and the special
            tokens follow from the tokenizer.
        tokenizer_vocab: size of a byte-level BPE vocabulary to train.
        tokenizer: folder of an existing tokenizer.
        residual_zero: whether the residual branches of Qwen- and Llama-like layers start at zero.
    """

    config: dict[str, Any]
    tokenizer_vocab: Annotated[int, Field(ge=300, le=1_000_000)] | None = None
    tokenizer: Text | None = None
    residual_zero: bool = True

    @model_validator(mode="after")
    def _one_tokenizer(self) -> NewModel:
        if (self.tokenizer_vocab is None) == (self.tokenizer is None):
            raise ValueError("give exactly one of tokenizer_vocab and tokenizer")
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, for example qwen3")
        return self


class Model(Part):
    """``model: {new: ...}``."""

    new: NewModel


class Protect(Part):
    """Keys that no gate drops: the first ``sinks`` tokens, and those younger than ``window`` tokens."""

    sinks: Annotated[int, Field(ge=0)] = 0
    window: Annotated[int, Field(ge=0)] = 0


class GateRecipe(Part):
    """Which gates.

    Attributes:
        method: a name in ``vllm_prune.gates.GATES``, or ``none``: the base is trained on, dense, for comparison. Gates
            without parameters (window, random) are a fixed mask under which the base is trained.
        params: of the gate class.
        protect: as served.
        init_from: gated folder whose gates to start from; method and params must be the same.
        train_base: false trains the gates only.
    """

    method: Text
    params: dict[str, int | float | str] = Field(default_factory=dict)
    protect: Protect = Field(default_factory=Protect)
    init_from: Text | None = None
    train_base: bool = True

    @model_validator(mode="after")
    def _check(self) -> GateRecipe:
        known = [NO_GATES, *sorted(GATES)]
        if self.method not in known:
            raise ValueError(f"method '{self.method}' is unknown; known: {', '.join(known)}")
        if self.method == NO_GATES and (self.params or self.init_from or self.protect != Protect()):
            raise ValueError("method none has no params, protect or init_from")
        if self.method != NO_GATES and not GATES[self.method].softens:
            raise ValueError(f"method '{self.method}' is not trained through attention: give a section shadow instead")
        if self.method in ("dcp", "dms") and self.protect != Protect():
            raise ValueError(f"protect cannot be trained with {self.method}, whose soft mask knows of no protection; "
                             "set drop_gate.protect in the exported config.json instead")  # fmt: skip
        if self.method == "ftp" and self.train_base:
            raise ValueError("method ftp trains the router of a frozen base: set train_base false")
        if self.method == "ftp" and self.protect.window and not whole_prompts(self):
            raise ValueError("method ftp has no protect.window unless params.form is prompt: leave it out")
        if not self.train_base and self.method not in ("dcp", "dms", "ltp", "ltp_prompt", "ftp"):
            raise ValueError(f"train_base false leaves nothing to train with method {self.method}")
        return self


class Alpha(Part):
    """DCP's alpha over the run, constant outside ``from`` to ``until``.

    ``cosine`` (the published one: 1 to 8 over the whole run) and ``linear`` go from alpha ``start`` to ``end``.
    ``band`` shrinks the half-width 1/(alpha - 1), outside which no gradient flows, geometrically: from ``start`` times
    the initial beta until alpha is ``end``. The cosine leaves the initial scores outside the band after a few per cent
    of a short run; with ``band`` the gates have equal time at each scale of the scores.
    """

    schedule: Literal["cosine", "linear", "band"] = "cosine"
    start: Positive | None = None
    end: Annotated[float, Field(gt=1.0, le=64.0)] = 8.0
    since: Share | None = Field(None, alias="from")
    until: Share | None = None

    @model_validator(mode="after")
    def _check(self) -> Alpha:
        if self.schedule != "band" and not 1.0 <= self.first <= self.end:
            raise ValueError("start must lie between 1 and end")
        if self.schedule == "band" and self.first > 8.0:
            raise ValueError("start of a band is its half-width in units of the initial beta, at most 8")
        if self.span[0] >= self.span[1]:
            raise ValueError("from must lie before until")
        return self

    @property
    def first(self) -> float:
        """``start`` with its default."""
        return self.start if self.start is not None else (1.3 if self.schedule == "band" else 1.0)

    @property
    def span(self) -> tuple[float, float]:
        """Shares of the run between which alpha changes."""
        low, high = (0.06, 0.85) if self.schedule == "band" else (0.0, 1.0)
        return (low if self.since is None else self.since, high if self.until is None else self.until)


OF_METHOD: dict[str, tuple[str, ...]] = {
    "dcp": ("gamma", "keep", "alpha", "leak"),
    "dms": ("compression", "closed", "tau", "budget_weight"),
    "ltp": ("gamma", "keep", "tau"),
    "acc": ("keep",),
    "ltp_prompt": ("gamma", "keep", "tau"),
    "acc_prompt": ("keep",),
    "ftp": ("ftp",),
}
"""Fields of ``Objective`` that mean something for some methods only."""


class Objective(Part):
    """The loss. A missing weight is 0; with none given, DCP, none and the fixed masks learn from the next token, DMS
    from the teacher (``kl_forward``).

    Attributes:
        next_token: weight of the cross-entropy with the text.
        kl_forward: weight of KL(teacher || student), the mean over the teacher's distribution. What NVIDIA's code
            labels forward is the other one.
        kl_reverse: weight of KL(student || teacher).
        gamma: DCP, LTP, as published: a constant strength. LTP's multiplies the mean over layers of what is kept, not
            their sum. DCP's multiplies the mean visibility of past pairs only, so it counts
            about twice the paper's, whose mean includes the constant half of the square.
        keep: DCP, LTP: the share of past pairs to keep; gamma follows it through a controller. LTP's prompt form: likewise
            of (prompt token, layer) pairs. ACC-style: the budget for which the coefficient is solved, see ``Boundaries``
            and ``Prompts``.
        compression: DMS, as published: the compression ratio; its closed fraction is 1 - 1/CR, CR ramping linearly.
        closed: DMS: the closed fraction, ramping linearly.
        ramp: share of the run after which the target stays.
        alpha: DCP's schedule.
        leak: DCP (ours): gradient of log p where p is exactly 1, so that keys kept beyond doubt can still be let go; it
            falls to 0 while alpha rises.
        tau: DMS's temperature, in units of its logit; LTP's, in units of a uniform share of attention.
        budget_weight: DMS's weight of max(target - closed, 0).
        ftp: FTP's own part.
        answer_weight: weight of a task's answer tokens in the losses; other tokens have 1.
    """

    next_token: NotNegative | None = None
    kl_forward: NotNegative | None = None
    kl_reverse: NotNegative | None = None
    gamma: NotNegative | None = None
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    compression: Annotated[float, Field(gt=1.0, le=1024.0)] | None = None
    closed: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    ramp: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    alpha: Alpha = Field(default_factory=Alpha)
    leak: NotNegative = 0.0
    tau: Positive = 0.1
    budget_weight: Positive = 1.0
    ftp: FTPObjective | None = None
    answer_weight: NotNegative = 1.0

    def check(self, method: str) -> None:
        """Raises ValueError when a field does not belong to the method, or one that it needs is missing."""
        for owner, names in OF_METHOD.items():
            foreign = sorted((set(names) - set(OF_METHOD.get(method, ()))) & self.model_fields_set)
            if foreign:
                raise ValueError(f"objective.{foreign[0]} belongs to {owner}, not to {method}")
        pairs = {"dms": ("compression", "closed"), **dict.fromkeys(("dcp", "ltp", "ltp_prompt"), ("gamma", "keep"))}
        if (pair := pairs.get(method)) and (getattr(self, pair[0]) is None) == (getattr(self, pair[1]) is None):
            raise ValueError(f"objective needs exactly one of {pair[0]} and {pair[1]} for method {method}")
        if method in ("acc", "acc_prompt") and self.keep is None:
            raise ValueError(f"objective needs keep for method {method}")
        if method == "ftp" and self.ftp is None:
            raise ValueError("objective needs a section ftp for method ftp, with sparsity at least")
        if not any(self.weights(method).values()):
            raise ValueError("objective has no loss: next_token, kl_forward and kl_reverse are all 0")

    def weights(self, method: str) -> dict[str, float]:
        """The three weights with their defaults."""
        given = {name: getattr(self, name) for name in ("next_token", "kl_forward", "kl_reverse")}
        if all(value is None for value in given.values()):
            given["kl_forward" if method in ("dms", "ftp") else "next_token"] = 1.0
        return {name: float(value or 0.0) for name, value in given.items()}


class Training(Part):
    """The optimisation.

    Attributes:
        steps: of the optimizer.
        lengths: T, or a list of [share of the run until which, T]; the last share is 1.
        batch_tokens: tokens of one forward pass over all processes; B = batch_tokens // T.
        accumulation: forward passes a step.
        precision: bf16 is autocast, with float32 weights. Gates score features rounded to it, as the server does.
        optimizer: adamw, or muon for the matrices of the layers with adamw for the rest.
        lr: of the base's weights; of muon's matrices with muon.
        adam_lr: with muon: of the base's other weights.
        gate_lr: of the gates' matrices.
        bias_lr: of the gates' scalars.
        weight_decay: of the base's matrices.
        warmup: share of the run with a linear rise.
        schedule: of all learning rates.
        decay: share of the run in which ``trapezoid`` falls.
        max_grad_norm: 0 does not clip.
        eval_tokens: held-out tokens of one evaluation.
        keep_checkpoints: older ones are deleted.
        compile: torch.compile of the decoder.
        visibility: ``lean`` recomputes blocks of the soft mask, ``naive`` holds T x T a layer. Gates at boundaries (ltp, acc)
            read neither: they hold what attention holds for its backward pass.
    """

    steps: Count
    lengths: Count | list[tuple[Share, Count]]
    batch_tokens: Count
    accumulation: Count = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-4
    adam_lr: Positive | None = None
    gate_lr: Positive = 1e-3
    bias_lr: Positive = 1e-2
    weight_decay: NotNegative = 0.0
    warmup: Share = 0.02
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = "constant"
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.45
    max_grad_norm: NotNegative = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    log_steps: Count = 10
    save_steps: Count = 100
    eval_steps: Count = 100
    eval_tokens: Count = 16384
    keep_checkpoints: Count = 2
    compile: bool = False
    visibility: Literal["lean", "naive"] = "lean"

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        lengths = data.get("lengths") if isinstance(data, dict) else None
        if isinstance(lengths, list):
            return {**data, "lengths": [tuple(item) if isinstance(item, list) else item for item in lengths]}
        return data

    @model_validator(mode="after")
    def _check(self) -> Training:
        shares = [share for share, _ in self.phases]
        if shares != sorted(set(shares)) or not shares or shares[-1] != 1.0:
            raise ValueError("lengths must be a T, or [[share, T], ...] with rising shares of which the last is 1")
        lengths = [length for _, length in self.phases]
        if min(lengths) < 8:
            raise ValueError("lengths must be at least 8 tokens")
        if self.batch_tokens < max(lengths):
            raise ValueError(f"batch_tokens must be at least the longest of lengths, {max(lengths)}")
        if (self.adam_lr is None) == (self.optimizer == "muon"):
            raise ValueError("adam_lr goes with optimizer muon, and only with it")
        return self

    @property
    def phases(self) -> list[tuple[float, int]]:
        """(share until which, T)."""
        return [(1.0, self.lengths)] if isinstance(self.lengths, int) else self.lengths

    def length_at(self, progress: float) -> int:
        """T at a share of the run."""
        return next((length for end, length in self.phases if progress < end), self.phases[-1][1])


class Launch(Part):
    """Processes: ``single``, ``accelerate`` (several on this machine) or ``ray``; ``fsdp`` shards with FSDP2."""

    kind: Literal["single", "accelerate", "ray"] = "single"
    workers: Count = 1
    fsdp: bool = False

    @model_validator(mode="after")
    def _check(self) -> Launch:
        if self.kind == "single" and (self.workers != 1 or self.fsdp):
            raise ValueError("kind single has one worker and no fsdp")
        return self


class Recipe(Part):
    """A whole run.

    Attributes:
        model: folder of a Hugging Face causal decoder, or ``{new: ...}``.
        output: folder to make; it must not exist.
        work: folder of checkpoints and logs; default ``OUTPUT-work``.
        teacher: folder of the dense model for the KL losses; default: the model as it was before training.
        prompts, boundaries: of gates that decide about whole prompts and at boundaries, with their defaults unless given.
    """

    model: Text | Model
    output: Text
    work: Text | None = None
    teacher: Text | None = None
    gate: GateRecipe
    objective: Objective = Field(default_factory=Objective)
    prompts: Prompts | None = None
    boundaries: Boundaries | None = None
    data: Data
    training: Training
    launch: Launch = Field(default_factory=Launch)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self.objective.check(self.gate.method)
        if self.gate.method == "ftp" and (self.launch.fsdp or self.training.compile):
            raise ValueError("method ftp knows neither launch.fsdp nor training.compile: leave them out")
        if self.training.optimizer == "muon" and not self.gate.train_base:
            raise ValueError("training.optimizer muon trains the base's matrices; use adamw with gate.train_base false")
        if self.teacher and not self.distils:
            raise ValueError("teacher is given, but objective has neither kl_forward nor kl_reverse")
        if self.prompts is not None:
            self.prompts.check(self.gate)
        if self.whole_prompts:
            check_prompts(self.gate, self.training, self.launch, self.told_prompts)
        if self.boundaries is not None:
            self.boundaries.check(self.gate.method)
        if self.gate.method in BOUNDARY_METHODS:
            self.told_boundaries.check_run(self.gate, self.training, self.launch)
        return self

    @property
    def whole_prompts(self) -> bool:
        """Whether the gates decide about whole prompts, so that sequences are cut and continuations learned."""
        return whole_prompts(self.gate)

    @property
    def told_prompts(self) -> Prompts:
        """``prompts`` with its default."""
        return Prompts() if self.prompts is None else self.prompts

    @property
    def told_boundaries(self) -> Boundaries:
        """``boundaries`` with its default."""
        return Boundaries() if self.boundaries is None else self.boundaries

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        weights = self.objective.weights(self.gate.method)
        return weights["kl_forward"] > 0.0 or weights["kl_reverse"] > 0.0

    @property
    def work_folder(self) -> str:
        """``work`` with its default."""
        return self.work or self.output.rstrip("/") + "-work"

    def same_run(self) -> dict[str, Any]:
        """All fields that change what a run computes: they must be the same when it is resumed."""
        fields = self.model_dump(by_alias=True, exclude={"output", "work", "launch"})
        for name in ("log_steps", "save_steps", "eval_steps", "eval_tokens", "keep_checkpoints"):
            del fields["training"][name]
        return fields
