"""A bundle's manifest as typed data: what each stage of its build says of it, the chain of hashes, every file's record.

Reading it checks its own shape alone. Whether the bundle is what it says is `integrity`'s question, and whether this
machine can run it `machine_fit`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from arriero.errors import ArrieroError
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.inside import climbs_out
from arriero.runtimes.typed_json import decode
from arriero.strict_json import read_json_object

FORMAT = 5
FILE = "manifest.json"
LICENSES = "licenses"  # the folder of the checkpoint's licence, use policy and notices
REPORTS = ("parity.json", "parity.html")
RECORD_FOLDER = "reference"  # of the reference record, in a bundle that brings it
RECORD_FILE = f"{RECORD_FOLDER}/record.json"
ADAPTERS = "adapters"  # the folder with record and reports of each adapter, in a folder of its name
PROOFS = (f"{RECORD_FOLDER}/", f"{ADAPTERS}/")  # where files lie that a bundle is proven with, and not run

COPY_AGAIN = "Copy the bundle again, or rebuild it with `arriero build`"


CHUNK_BYTES = 64 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file; `chunks` are the hashes of each `CHUNK_BYTES` of a larger one."""

    bytes: int
    sha256: str
    chunks: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the file once and give its record."""
        size = path.stat().st_size
        if size <= CHUNK_BYTES:
            return cls(size, file_sha256(path))
        whole, chunks = hashlib.sha256(), []
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).hexdigest())
        return cls(size, whole.hexdigest(), tuple(chunks))

    def entry(self) -> dict[str, Any]:
        """What stands of it in JSON."""
        return {key: value for key, value in asdict(self).items() if value != ()}

    def pieces(self) -> Iterator[tuple[int, int, str]]:
        """Offset, bytes and hash of each chunk; a file of at most `CHUNK_BYTES` is one, an empty one has none."""
        for number, digest in enumerate(self.chunks or (self.sha256,) if self.bytes else ()):
            offset = number * CHUNK_BYTES
            yield offset, min(CHUNK_BYTES, self.bytes - offset), digest

    def flaw(self) -> str | None:
        """What no record that `of` gives could say, in one that others wrote; None where there is nothing."""
        if self.bytes < 0:
            return f"it has {self.bytes} bytes"
        if not all(SHA256.fullmatch(digest) for digest in (self.sha256, *self.chunks)):
            return "a hash is no sha256 in hexadecimal"
        count = -(-self.bytes // CHUNK_BYTES) if self.bytes > CHUNK_BYTES else 0
        return None if len(self.chunks) == count else f"{len(self.chunks)} chunks are hashed where it has {count}"

    def damage(self, path: Path) -> str | None:
        """How the content of `path`, a file of the right size, differs from the record; None where it does not."""
        if not self.chunks:
            digest = file_sha256(path)
            return None if digest == self.sha256 else f"sha256 {digest[:12]}.."

        def differs(number: int) -> bool:
            with path.open("rb") as file:
                file.seek(number * CHUNK_BYTES)
                return hashlib.sha256(file.read(CHUNK_BYTES)).hexdigest() != self.chunks[number]

        with ThreadPoolExecutor(usable_cores()) as pool:
            numbers = [number for number, bad in enumerate(pool.map(differs, range(len(self.chunks)))) if bad]
        if not numbers:
            return None
        return f"{len(numbers)} of {len(self.chunks)} chunks, the first from byte {numbers[0] * CHUNK_BYTES} on"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a lowered graph: dtype as safetensors names it, shape, label of its scheme, the files that hold it.

    The experts' matrices of a layer are one, whether they are stored as such or in the experts' records.
    """

    dtype: str
    shape: tuple[int, ...]
    scheme: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """What a compilation says of its result: the tools' versions, and what the result needs of a machine."""

    tools: dict[str, str]
    cpu: str | None = None  # as LLVM names it: triple, CPU, features
    arch: str = "any"
    features: tuple[str, ...] = ()  # of the processor, in Linux's names
    gpu: str | None = None  # the architecture that engines were compiled for: sm_89, ..
    plugins: dict[str, str] = field(default_factory=dict)  # name -> sha256 of the kernels compiled into the engines


@dataclass(frozen=True)
class Source:
    """What a bundle was made of: the checkpoint and its layout, and the adapters that were merged into it.

    Folders stand by their names, synthetic models by their URLs. `synthetic` weights were drawn at random: they cost
    what the real model's cost, and mean nothing.
    """

    model: str
    layout: str
    adapters: tuple[str, ...] = ()
    synthetic: bool = False

    def __str__(self) -> str:
        if self.synthetic:
            return f"synthetic weights, drawn by {self.model}: answers mean nothing"
        merged = f", with {', '.join(self.adapters)} merged" if self.adapters else ""
        return f"{self.model} in the layout {self.layout}{merged}"


@dataclass(frozen=True)
class LoweredPart:
    """What the stage `lower-*` says: every stored weight by its name, and the compilation."""

    weights: dict[str, StoredWeight]
    compiled: Compiled


@dataclass(frozen=True)
class SampleSet:
    """What identifies drawn samples: set, seed, sha256 over their content, how many of each modality."""

    set: str
    seed: int
    sha256: str
    samples: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.samples.items())
        return f"{self.set}, seed {self.seed}: {counts} samples; sha256 {self.sha256[:12]}"


@dataclass(frozen=True)
class CalibratedPart:
    """Tokens per expert of each MoE layer: of the samples of the stage `calibrate`, whatever the profile.

    Where nothing of a target is calibrated there is no `calibration`, and the tokens are those of its parity cases.
    """

    calibration: SampleSet | None
    coverage: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fallback:
    """An expert that too few calibration tokens reached, and its profile's rule that applied: nearest, widest."""

    layer: int
    expert: int
    tokens: int
    rule: str

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert} ({self.tokens} tokens)"


@dataclass(frozen=True)
class ChosenScheme:
    """The scheme that a group of matrices got by its measured sensitivity, and what error each would have cost."""

    layer: int
    group: str
    scheme: str
    candidate: int
    bytes: int
    errors: dict[str, float]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What a profile left to choice: its budget and what was used of it, as shares of bf16, and each group's scheme."""

    budget: float
    share: float
    groups: tuple[ChosenScheme, ...]


@dataclass(frozen=True)
class RoundedPart:
    """What the stage `calibrate` says of one profile."""

    fallback: tuple[Fallback, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class RtnKl:
    """Mean KL of a profile's round-to-nearest baseline against the reference record in nats, and its error."""

    mean: float
    error: float


@dataclass(frozen=True)
class ProofTerms:
    """What a bundle is judged by, wherever it is proven.

    `rtn` is None for a profile that does not calibrate, and where it could not be measured for the reason `unmeasured`.
    With `forced_routing` the bundle runs with the reference's routing as well.
    """

    thresholds: dict[str, float]
    rtn: RtnKl | None = None
    unmeasured: str | None = None
    forced_routing: bool = False


@dataclass(frozen=True)
class AdaptedPart:
    """An adapter that the bundle switches to: the hashes of the checkpoint with it merged, and of that one's record."""

    checkpoint: str
    record: str


@dataclass(frozen=True)
class Measured:
    """What the build took: bytes of its hungriest stage, and seconds of each."""

    peak_memory_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Target:
    """What the bundle was built for."""

    name: str
    backend: str
    profile: str
    context: int
    batch: int
    arch: str
    kv_cache: str
    shard: int
    cpu: str | None = None
    features: tuple[str, ...] = ()
    gpu: str | None = None
    plugins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Each link is the hash of the one before it and of what its step adds."""

    checkpoint: str
    graph: str
    profile: str
    artifact: str
    record: str
    parity: str


@dataclass(frozen=True)
class Manifest:
    """A manifest whose own shape is right. `digest` is that of all it says but its chain and its parity reports."""

    bundle: Path
    digest: str
    arriero: str
    name: str
    model: ModelSpec
    target: Target
    files: dict[str, FileRecord]
    chain: Chain
    build: dict[str, str]
    tools: dict[str, str]
    weights: dict[str, StoredWeight]
    calibrated: CalibratedPart
    rounded: RoundedPart
    record: str  # the hash of the reference record that the bundle is proven against
    proof: ProofTerms
    kv_bytes_per_token: dict[str, int]
    measured: Measured
    source: Source | None = None  # bundles from before they said so do not
    adapters: dict[str, AdaptedPart] = field(default_factory=dict)  # in the order of their numbers, which begin at 1

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read `bundle`/manifest.json; what is wrong with it is an `ArrieroError`."""
        path = bundle / FILE
        return cls.parse(_read_json(bundle, path), bundle, str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], bundle: Path, where: str) -> Self:
        """What the JSON `raw` of the bundle's manifest says; errors name `where` it lies."""
        # the format comes first: another format may well lack keys, and that is not what is wrong with it
        if "format" in raw and raw["format"] != FORMAT:
            raise ArrieroError(
                f"the bundle has format {raw['format']!r}",
                where=where,
                expected=f"format {FORMAT}",
                remedy="Use the arriero that built it, or rebuild the bundle with this one",
            )
        missing = [key for key in ("format", *KEYS) if key not in raw]
        if missing:
            raise ArrieroError(f"keys are missing: {', '.join(missing)}", where=where, remedy=COPY_AGAIN)

        def entry(kind: Any, name: str) -> Any:
            return decode(kind, raw[name], f"{where}:{name}", COPY_AGAIN)

        target, files = entry(Target, "target"), entry(dict[str, FileRecord], "files")
        if target.context < 1 or target.batch < 1:
            what = f"context is {target.context} and batch {target.batch}"
            raise ArrieroError(what, where=f"{where}:target", expected="at least 1", remedy=COPY_AGAIN)
        _check_names(files, f"{where}:files")
        return cls(
            bundle=bundle,
            digest=manifest_digest(raw),
            arriero=str(raw["arriero"]),
            name=str(raw["name"]),
            model=ModelSpec.parse(raw["model"], f"{where}:model"),
            target=target,
            files=files,
            chain=entry(Chain, "chain"),
            build=entry(dict[str, str], "build"),
            tools=entry(dict[str, str], "tools"),
            weights=entry(dict[str, StoredWeight], "weights"),
            calibrated=entry(CalibratedPart, "calibrated"),
            rounded=entry(RoundedPart, "rounded"),
            record=entry(str, "record"),
            proof=entry(ProofTerms, "proof"),
            kv_bytes_per_token=entry(dict[str, int], "kv_bytes_per_token"),
            measured=entry(Measured, "measured"),
            source=entry(Source, "source") if "source" in raw else None,
            adapters=entry(dict[str, AdaptedPart], "adapters") if "adapters" in raw else {},
        )

    @property
    def synthetic(self) -> bool:
        """Whether the weights were drawn at random."""
        return self.source is not None and self.source.synthetic

    @property
    def proven(self) -> bool:
        """Whether the bundle holds the reports of a proof that it passed, with each of its adapters too."""
        return all(proof_path(subject, report) in self.files for subject in self.records for report in REPORTS)

    @property
    def records(self) -> dict[str | None, str]:
        """The hashes of the reference records: of the model itself, under None, and of it with each adapter."""
        return {None: self.record} | {name: one.record for name, one in self.adapters.items()}


OPTIONAL = ("source", "adapters")
KEYS = tuple(name for name in Manifest.__dataclass_fields__ if name not in ("bundle", "digest", *OPTIONAL))


def proof_path(adapter: str | None, name: str = "") -> str:
    """Where in a bundle a file of the proof lies: of the model itself for None, else of the model with `adapter`."""
    return name if adapter is None else f"{ADAPTERS}/{adapter}/{name}".rstrip("/")


def link(previous: str, digest: str) -> str:
    """Give the next link of the hash chain: what came before and what this step adds, both sha256 in hexadecimal."""
    return hashlib.sha256(f"{previous} {digest}".encode()).hexdigest()


def manifest_digest(entries: Mapping[str, Any]) -> str:
    """Give the sha256 over all that a manifest's JSON says but its chain, its reference record and its reports."""
    said = {key: value for key, value in entries.items() if key not in ("chain", "record")}
    said["files"] = {
        name: record for name, record in entries["files"].items() if name not in REPORTS and not name.startswith(PROOFS)
    }
    # `build` also names the stages that made the record and the reports.
    proof = ("parity-", "reference")
    said["build"] = {name: key for name, key in entries["build"].items() if not name.startswith(proof)}
    return _digest(said)


def parity_digest(files: Mapping[str, FileRecord]) -> str:
    """Give the sha256 over the file records of the parity reports."""
    reports = [name for name in files if name in REPORTS or _is_adapters_report(name)]
    return _digest({name: files[name].sha256 for name in reports})


def _is_adapters_report(name: str) -> bool:
    return name.startswith(f"{ADAPTERS}/") and name.split("/", 2)[-1] in REPORTS


def file_sha256(path: Path) -> str:
    """Give the sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(bundle: Path, path: Path) -> dict[str, Any]:
    if not bundle.is_dir():
        raise ArrieroError("there is no such bundle directory", where=str(bundle), remedy="Check the path")
    if not path.is_file():
        remedy = "Give a directory that `arriero build` published"
        if bundle.name.endswith(".partial"):
            remedy = "This build was not finished: run `arriero build` again"
        raise ArrieroError(f"the bundle has no {FILE}", where=str(bundle), remedy=remedy)
    return read_json_object(path, COPY_AGAIN)


def _check_names(files: Mapping[str, FileRecord], where: str) -> None:
    if not files:
        raise ArrieroError("no files are recorded", where=where, remedy=COPY_AGAIN)
    for name in files:
        if climbs_out(name):
            raise ArrieroError(f"{name!r} points outside the bundle", where=where, remedy=COPY_AGAIN)
