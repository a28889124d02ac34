"""The build file's schema: frozen models whose field descriptions are its documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from arriero.errors import ArrieroError, nearest
from arriero.export.build_file.locate import MODELS, resolve_model
from arriero.export.compile.cpus import NAMED, NATIVE, parse_cpu
from arriero.export.compile.nvidia.gpus import NAMED as NAMED_GPUS
from arriero.export.compile.nvidia.gpus import parse_gpu
from arriero.graphs.sources.released_configs import RELEASED
from arriero.graphs.sources.synthetic import SyntheticModel
from arriero.profiles.kv_cache import CacheType
from arriero.profiles.recipe import Thresholds, shipped
from arriero.profiles.validate import refusal
from arriero.runtimes.home import expand_home
from arriero.sizes import human_bytes, parse_bytes
from arriero.thresholds import PER_FAMILY, SETTABLE, AnswerMode
from arriero.traits import BACKENDS, SHARD

Modality = Literal["text", "image"]
EMBEDDED = "embedded"
# A generated answer reads the active weights once per token; a larger checkpoint is read from disk each time.
GENERATED_BYTES = 16 << 30
NAME = r"(?!.*(\.|\.partial|\.old.*)$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def _size(value: Any) -> int:
    if not isinstance(value, int | str):
        raise refusal(ArrieroError(f"{value!r} is not a size", expected="a size such as 8GiB"))
    try:
        return parse_bytes(value)
    except ArrieroError as error:
        raise refusal(error) from None


SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1048576},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([KMGTPkmgtp]?[iI]?[Bb])?\s*$"},
    ],
    "examples": ["8GiB"],
}
Size = Annotated[int, BeforeValidator(_size), WithJsonSchema(SIZE_SCHEMA)]
PathText = WithJsonSchema({"type": "string", "minLength": 1})
Count = Annotated[StrictInt, Field(gt=0)]
Seed = Annotated[StrictInt, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Section):
    """One bundle to build."""

    name: str = Field(
        description="Name of the bundle and of its folder under `output`: letters, digits, dot, dash, underscore.",
        json_schema_extra={"pattern": f"^{NAME}$"},
    )
    backend: Literal[BACKENDS] = Field(description="The runtime that will execute the bundle.")  # type: ignore[valid-type]
    profile: str = Field(
        description="How weights are stored: a shipped profile (`arriero profiles list`) or the path of a profile file."
    )
    cpu: str | None = Field(
        default=None,
        description="The processor to compile for, where the backend compiles (`tvm`): "
        f"`{NATIVE}` (the default), {', '.join(f'`{name}`' for name in NAMED)}, or an LLVM triple, CPU and features "
        "as in `aarch64-linux-gnu cortex-a72 +crc`.",
    )
    gpu: str | None = Field(
        default=None,
        description="The GPU to compile for, where the backend does (`tensorrt`, `tensorrt-rtx`): "
        f"`{NATIVE}` (the default), {', '.join(f'`{name}`' for name in NAMED_GPUS)}, or a compute capability as in "
        "`sm_89`.",
    )
    context: Count = Field(default=4096, description="Tokens that one sequence may hold, prompt and answer together.")
    batch: Count = Field(default=1, description="Sequences decoded together.")
    kv_cache: CacheType | None = Field(
        default=None,
        description="How keys and values are kept, beside any profile: `float32`, `float16` (`tvm`) in half of the "
        "memory, or `int8` (`onnxruntime`, `tvm`) in a quarter. Left out, it is `float16` where the backend has it and "
        "the profile rounds weights, and `float32` elsewhere; only what is asked for here loosens thresholds.",
    )
    shard: Size = Field(
        default=SHARD, description="Most bytes of one file of weights. A weight that is larger has a file of its own."
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_folders(cls, name: str) -> str:
        return _filesystem_safe(name, "portable-int8")

    @field_validator("cpu")
    @classmethod
    def _cpu_is_known(cls, cpu: str | None) -> str | None:
        try:
            if cpu not in (None, NATIVE):
                parse_cpu(cpu)
        except ArrieroError as error:
            raise refusal(error) from None
        return cpu

    @field_validator("gpu")
    @classmethod
    def _gpu_is_known(cls, gpu: str | None) -> str | None:
        try:
            if gpu not in (None, NATIVE):
                parse_gpu(gpu)
        except ArrieroError as error:
            raise refusal(error) from None
        return gpu

    @field_validator("profile")
    @classmethod
    def _profile_exists(cls, profile: str, info: ValidationInfo) -> str:
        if profile in shipped():
            return profile
        path = _absolute(profile, info)
        if path.is_file():
            return str(path)
        known = f"one of {', '.join(shipped())}, or the path of a profile file"
        remedy = nearest(profile, list(shipped()))
        if re.search(r"(^|\W)kv8$", profile):
            remedy = "A cache is no profile: name any profile, and write `kv_cache: int8` beside it"
        raise refusal(ArrieroError(f"there is no profile {profile!r}", expected=known, remedy=remedy))


class Samples(_Section):
    """So many samples of a set: what calibration sees, or what parity asks."""

    usual: ClassVar[int]
    set: str = Field(
        default=EMBEDDED,
        min_length=1,
        description="Where samples come from: `embedded` (the shipped task generators), the path of a JSONL file with "
        "a `prompt` or `messages` per line, or that of a folder of images.",
    )
    samples: Count | None = Field(
        default=None,
        validate_default=True,
        description="How many samples; a file or folder with fewer is refused, and gives all it has when left out.",
    )

    seed: Seed = Field(description="Which samples.")

    @field_validator("set")
    @classmethod
    def _set_exists(cls, name: str, info: ValidationInfo) -> str:
        if name == EMBEDDED:
            return name
        path = _absolute(name, info)
        if path.exists():
            return str(path)
        near = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        expected = f"{EMBEDDED}, or the path of a JSONL file or of a folder of images"
        remedy = nearest(path.name, [*near, EMBEDDED])
        raise refusal(ArrieroError(f"there is no data set {name!r}", expected=expected, remedy=remedy))

    @field_validator("samples")
    @classmethod
    def _generators_have_no_end(cls, samples: int | None, info: ValidationInfo) -> int | None:
        return cls.usual if samples is None and info.data.get("set") == EMBEDDED else samples


class Calibration(Samples):
    """The samples on which expert coverage and activation ranges are measured; `embedded` gives 96 when left out."""

    usual = 96
    seed: Seed = Field(
        default=11, description="Which samples; for an embedded set it must differ from the parity cases' seed."
    )


class Cases(Samples):
    """The held-out prompts of the parity report; `embedded` gives 48 when left out."""

    usual = 48
    seed: Seed = Field(
        default=29, description="Which cases; for an embedded set it must differ from the calibration's seed."
    )


class Parity(_Section):
    """What the bundle must prove against the PyTorch reference before it is published."""

    cases: Cases = Field(default=Cases(), description="The held-out prompts.")
    answers: AnswerMode | None = Field(
        default=None,
        description="`generated`: both sides answer token by token. `forced`: an answer is right when the top token of "
        "every position of the expected one leads to it, the closing token included; its figures have names of their "
        "own. Left out: generated for checkpoints of up to "
        f"{human_bytes(GENERATED_BYTES)}, forced beyond.",
    )
    record: Literal["bundle", "separate"] = Field(
        default="bundle",
        description="Where the reference record goes, which holds the prompts and pictures: into each bundle, so that "
        "any machine can prove it, or beside the bundles as `reference-<hash>`, for prompts and pictures that stay "
        "private. A bundle's parity report shows the answers in either case.",
    )
    forced_routing: StrictBool = Field(
        default=False,
        description="Whether each bundle runs over the cases once more, every token sent to the experts that the "
        "reference chose: the report then says what part of the KL flipped routing causes.",
    )
    thresholds: Thresholds = Field(
        default={},
        description="Parity metric -> threshold; overrides the profile's. `task_accuracy_*` may add `.<family>`.",
    )


class Budgets(_Section):
    """What the build may take of the machine. A build that would need more is refused before it starts."""

    host_memory: Size | None = Field(
        default=None, description="Most memory the build may use; what is free when left out."
    )
    disk: Size | None = Field(
        default=None, description="Most disk the build may use under `output`; what is free when left out."
    )
    gpu_memory: Size | None = Field(
        default=None,
        description="Most memory of the GPU that a bundle may use: weights, keys and values, and its engines' scratch "
        "space; weights beyond it are streamed from the host. No limit when left out.",
    )


class BuildConfig(_Section):
    """A build file: one checkpoint in, one proven bundle per target out. Relative paths start at the file's folder."""

    version: Literal[1] = Field(description="Version of this format.")
    model: Annotated[Path | SyntheticModel, PathText] = Field(
        description="The checkpoint: a folder (of Hugging Face's, Meta's or GGUF files), a .gguf file, "
        "`hf://organisation/name[@revision]` in the local Hugging Face cache, or `synthetic://name[?layers=N&seed=N]`: "
        f"{', '.join(RELEASED)} at true size with weights that are drawn, to measure speed and memory."
    )
    adapters: tuple[Annotated[Path, PathText], ...] = Field(
        default=(),
        description="Folders of LoRA adapters, as PEFT saves them, that are merged into the model in this order.",
    )
    runtime_adapters: dict[str, Annotated[Path, PathText]] = Field(
        default={},
        description="Name -> folder of LoRA adapters that each bundle switches between while it runs, beside the model "
        "itself: of attention, shared experts and dense MLPs. Each is proven like the model.",
        json_schema_extra={"propertyNames": {"pattern": f"^{NAME}$"}},
    )
    modalities: tuple[Modality, ...] = Field(
        min_length=1, description="What the bundles take in: `text`, or `text` and `image`."
    )
    output: Annotated[Path, PathText] = Field(
        default=Path("bundles"), validate_default=True, description="Folder of the bundles and of the work files."
    )
    targets: tuple[Target, ...] = Field(min_length=1, description="The bundles to build.")
    calibration: Calibration = Field(
        default=Calibration(), description="Samples for profiles that need to see activations."
    )
    parity: Parity = Field(default=Parity(), description="Proof against the reference.")
    budgets: Budgets = Field(default=Budgets(), description="Limits on memory and disk.")

    @field_validator("model", mode="before")
    @classmethod
    def _model_exists(cls, model: Any, info: ValidationInfo) -> Path | SyntheticModel:
        if not isinstance(model, str) or not model:
            raise refusal(ArrieroError(f"{model!r} names no model", expected=MODELS))
        try:
            return resolve_model(model, _folder(info))
        except ArrieroError as error:
            raise refusal(error) from None

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters_exist(cls, adapters: Any, info: ValidationInfo) -> tuple[Path, ...]:
        if not isinstance(adapters, list) or not all(isinstance(one, str) and one for one in adapters):
            raise refusal(ArrieroError(f"{adapters!r} is no list", expected="a list of folders"))
        return tuple(_adapter(one, info) for one in adapters)

    @field_validator("runtime_adapters", mode="before")
    @classmethod
    def _named_adapters_exist(cls, adapters: Any, info: ValidationInfo) -> dict[str, Path]:
        entries = adapters.items() if isinstance(adapters, dict) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(folder, str) and folder for name, folder in entries):
            raise refusal(ArrieroError(f"{adapters!r} is no table", expected="name: folder, a line for each adapter"))
        for name in adapters:
            _filesystem_safe(name, "german")
        if len({name.casefold() for name in adapters}) < len(adapters):
            raise refusal(ArrieroError("two names differ in upper and lower case alone", remedy="Rename one of them"))
        return {name: _adapter(folder, info) for name, folder in adapters.items()}

    @field_validator("output", mode="before")
    @classmethod
    def _absolute_output(cls, output: Any, info: ValidationInfo) -> Path:
        if not isinstance(output, str | Path) or not str(output):
            raise refusal(ArrieroError(f"{output!r} is not a path", expected="the path of a folder"))
        path = _absolute(str(output), info)
        if path.exists() and not path.is_dir():
            raise refusal(ArrieroError(f"{path} is a file", expected="the path of a folder"))
        return path

    @field_validator("modalities")
    @classmethod
    def _text_once(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        if "text" not in modalities:
            remedy = "Write `modalities: [text, image]`"
            raise refusal(ArrieroError("text is missing: every Llama 4 is prompted in text", remedy=remedy))
        if len(set(modalities)) < len(modalities):
            raise refusal(ArrieroError("names a modality twice", expected="each of text, image at most once"))
        return modalities


def json_schema() -> dict[str, Any]:
    """Give the JSON schema of a build file, for editors."""
    schema = BuildConfig.model_json_schema()
    schema["title"] = "Arriero build file"
    pattern = rf"^({'|'.join(SETTABLE)}|({'|'.join(PER_FAMILY)})\..+)$"
    schema["$defs"]["Parity"]["properties"]["thresholds"]["propertyNames"] = {"pattern": pattern}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _absolute(text: str, info: ValidationInfo) -> Path:
    """Resolve a path of the build file; an absolute one stays itself."""
    try:
        return (_folder(info) / expand_home(text)).absolute()
    except ArrieroError as error:
        raise refusal(error) from None


def _adapter(text: str, info: ValidationInfo) -> Path:
    """The folder of an adapter, which must be there."""
    folder = _absolute(text, info)
    if not folder.is_dir():
        raise refusal(ArrieroError(f"there is no folder {folder}", expected="a folder of a LoRA adapter"))
    return folder


def _filesystem_safe(name: str, example: str) -> str:
    """A name that can be a folder's on any system."""
    if re.fullmatch(NAME, name):
        return name
    rule = "at most 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
    remedy = f"For example `{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-_')[:64] or example}`"
    raise refusal(ArrieroError(f"{name!r} cannot be a folder name", expected=rule, remedy=remedy))


def _folder(info: ValidationInfo) -> Path:
    """The build file's folder, which the reader hands in as context."""
    return Path(info.context["folder"] if info.context else ".")
