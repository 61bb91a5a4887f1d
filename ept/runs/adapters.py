"""A method's adapter on a base model, fresh or trained; this project's own methods are built here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from ..config import EPTConfig
from ..model.adapter_files import SCALE_NAME, read_config, read_weights, weight_shapes
from ..model.base_model import absent_modules, lost_modules, trained_heads
from ..model.ept_model import EPTModel, get_ept_model
from ..model.packing import second_call
from ..utils.messages import listed
from .folder import RunFolder
from .loading import load_base_model
from .method_table import METHODS, Method, get_method

if TYPE_CHECKING:
    from ..tasks import Task
    from .config import MethodConfig, RunConfig

FAST = {"fast_4bit", "dequantized_cache_bytes", "fast_frozen"}  # how the base model's own layers run


def load_untrained(
    config: RunConfig, task_type: str, task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Loads the base model with a fresh adapter for `task`.

    With `prompt_tuning_init="TEXT"` and no text given, the prompt starts from a one-line summary of the task. One of
    this project's adapters also records the task's template and labels.
    """
    pad_token_id = int(tokenizer.pad_token_id)
    base = load_base_model(config.model, task_type, task.num_outputs, pad_token_id, max_length=max_length)
    settings, method = config.method, METHODS[config.method.name]
    text = ""
    if settings.prompt_tuning_init == "TEXT" or settings.prompt_tuning_init_text:
        text = settings.prompt_tuning_init_text or task.summary(config.data.label_form)
        settings = settings.model_copy(update={"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text})
    adapter = adapter_config(settings, base, task_type, max_length, config.seed)
    if isinstance(adapter, EPTConfig):
        adapter.template = task.template
        words = task.labels(config.data.label_form)
        adapter.label_words = list((config.model.head_labels or task.label_words) if task_type == "SEQ_CLS" else words)
    if task_type == "SEQ_CLS" and absent_modules(base):
        adapter.modules_to_save = trained_heads(base)
    options = {"seed": config.seed, "tokenizer": tokenizer, "text": text}
    model = module_of(method).attach(base, adapter, **options, **config.model.model_dump(include=FAST))
    _check_absent(model)
    if settings.init_from is not None:
        folder = _adapter_folder(settings.init_from)
        state = read_weights(folder, {k: v for k, v in weight_shapes(folder).items() if k != SCALE_NAME})
        model.prompt_encoder["default"]._load_adapter_state_dict(state)
    return model


def load_trained(
    config: RunConfig,
    adapter: Path,
    task_type: str,
    num_labels: int,
    pad_token_id: int,
    max_length: int | None = None,
) -> PeftModel:
    """Loads the base model with the adapter saved in the folder `adapter`, ready for inference."""
    base = load_base_model(config.model, task_type, num_labels, pad_token_id, max_length=max_length)
    attach_trained = module_of(METHODS[config.method.name]).attach_trained
    model = attach_trained(base, adapter, **config.model.model_dump(include=FAST))
    _check_absent(model)
    return model.eval()


def _check_absent(model: PeftModel) -> None:
    """Refuses modules that are initialised anew at each load of the base model and are not saved with the adapter."""
    base: Any = model.get_base_model()
    if lost := lost_modules(base, getattr(model.active_peft_config, "modules_to_save", None)):
        raise ValueError(
            f"{base.name_or_path} has no weights for {listed(lost)} of {type(base).__name__}, and the adapter does "
            "not hold them: they would be initialised anew at each load; give a checkpoint that has them"
        )


def share_prompt(model: PeftModel, wanted: bool | None) -> None:
    """Makes `model` read its prompt once per batch; raises ValueError if it cannot. None: on a CPU, if it pays."""
    base = model.get_base_model()
    # On a GPU two calls of a small model may take longer than one, and 4-bit weights are unpacked in each.
    declined = base.device.type != "cpu" or getattr(base, "is_quantized", False)
    if wanted is False or (wanted is None and declined):
        return
    try:
        if not isinstance(model, EPTModel):
            raise ValueError("training.shared_prompt is for this project's own methods: leave it out")
        model.share_prompt(least=1 if wanted else second_call())
    except ValueError:
        if wanted:
            raise


def adapter_config(settings: MethodConfig, base: Any, task_type: str, max_length: int, seed: int) -> PeftConfig:
    """Makes the adapter's configuration, an `EPTConfig` or one of PEFT's, for the frozen model `base`.

    With `settings.budget`, unset sizes are chosen so that the number of trained parameters, or with
    `budget_kind="stored"` the size of a saved adapter (without heads), comes as close to it as possible without
    exceeding it. Raises ValueError if nothing fits, naming the smallest budget that would.
    """
    method = get_method(settings.name)
    build = getattr(module_of(method), method.built_by.partition(":")[2])
    return build(method, settings, base, task_type, max_length=max_length, seed=seed)


def stored_parameters(model: PeftModel) -> int:
    """Counts the numbers that the trained adapter stores in the end, heads included.

    PEFT's prompts are saved as rows, however they were made; PEFT's other adapters as trained.
    """
    config = model.active_peft_config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not config.is_prompt_learning:
        return trained
    encoder = model.prompt_encoder[model.active_adapter]
    of_prompt = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    d = config.token_dim
    stored = config.stored_count(d) if isinstance(config, EPTConfig) else config.num_virtual_tokens * d
    return trained - of_prompt + stored


def module_of(method: Method) -> Any:
    """Imports the module that builds `method`, with its `attach` and `attach_trained`; this project's are below."""
    return importlib.import_module(f"ept.runs.{method.built_by.partition(':')[0]}")


def ept(method: Method, settings: MethodConfig, base: Any, task_type: str, *, max_length: int, seed: int) -> EPTConfig:
    """Configures a method of `EPTConfig`: EPT (possibly ablated), prompt tuning, DePT, ULPT, ADePT, residual."""
    family = method.name.partition("-")[0]  # an ablation is named `ept-...`
    fields = {"task_type": task_type, "seed": seed, **settings.fields_given(), **method.fixed}
    start = fields.pop("init_from", None)
    if start is not None and settings.budget is not None:
        raise ValueError("method.init_from takes the old adapter's sizes: leave method.budget out")
    if settings.budget is not None:
        return EPTConfig.for_budget(base, max_length, settings.budget, family, settings.budget_kind, **fields)
    make: Any = {
        "ept": EPTConfig,
        "dept": EPTConfig.dept,
        "pt": EPTConfig.prompt_tuning,
        "ulpt": EPTConfig.ulpt,
        "adept": EPTConfig.adept,
        "residual": EPTConfig.residual_prompt_tuning,
    }[family]
    config = make(max_length=max_length, **fields)
    return config if start is None else _continued(start, config, method, settings)


def _continued(start: str, fresh: EPTConfig, method: Method, settings: MethodConfig) -> EPTConfig:
    """Returns the configuration of the adapter in `start`, for the task of `fresh`.

    Raises ValueError if that adapter is of another method, is folded, was made for shorter texts, or has other sizes
    than `settings`.
    """
    folder = _adapter_folder(start)
    config = read_config(folder)
    d = config.token_dim or 1
    if config.folded:
        raise ValueError(
            f"{folder} holds a folded adapter, which cannot be trained: start from the adapter before folding"
        )
    if set(config.parameter_shapes(d)) != set(fresh.parameter_shapes(d)):
        raise ValueError(
            f"{folder} holds an adapter of another method than method.name={method.name}: set the method that it was "
            "made with"
        )
    if config.r and config.update == "position" and fresh.max_length > config.max_length:
        raise ValueError(
            f"{folder} holds an adapter for texts of up to {config.max_length} tokens, but data.max_length is "
            f"{fresh.max_length}: lower it"
        )
    for name in settings.fields_given().keys() - {"init_from", "base_dropout"}:
        if (new := getattr(fresh, name)) != (old := getattr(config, name)):
            raise ValueError(f"method.{name} is {new}, but the adapter in {folder} has {old}: leave method.{name} out")
    config.task_type, config.base_dropout, config.inference_mode = fresh.task_type, fresh.base_dropout, False
    config.base_model_name_or_path = config.modules_to_save = None  # the new model sets its own
    if not config.r:
        config.max_length = fresh.max_length
    config.prompt_tuning_init = "RANDOM"  # unused: the old adapter's parameters replace it
    return config


def _adapter_folder(path: str) -> Path:
    """Finds the adapter in `path`, which is a run's folder or the adapter's own."""
    run = RunFolder(Path(path))
    return run.adapter if run.config.is_file() else Path(path)


def attach(base: Any, config: EPTConfig, *, seed: int = 0, text: str = "", **options: Any) -> EPTModel:
    """Puts a fresh adapter, initialised by `config`, on `base`; `options` are those of `get_ept_model`."""
    return get_ept_model(base, config, **options)


def attach_trained(base: Any, folder: Path, **options: Any) -> EPTModel:
    """Puts the adapter that a run saved in `folder` on `base`; `options` are those of `get_ept_model`."""
    return EPTModel.from_pretrained(base, str(folder), **options)
