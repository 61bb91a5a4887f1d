"""A run's configuration: sections of typed keys, read from YAML and `dotted.key=value`.

Imports nothing heavy, so that printing or checking a configuration is instant (unless it names a schedule).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .config_text import describe, message_of, override_value, parse_yaml
from .method_table import check_settings

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_FILE_BYTES = 1 << 20
MAX_INTEGER = 2**63 - 1
MAX_SEED = 2**32 - 1  # NumPy's limit


def _number(value: Any) -> Any:
    """Converts text that is a number: YAML 1.1 reads `1e-3` as text."""
    try:
        return float(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value


Count = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
Size = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Number = Annotated[float, BeforeValidator(_number)]
NotNegative = Annotated[Number, Field(ge=0)]


class Section(BaseModel):
    """A section of a configuration: values are not converted to another type, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _fill_empty(cls, values: Any) -> Any:
        return {} if values is None else values  # `model:` with nothing under it


class ModelConfig(Section):
    """The frozen base model. `trust_remote_code` is never set, whatever a file says."""

    name_or_path: str | None = None
    """Folder or Hub name of the base model."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path`, which is unpacked into a plain model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    tokenizer_name_or_path: str | None = None
    """Folder or Hub name of the tokenizer, if it is not with the model."""
    task_type: Literal["SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS"] | None = None
    """None: encoder-decoders are SEQ_2_SEQ_LM, decoders with a language-model head CAUSAL_LM, all others SEQ_CLS."""
    head_labels: list[str] | None = None
    """The task's labels in the order of a classifier's outputs. None: the task's order, or in training the order of a
    trained head whose names (`id2label`) are these labels."""
    dtype: Literal["float32", "bfloat16", "float16", "auto", "fastest"] = "float32"
    """Dtype of the frozen weights. `auto`: as saved. `fastest`: bfloat16 if the hardware supports it (a GPU, or a CPU
    with avx512_bf16 or AMX), else float32."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits, through bitsandbytes."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Quantisation type of 4-bit weights."""
    double_quant: bool = True
    """Quantise the scales of 4-bit weights too."""
    fast_4bit: bool = True
    """Run 4-bit layers through this project's operators where their kernels run. False: use bitsandbytes."""
    dequantized_cache_bytes: Size = 0
    """Memory budget for keeping dequantised weights of 4-bit layers that run through the operators."""
    fast_frozen: bool = True
    """Run norms, rotary embeddings and activations of known families through this project's operators."""
    attn_implementation: str | None = None
    """As in transformers: `eager`, `sdpa`, `flash_attention_2`, ... None: transformers' choice, except for `eager`
    instead of `sdpa` where it is faster: on a CPU, in bfloat16, with texts of at most 400 tokens."""


EXCLUSIVE = (
    *(("template", "text_columns"), ("label_words", "label_values"), ("hub", "train_file")),
    *(("target_template", "label_words"), ("target_template", "label_values")),
    *(("kind", other) for other in ("task", "label_words", "label_values", "target_template", "chat_column")),
    *(("chat_column", other) for other in ("template", "text_columns", "target_template", "label_words")),
)
"""Keys of `data` that exclude each other."""
OF_TASKS = (
    *("template", "target_template", "text_columns", "label_column", "chat_column"),
    *("label_words", "label_values", "metric"),
)
"""Keys of `data` for which a named task has values of its own."""
OF_ROWS = (
    *("train_file", "validation_file", "test_file", "hub", "encoding"),
    *("splits", "max_train", "max_validation", "max_test", "k_shot"),
)
"""Keys of `data` that say where a run's own rows are and which of them are taken."""


class DataConfig(Section):
    """A named `task` (see `ept tasks`), or your own data: files, a folder or a dataset on the Hub.

    For your own data, whatever is not given is inferred from the train rows: columns, template, labels and metrics.
    `ept train FILE --model NAME --dry-run` shows them.
    """

    task: str | None = None
    """Name of a task that `ept tasks` lists."""
    data_dir: str | None = None
    """Folder with `{train,validation,test}.{jsonl,json,csv,tsv,parquet}`; for a named task, used instead of the Hub."""
    train_file: str | None = None
    """File to train on. If it is the only file, validation and test rows are drawn from it."""
    validation_file: str | None = None
    """File used to choose the best checkpoint."""
    test_file: str | None = None
    """File scored before and after training."""
    hub: str | None = None
    """Name of a dataset on the Hub, optionally with a configuration: `dair-ai/emotion`, `nyu-mll/glue:sst2`."""
    encoding: str | None = None
    """Encoding of text files, such as `cp1252`. None: UTF-8, unless a byte order mark or the bytes of a csv file say
    otherwise."""
    splits: str | None = None
    """Folder of an earlier run on the same data, whose splits are reused."""
    strict: bool = False
    """Refuse rows with blank text or without a label. False: skip them and say how many."""
    text_columns: list[str] | None = None
    """Columns to build the template from, if no template is given."""
    label_column: str | None = None
    """Column of the labels."""
    template: str | None = None
    """Input text, with column names in braces: `"{headline}\\nSarcastic?"`."""
    target_template: str | None = None
    """For answers in free text, such as summaries: the answer, with column names in braces."""
    chat_column: str | None = None
    """Column of chats, lists of `{"role": ..., "content": ...}`: the last message is the answer, and the model's chat
    template formats the ones before it. None: `messages`, if there is such a column and nothing else is given."""
    max_answer: Count = 128
    """Maximum tokens of an answer in free text; longer ones are cut in training."""
    label_words: list[str] | dict[Any, str] | None = None
    """A list of words, or a mapping {raw label: word}."""
    kind: Literal["classification", "regression"] | None = None
    """Treat the labels as classes or as numbers. None: up to 20 different whole numbers are classes; more of them, and
    all other numbers, make a regression."""
    label_values: list[Number] | None = None
    """For a regression, instead of `label_words`: evenly spaced numbers over its range. A language model writes the
    nearest of them; a classifier outputs any number."""
    metric: list[str] | None = None
    """Metrics, the first of which decides the best checkpoint. None: accuracy, with `f1_macro` if the commonest label
    has more than 60 % of the rows; for a regression `pearson`, `spearman` and `r2`; for free text `rouge_l` and
    `exact_match`."""
    labels: Literal["digits", "words"] | None = None
    """How a language model writes the labels. None: as digits for a named task, else as words."""
    max_length: Count | None = None
    """Maximum tokens of the input text. None: the task's own limit, or 256 for your own data."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    """Shorten longer texts, always cutting the end of the longest column, or refuse them."""
    max_train: Count | None = None
    """Maximum number of train rows to draw."""
    max_validation: Count | None = None
    """Maximum number of validation rows to draw."""
    max_test: Count | None = None
    """Maximum number of test rows to draw."""
    k_shot: Count | None = None
    """Few-shot: total number of train rows, the same number per label, drawn with the run's seed."""

    @property
    def is_local(self) -> bool:
        """True if the data are the user's own and not a named task's."""
        own = (self.template, self.train_file, self.data_dir, self.hub)
        return self.task is None and any(value is not None for value in own)

    @property
    def name(self) -> str:
        """A short name of the data: that of the task, file, folder or Hub dataset."""
        source = self.train_file or self.data_dir
        return self.task or self.hub or (Path(source).stem if source else "local")

    @property
    def label_form(self) -> Literal["digits", "words"]:
        """How the labels are written: as set in `labels`, else as digits for a named task and as words otherwise."""
        return self.labels or ("digits" if self.task is not None else "words")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name in OF_TASKS:
            if self.task is not None and getattr(self, name) is not None:
                raise ValueError(f"data.task and data.{name} exclude each other: a named task brings its own")
        for first, second in EXCLUSIVE:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise ValueError(f"data.{first} and data.{second} exclude each other: give one")
        if self.hub is not None and (self.task or self.data_dir) is not None:
            raise ValueError("data.hub excludes data.task and data.data_dir: give one")
        return self


class MethodConfig(Section):
    """The adapter. None means the method's own default (see `EPTConfig`)."""

    name: str = "ept-token"
    """A name in docs/comparison.md: ept-token, ept (the paper's), dept, pt, a related method or one of PEFT's."""
    budget: Count | None = None
    """Maximum number of parameters; the sizes are searched."""
    budget_kind: Literal["trained", "stored"] = "trained"
    """What the budget counts: all trained parameters, or what a saved, folded adapter holds."""
    num_virtual_tokens: Size | None = None
    """Length of the prompt."""
    r: Size | None = None
    """Rank of the update of the input embeddings."""
    alpha: Number | None = None
    """Scale of the update: `alpha/√r`."""
    update: Literal["position", "token"] | None = None
    """Position-dependent update, or token-dependent (as in ADePT)."""
    lowrank_init: Literal["uniform", "cosine", "svd"] | None = None
    """How the update starts."""
    update_scope: Literal["text", "all"] | None = None
    """Tokens that get the update: those of the input text, or all, including generated ones."""
    prompt_rank: Size | None = None
    """Build the prompt from this many frozen random rows (ULPT)."""
    prompt_scale_shift: bool | None = None
    """Multiply the prompt by a learned row and add another (ULPT)."""
    residual_dim: Size | None = None
    """Width of a network added to the prompt (residual prompt tuning)."""
    num_spaces: Size | None = None
    """Number of gated spaces."""
    space_dim: Size | None = None
    """Width of each space."""
    space_activation: str | None = None
    """Activation inside a space."""
    fusion: bool | None = None
    """Attention over prompt and update."""
    fusion_dim: Size | None = None
    """Width of its learned query and key maps; 0: none."""
    fusion_score_scale: Number | None = None
    """Factor of its scores."""
    fusion_weight: Number | None = None
    """Its weight in the prompt, fixed. None: learned."""
    space_gate: Literal["learned", "uniform"] | None = None
    """Weights of the spaces: a learned gate, or equal."""
    embedding_scale: Annotated[Number | str | None, Field(union_mode="left_to_right")] = None
    """Unit of the parameters: `auto` is the embeddings' root mean square."""
    init_from: str | None = None
    """Folder of a run or adapter to start from, with its sizes. A head starts fresh."""
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] | None = None
    """How the prompt starts."""
    prompt_tuning_init_text: str | None = None
    """The text, with TEXT."""
    base_dropout: bool | None = None
    """Keep the frozen model's dropout on during training."""

    def fields_given(self) -> dict[str, Any]:
        """Returns the `EPTConfig` fields that the run sets."""
        return self.model_dump(exclude={"name", "budget", "budget_kind"}, exclude_none=True)

    _check = model_validator(mode="after")(check_settings)


class TrainingConfig(Section):
    """Training, and the evaluations during it."""

    max_steps: Count | None = None
    """Number of optimizer steps. None: those of `num_train_epochs`."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 3.0
    """Used when `max_steps` is None."""
    batch_size: Count = 16
    """Rows per step and process."""
    eval_batch_size: Count = 32
    """Rows scored at a time."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are accumulated for one step."""
    learning_rate: NotNegative = 0.05
    """For the prompt and the spaces' `U`, in units of the embeddings' root mean square; for PEFT's methods, for all."""
    low_rank_learning_rate: NotNegative = 1e-2
    """For the adapter's other parameters (`A`, `B`, β); divided by √d for its maps (`D`, `G`, `W_q`, `W_k`)."""
    head_learning_rate: NotNegative | None = None
    """For a classifier's head. None: 4 over its input width, such as 0.005 for a width of 768."""
    weight_decay: NotNegative = 0.0
    """Weight decay of all trained parameters, as in AdamW."""
    warmup_steps: Size = 0
    """Steps over which the learning rates rise from 0."""
    lr_scheduler: str = "linear"
    """Learning-rate schedule after warmup: one of transformers' schedules that need no settings of their own, such as
    `cosine` or `constant_with_warmup` (`constant` and `reduce_lr_on_plateau` take no warmup); others are refused."""
    max_grad_norm: NotNegative = 1.0
    """Maximum gradient norm; larger gradients are scaled down."""
    eval_steps: Count = 100
    """Evaluate and save every N steps, and at the end."""
    logging_steps: Count = 10
    """Log the loss every N steps."""
    score_before: bool = True
    """Also score the untrained adapter on the test split."""
    scoring: Literal["generate", "rank"] | None = None
    """How a language model's labels are scored. None: encoder-decoders generate, decoders rank the labels."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a better score. None: never."""
    save_total_limit: Count = 2
    """Checkpoints to keep in addition to the best and the newest."""
    bf16: bool = False
    """Mixed precision with bfloat16."""
    fp16: bool = False
    """Mixed precision with float16 and a loss scale."""
    gradient_checkpointing: bool = False
    """Recompute the frozen layers in the backward pass to save memory."""
    optim: Literal["adamw_torch_fused", "adamw_torch"] = "adamw_torch_fused"
    """AdamW in one kernel for all parameters of a group, or PyTorch's default implementation."""
    label_only_logits: bool = True
    """Compute a decoder's logits at the labels only. False: at every position."""
    shared_prompt: bool | None = None
    """Read a decoder's prompt once for all rows of a batch: the same result up to rounding, and each further row saves
    the prompt's positions. None: on a CPU, if the model supports it and a step saves at least 64 positions per thread,
    or if texts are short enough to share a row."""
    balanced_sampling: bool = False
    """Draw train rows so that all labels are equally frequent; an epoch has as many rows as before."""
    class_weights: bool = False
    """Weight the loss of each train row by the inverse share of its label (mean 1 over the rows)."""
    group_by_length: bool = False
    """Batch texts of similar length: less padding, but another order of the rows."""
    pad_to_multiple_of: Count | None = None
    """Round each batch's length up to a multiple, and pad labels to the longest answer, so that a compiled step sees
    few shapes. None: pad to the longest text of the batch."""
    compile_layers: bool = False
    """Train with torch.compile of the frozen model's repeated layers. Needs `pad_to_multiple_of`. Evaluation stays
    uncompiled."""
    cuda_graphs: bool = False
    """Replay each compiled layer as one CUDA graph. Needs `compile_layers` and a CUDA device."""
    tensorboard: bool = False
    """Write TensorBoard events into the run's folder."""
    report_to: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """Services that the Trainer reports losses and scores to, set up by their own environment variables."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.compile_layers and self.pad_to_multiple_of is None:
            missing = "set training.pad_to_multiple_of too, for example to 64"
            raise ValueError(f"training.compile_layers compiles each length separately: {missing}")
        if self.shared_prompt:
            for name in ("compile_layers", "gradient_checkpointing"):
                if getattr(self, name):
                    raise ValueError(
                        f"training.shared_prompt and training.{name} exclude each other: such layers cannot take the "
                        "prompt's keys and values; set one"
                    )
        if self.cuda_graphs and not self.compile_layers:
            raise ValueError("training.cuda_graphs replays compiled layers: set training.compile_layers=true too")
        if self.cuda_graphs and self.gradient_checkpointing:
            raise ValueError(
                "training.cuda_graphs and training.gradient_checkpointing exclude each other: a layer that is run "
                "again in the backward pass would overwrite what was recorded; set one"
            )
        if self.balanced_sampling and self.class_weights:
            raise ValueError(
                "training.balanced_sampling and training.class_weights exclude each other: each makes rare labels "
                "count as much as common ones; set one"
            )
        if self.balanced_sampling and self.group_by_length:
            raise ValueError("training.balanced_sampling and training.group_by_length exclude each other: set one")
        if self.lr_scheduler != "linear":
            from .schedules import schedules

            if self.lr_scheduler not in schedules():
                known = ", ".join(schedules())
                raise ValueError(f"training.lr_scheduler: expected one of {known}, got {self.lr_scheduler!r}")
            if self.warmup_steps and not schedules()[self.lr_scheduler].warms_up:
                raise ValueError(
                    f"training.lr_scheduler={self.lr_scheduler} ignores training.warmup_steps={self.warmup_steps}: "
                    "set it to 0, or take another schedule, such as constant_with_warmup"
                )
        if self.bf16 and self.fp16:
            raise ValueError("training.bf16 and training.fp16 exclude each other: set one")
        return self


class RunConfig(Section):
    """A run: a frozen model, data, a method and a training."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    output_dir: str | None = None
    """The run's folder."""
    seed: Annotated[Size, Field(le=MAX_SEED)] = 0
    """Seed of the initialisation, the order of the rows and the few-shot draw; never of the splits."""

    @classmethod
    def load(cls, file: Path | None, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file (None: all defaults) and applies `dotted.key=value` overrides, in order.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not YAML, an unknown key (names the nearest known one), or a value of the wrong type or range.
        """
        values: Any = {}
        if file is not None:
            if not file.is_file():
                raise FileNotFoundError(f"no configuration file {file}")
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise ValueError(
                    f"{file} has {size:,} bytes, but a configuration has at most {MAX_FILE_BYTES:,}: give another file"
                )
            if (values := parse_yaml(file.read_bytes(), str(file))) is None:
                values = {}
            if not isinstance(values, dict):
                raise ValueError(f"{file} holds {describe(values)}, expected a mapping such as `model: {{...}}`")
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator or not key.strip():
                raise ValueError(f"cannot read the override {override!r}: write it as dotted.key=value")
            value = override_value(cls, key.strip(), text)
            *sections, name = key.strip().split(".")
            keys = values
            for section in sections:
                if keys.get(section) is None:
                    keys[section] = {}
                if not isinstance(keys[section], dict):
                    raise ValueError(f"cannot set {key}: {section} is {describe(keys[section])}, not a section")
                keys = keys[section]
            keys[name] = value
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Checks nested mappings, as read from YAML. Raises ValueError as `load` does."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        raise ValueError(message_of(cls, values, first))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    def to_yaml(self) -> str:
        """Returns YAML that `load_run_config` reads back as an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


load_run_config = RunConfig.load
