"""A method's adapter on a base model, fresh or trained; of the methods, ours are built here."""

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

FAST = {"fast_4bit", "dequantized_cache_bytes", "fast_frozen"}  # how the base model's own layers are to run


def load_untrained(
    config: RunConfig, task_type: str, task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Loads the base model with a fresh adapter for `task`.

    With `prompt_tuning_init="TEXT"` and no text of its own, its prompt starts from the task in a line. An adapter of
    ours takes the task's template and labels along.
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
    """Refuses modules that are other ones at each load of the base model and that the adapter does not hold."""
    base: Any = model.get_base_model()
    if lost := lost_modules(base, getattr(model.active_peft_config, "modules_to_save", None)):
        raise ValueError(
            f"{base.name_or_path} has no weights for {listed(lost)} of {type(base).__name__}, and the adapter does not "
            "hold them: they would be other ones at each load; give a checkpoint that has them"
        )


def share_prompt(model: PeftModel, wanted: bool | None) -> None:
    """Lets `model` read its prompt once a batch; raises ValueError where it cannot. None: on a CPU, where it pays."""
    base = model.get_base_model()
    # A GPU may take longer for two calls of a small model than for one; 4-bit weights are unpacked at each.
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

    With `settings.budget` the sizes that are not set are chosen so that the trainable parameters, or with
    `budget_kind="stored"` what a saved adapter holds (heads apart), come as near to it as they can without exceeding
    it. Raises ValueError where nothing fits, with the smallest that would do.
    """
    method = get_method(settings.name)
    build = getattr(module_of(method), method.built_by.partition(":")[2])
    return build(method, settings, base, task_type, max_length=max_length, seed=seed)


def stored_parameters(model: PeftModel) -> int:
    """Counts the numbers that the trained adapter has to hold in the end, its heads included.

    PEFT's prompts are saved as rows, whatever made them; other adapters of PEFT as they are trained.
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
    """Imports the file that builds `method`, with its `attach` and `attach_trained`; ours are below."""
    return importlib.import_module(f"ept.runs.{method.built_by.partition(':')[0]}")


def ept(method: Method, settings: MethodConfig, base: Any, task_type: str, *, max_length: int, seed: int) -> EPTConfig:
    """Configures a method of `EPTConfig`: EPT or EPT without a part, prompt tuning, DePT, ULPT, ADePT, residual."""
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

    Raises ValueError where it is of another method, folded, for shorter texts, or has other sizes than are set.
    """
    folder = _adapter_folder(start)
    config = read_config(folder)
    d = config.token_dim or 1
    if config.folded:
        raise ValueError(f"{folder} holds a folded adapter, which cannot be trained: start from the one before folding")
    if set(config.parameter_shapes(d)) != set(fresh.parameter_shapes(d)):
        raise ValueError(
            f"{folder} holds an adapter of another method than method.name={method.name}: give the one it was made with"
        )
    if config.r and config.update == "position" and fresh.max_length > config.max_length:
        raise ValueError(
            f"{folder} holds an adapter for texts of up to {config.max_length} tokens, data.max_length is "
            f"{fresh.max_length}: lower it"
        )
    for name in settings.fields_given().keys() - {"init_from", "base_dropout"}:
        if (new := getattr(fresh, name)) != (old := getattr(config, name)):
            raise ValueError(f"method.{name}={new}, and the adapter in {folder} has {old}: leave method.{name} out")
    config.task_type, config.base_dropout, config.inference_mode = fresh.task_type, fresh.base_dropout, False
    config.base_model_name_or_path = config.modules_to_save = None  # those of the new model
    if not config.r:
        config.max_length = fresh.max_length
    config.prompt_tuning_init = "RANDOM"  # which the old adapter's parameters take the place of
    return config


def _adapter_folder(path: str) -> Path:
    """Finds the adapter in `path`, a run's folder or the adapter's own."""
    run = RunFolder(Path(path))
    return run.adapter if run.config.is_file() else Path(path)


def attach(base: Any, config: EPTConfig, *, seed: int = 0, text: str = "", **options: Any) -> EPTModel:
    """Puts a fresh adapter of ours on `base`, started as `config` says; `options`: those of `get_ept_model`."""
    return get_ept_model(base, config, **options)


def attach_trained(base: Any, folder: Path, **options: Any) -> EPTModel:
    """Puts the adapter of ours that a run saved in `folder` on `base`; `options`: those of `get_ept_model`."""
    return EPTModel.from_pretrained(base, str(folder), **options)
